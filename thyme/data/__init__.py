"""Data: files of rows in the layouts of the field, read, checked, converted and streamed. Knows no toy."""
