"""Fused kernels, each with the function that it replaces as its reference. Importing this needs Triton."""
