"""Train neural networks in little memory: low-rank activation compression (LANCE) for PyTorch Lightning."""

from lightning_lance.compression.calibration import calibrate
from lightning_lance.compression.config import LanceConfig
from lightning_lance.compression.report import Report
from lightning_lance.compression.saved_bytes import SavedBytes, measure_saved_bytes
from lightning_lance.compression.session import LanceSession
from lightning_lance.compression.surgery import Plan, is_swapped, plan, restore, swap
from lightning_lance.errors import CalibrationError, ConfigError, LanceError, LanceWarning, PlanError, StateError
from lightning_lance.trainer.callback import LanceCallback
from lightning_lance.trainer.continual import ContinualCallback
from lightning_lance.trainer.metrics import ContinualMetrics, continual_metrics

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "ConfigError",
    "ContinualCallback",
    "ContinualMetrics",
    "LanceCallback",
    "LanceConfig",
    "LanceError",
    "LanceSession",
    "LanceWarning",
    "Plan",
    "PlanError",
    "Report",
    "SavedBytes",
    "StateError",
    "calibrate",
    "continual_metrics",
    "is_swapped",
    "measure_saved_bytes",
    "plan",
    "restore",
    "swap",
]
