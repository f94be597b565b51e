"""Published benchmarks: their files, prompts, scorers and figures."""
