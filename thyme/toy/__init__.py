"""The toy: a world small enough to be learned on two CPU cores, with everything the real one has."""
