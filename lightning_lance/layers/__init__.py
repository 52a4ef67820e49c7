"""Layer variants; a new layer type is one new file here, listed below.

Importing this package fills the registry.
"""

from lightning_lance.layers import activation, conv, dropout, linear, norm, pool, smooth

__all__ = ["activation", "conv", "dropout", "linear", "norm", "pool", "smooth"]
