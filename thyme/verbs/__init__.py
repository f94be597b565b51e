"""The verbs of the command line, one a file: its Config, of only what it uses, and `run(config)`."""
