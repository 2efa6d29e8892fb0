"""Commands of `e88 bench`."""
