"""Kernels, one file each: the reference in PyTorch beside the Triton kernel."""
