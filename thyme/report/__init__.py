"""What one looks at: a run in the browser, a run in one file, rows under review, pictures in a terminal."""
