"""Kernels: tensors in, tensors out. No autograd, no parameters; ops hold those."""
