"""Commands of `e88 train`."""
