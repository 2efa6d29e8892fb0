"""Sizes without tensors: exact parameter counts, state, FLOPs, presets and a solver for matched shapes."""
