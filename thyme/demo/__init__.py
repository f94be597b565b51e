"""The demo: the whole of Thyme, small, from random weights to a model that decides to write code."""
