"""Exceptions and warnings. Every message says what was given, what is allowed and what to do."""

from __future__ import annotations


class LanceError(ValueError):
    """Base of every error raised by this package."""


class ConfigError(LanceError):
    """An option has a value outside its allowed range."""


class PlanError(LanceError):
    """The model and the options together leave nothing to do, or name something that is not there."""


class CalibrationError(LanceError):
    """The calibration inputs cannot define a subspace (no data, NaN or Inf)."""


class StateError(LanceError):
    """A stored state does not fit the model, or an operation is called in the wrong order."""


class LanceWarning(UserWarning):
    """Something was left alone, or done in another way than asked; the run goes on."""
