"""Train neural networks in little memory: low-rank activation compression (LANCE) for PyTorch Lightning."""

from lightning_lance.calibration import calibrate
from lightning_lance.callback import LanceCallback
from lightning_lance.config import LanceConfig
from lightning_lance.continual_callback import ContinualCallback
from lightning_lance.errors import CalibrationError, ConfigError, LanceError, LanceWarning, PlanError, StateError
from lightning_lance.memory import SavedBytes, measure_saved_bytes
from lightning_lance.metrics import ContinualMetrics, continual_metrics
from lightning_lance.report import Report
from lightning_lance.session import LanceSession
from lightning_lance.surgery import Plan, is_swapped, plan, restore, swap

__version__ = "0.1.0.dev0"

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
