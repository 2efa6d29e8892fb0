"""Commands of `e88 data`."""
