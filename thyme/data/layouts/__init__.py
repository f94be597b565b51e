"""The layouts of the field, a file each: which rows have it, how one is read, how one is written."""
