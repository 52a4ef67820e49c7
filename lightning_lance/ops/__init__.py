"""Autograd functions: tensors and numbers in, no module and no configuration."""
