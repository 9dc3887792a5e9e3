"""Kernels, each with the function that it replaces as its reference: Numba's in `cpu`, Triton's in the other files.

Importing these needs Numba or Triton; `available` says which of them run here, and needs neither.
"""
