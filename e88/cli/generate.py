"""Commands of `e88 generate`."""
