"""Continual learning in protected and reserved subspaces: train one experience after another without forgetting.

Runs without any framework; :mod:`lightning_lance.avalanche` and the Lightning callback drive it.
"""

from lightning_lance.continual.account import LayerAccount, plot_capacity
from lightning_lance.continual.basis import Moments, complement, grow, reserve
from lightning_lance.continual.config import ContinualConfig, ContinualOptions
from lightning_lance.continual.memory import Capacity, LayerMemory, Stage
from lightning_lance.continual.moments import FeatureMoments
from lightning_lance.continual.session import ContinualSession
from lightning_lance.tensors.linalg import project_out

__all__ = [
    "Capacity",
    "ContinualConfig",
    "ContinualOptions",
    "ContinualSession",
    "FeatureMoments",
    "LayerAccount",
    "LayerMemory",
    "Moments",
    "Stage",
    "complement",
    "grow",
    "plot_capacity",
    "project_out",
    "reserve",
]
