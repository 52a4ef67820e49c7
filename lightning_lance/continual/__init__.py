"""Continual learning in protected and reserved subspaces: train one experience after another without forgetting.

Runs without any framework; :mod:`lightning_lance.avalanche` and the Lightning callback drive it.
"""

from lightning_lance.continual.basis import Moments, complement, grow, project_out, reserve
from lightning_lance.continual.memory import Capacity, LayerMemory, Stage
from lightning_lance.continual.moments import FeatureMoments

__all__ = [
    "Capacity",
    "FeatureMoments",
    "LayerMemory",
    "Moments",
    "Stage",
    "complement",
    "grow",
    "project_out",
    "reserve",
]
