"""Where the time of rollouts and of training goes, measured against what the machine can do."""
