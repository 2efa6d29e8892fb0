"""Commands of `e88 doctor`."""
