"""The subcommands that run a Lightning Trainer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import lightning
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_lance import __version__
from lightning_lance.cli import PROGRAM
from lightning_lance.cli.fitting import Measured
from lightning_lance.cli.fitting import fit as fit_settings
from lightning_lance.cli.messages import TRAINER_ERRORS, about_trainer, shorten, with_group
from lightning_lance.cli.profiling import profile
from lightning_lance.cli.saving import SaveConfig
from lightning_lance.compression.config import LanceConfig
from lightning_lance.compression.report import Report
from lightning_lance.continual import ContinualConfig
from lightning_lance.errors import ConfigError, LanceError
from lightning_lance.tensors.units import parse_bytes
from lightning_lance.trainer.callback import LanceCallback

DESCRIPTION = """Train with compressed activations. The section "lance" of a configuration holds the options of
lightning_lance.LanceCallback, "trainer", "model" and "data" are those of every LightningCLI."""

STREAM = "stream"
RESULTS = "results"

OWN_PARSERS = {
    STREAM: "Train on one experience of an Avalanche benchmark after another.",
    RESULTS: "Make tables in Markdown of what the runs in a folder have recorded.",
}
"""Subcommands with a parser of their own, and what they do."""


class LanceTrainer(Trainer):
    """The Trainer of the command line tool.

    Attributes:
        arguments: those of the command.
    """

    arguments: Sequence[str] = ()

    def profile(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        top: int = 12,
        json: str | None = None,
        plot: str | None = None,
        fit: int | str | None = None,
        seconds: float = 600.0,
    ) -> Report | list[Measured]:
        """Measure what autograd keeps for one training batch, plainly and with LANCE; the weights stay.

        With ``fit``, measure settings of bits, rank and micro-batches instead, each one for a few steps in a process of
        its own, and say which fit.

        Args:
            model: the model.
            datamodule: its data; the model's own ``train_dataloader`` by default.
            top: rows of each table, the largest first; the rest is summed up in one.
            json: file to write the measurement to.
            plot: image file to draw it in; needs matplotlib.
            fit: bytes, or a string such as ``"300MB"``, that a process may need above what it holds with model and
                data, at its peak.
            seconds: after so long no further setting is begun.
        """
        if fit is not None:
            return fit_settings(self.arguments, model, parse_bytes(fit, "fit"), seconds)
        return profile(self, model, datamodule, top, json, plot)


class LanceParser(LightningArgumentParser):
    """Says in one line what is wrong with an argument."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser of a nested class: the outer one reports
            super().error(message, ex)
        sys.stderr.write(f"{PROGRAM}: error: {shorten(message, self.options())}\n")
        raise SystemExit(2) from ex

    def options(self) -> list[str]:
        """Names of all options, those of subcommands included."""
        found = {action.dest for action in self._actions}
        for action in self._actions:
            if isinstance(action.choices, dict):
                found |= {name for parser in action.choices.values() for name in parser.options()}
        return sorted(found)


class BaseCLI(LightningCLI):
    """A LightningCLI with that parser; its argument ``parser_class`` is one of later versions than the oldest here."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={lightning.__version__}"])
        parser = LanceParser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path to a YAML or JSON file of options.")
        return parser


class LanceCLI(BaseCLI):
    """A LightningCLI with the section ``lance`` and the subcommand ``profile``."""

    trainer_type = LanceTrainer

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        super().__init__(
            trainer_class=self.trainer_type,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": PROGRAM, "description": DESCRIPTION, "version": __version__},
            args=args,
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "profile": {"model", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        # Only to be listed: run() takes it before this parser does.
        if parser._subcommands_action is not None:
            for name, text in OWN_PARSERS.items():
                parser._subcommands_action.add_subcommand(name, LanceParser(), help=text)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LanceCallback, "lance")
        parser.add_argument("--plain", type=bool, default=False, help="run without LANCE, for comparison")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        self._arguments = args
        self.config = parser.parse_args(args)
        if self.config.subcommand in OWN_PARSERS:
            own = self.config.subcommand
            raise ConfigError(f"options before {own} are not read. Give it first: {PROGRAM} {own} --help.")
        check_options(self.config[self.config.subcommand]["lance"])

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.subcommand == "profile":
            # No logger, no checkpoint, no validation.
            quiet = {"enable_progress_bar": False, "enable_model_summary": False}
            kwargs |= {"fast_dev_run": self.profiled_batches(), **quiet}
        trainer = super().instantiate_trainer(**kwargs)
        if isinstance(trainer, LanceTrainer):
            trainer.arguments = self._arguments
        return trainer

    def profiled_batches(self) -> int:
        """Batches that ``profile`` may need: one to choose layers by, those that define subspaces, and one after."""
        section = self._get(self.config, "lance")
        return LanceConfig(preset=section["preset"], calibration_batches=section["calibration_batches"]).batches + 2

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        given = config.get("callbacks") or []
        if any(isinstance(callback, LanceCallback) for callback in (given if isinstance(given, list) else [given])):
            raise ConfigError(
                "trainer.callbacks holds a LanceCallback, and this tool adds the one of the section 'lance'. Move the "
                "options there."
            )
        if self._get(self.config, "plain") and self.subcommand != "profile":
            callbacks = [callback for callback in callbacks if not isinstance(callback, LanceCallback)]
        try:
            return super()._instantiate_trainer(config, callbacks)
        except TRAINER_ERRORS as error:
            raise about_trainer(error) from error


def check_options(section: Any) -> None:
    """Refuse values of the section ``lance`` before a model or data are built.

    Raises:
        ConfigError: a value is not allowed; the message names it as ``lance.NAME``.
    """
    for config in (LanceConfig, ContinualConfig):
        names = config.__dataclass_fields__
        given = {name: value for name, value in section.items() if name in names and value is not None}
        try:
            config(**given)
        except ConfigError as error:
            raise ConfigError(f"lance.{error}") from None


def run(args: list[str] | None = None) -> None:
    """Parse the arguments, those of the process by default, and run the subcommand."""
    given = sys.argv[1:] if args is None else args
    if given[:1] == [STREAM]:  # has a parser of its own, so that the others need no Avalanche
        from lightning_lance.cli import stream

        stream.run(given[1:])
    elif given[:1] == [RESULTS]:
        from lightning_lance.cli import results

        results.run(given[1:])
    else:
        try:
            LanceCLI(given)
        except LanceError as error:
            options = [f"lance.{name}" for name in inspect.signature(LanceCallback).parameters]
            raise type(error)(with_group(str(error), options)) from error
