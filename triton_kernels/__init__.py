"""The fused steps of the numeric contract in Triton: the formula of csrc/core and the launches of csrc/cuda once more.

The modules have the names, and the functions the names and the order, of the C++ headers that they say again. Importing one
imports Triton, so the package does it only where the triton backend is asked for (deeprelax_cuda/backends/triton.py).
"""
