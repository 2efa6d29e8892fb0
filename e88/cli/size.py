"""Commands of `e88 size`."""
