"""Data: rows, streams of them, the released row formats, and their check. Knows no toy."""
