"""Layers that keep a projection of their input; a new layer type is one new file here, listed below.

Importing this package fills the registry.
"""

from lightning_lance.layers import conv, linear

__all__ = ["conv", "linear"]
