"""Files of rows: a pass over all of them, and any one by its position, whatever the file's size."""
