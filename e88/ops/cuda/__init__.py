"""CUDA C++ kernels of the operator, compiled at run time."""
