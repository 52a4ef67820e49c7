"""The subcommand ``stream``: an Avalanche benchmark through :class:`~lightning_lance.streams.StreamRunner`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from lightning_lance.cli import PROGRAM
from lightning_lance.cli.app import BaseCLI, LanceParser, check_options
from lightning_lance.cli.messages import TRAINER_ERRORS, about_trainer, with_group
from lightning_lance.cli.saving import save_config
from lightning_lance.errors import ConfigError, LanceError
from lightning_lance.streams.datamodule import AvalancheDataModule
from lightning_lance.streams.result import StreamResult
from lightning_lance.streams.runner import OWN, StreamRunner
from lightning_lance.trainer.continual import ContinualCallback

DESCRIPTION = """Train on one experience of an Avalanche benchmark after another, each with a Lightning Trainer. The
same command goes on where an interrupted one has stopped."""


FREE = {
    "stream.root",
    "stream.restart",
    "stream.progress",
    "stream.checkpoint_every",
    "data.num_workers",
    "data.pin_memory",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
}
"""Options that may be others when a stream goes on: it is the same stream, on another machine perhaps."""


MOST = 4
"""Differences that a message names."""


class _Trainer(Trainer):
    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except TRAINER_ERRORS as error:
            raise about_trainer(error) from error


class StreamCLI(BaseCLI):
    """A LightningCLI without subcommands that runs a stream.

    Attributes:
        runner: the stream.
        result: what it has shown.
    """

    runner: StreamRunner
    result: StreamResult

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            datamodule_class=AvalancheDataModule,
            subclass_mode_model=True,
            parser_kwargs={"prog": f"{PROGRAM} stream", "description": DESCRIPTION},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            run=False,
            args=args,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(Trainer, "trainer", skip=set(OWN), instantiate=False, sub_configs=True)
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True)
        parser.add_lightning_class_args(AvalancheDataModule, "data")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ContinualCallback, "lance")
        given = {"model", "data", "trainer", "lance", "trainer_class"}
        parser.add_class_arguments(StreamRunner, "stream", skip=given, instantiate=False)
        parser.add_argument("--plain", type=bool, default=False, help="train without LANCE, for comparison")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert args is None or isinstance(args, list)
        self.config = parser.parse_args(args)
        check_options(self.config["lance"])

    def instantiate_classes(self) -> None:
        try:
            # Its name from jsonargparse 4.49 on, where the other one warns.
            instantiate = getattr(self.parser, "instantiate", None) or self.parser.instantiate_classes
            self.config_init = instantiate(self.config)
            self.model, self.datamodule = self.config_init["model"], self.config_init["data"]
            lance = None if self.config["plain"] else self.config_init["lance"]
            self.runner = StreamRunner(
                self.model,
                self.datamodule,
                trainer=dict(self.config_init["trainer"]),
                lance=lance,
                trainer_class=_Trainer,
                **self.config_init["stream"],
            )
        except ConfigError as error:
            raise self._named(error) from None

    def run(self) -> StreamResult:
        """Run the stream, print its table and draw its plots."""
        try:
            self.result = self._run()
        except LanceError as error:
            raise self._named(error) from None
        _show(self.result)
        return self.result

    def _run(self) -> StreamResult:
        text = self.parser.dump(self.config)
        asked = self.runner.described = yaml.safe_load(text)
        root = self.runner.store.root

        def differing(stored: Any) -> str | None:
            if stored is None:  # begun in Python, where the runner compares what it knows
                return None
            found = _differing(stored, asked)
            return _other_options(found, root) if found else None

        self.runner.differing = differing
        if getattr(rank_zero_only, "rank", 0) == 0:
            self.runner.store.claim()
            save_config(root, text)
        return self.runner.run()

    def _named(self, error: LanceError) -> LanceError:
        """The error with the whole name of the option that it begins with."""
        assert isinstance(self.parser, LanceParser)
        return type(error)(with_group(str(error), self.parser.options()))


def _other_options(differing: list[tuple[str, str, str]], root: Path) -> str:
    """Why not to go on with another model, other data or other options, or show their results as those asked for."""
    told = "; ".join(f"{name}={there} there, {here} asked for" for name, there, here in differing[:MOST])
    more = f", and {len(differing) - MOST} more" if len(differing) > MOST else ""
    return (
        f"{root} holds a stream that was begun with other options: {told}{more}. Give the same ones, another "
        "--stream.root, or --stream.restart=true to begin anew."
    )


def _differing(stored: Any, asked: Any, name: str = "") -> list[tuple[str, str, str]]:
    """Name and both values of each option that both have, with different values."""
    if isinstance(stored, dict) and isinstance(asked, dict) and stored.keys() & asked.keys():
        both = [key for key in asked if key in stored]
        return [found for key in both for found in _differing(stored[key], asked[key], f"{name}.{key}".strip("."))]
    return (
        []
        if stored == asked or name in FREE
        else [(name, json.dumps(stored, default=str), json.dumps(asked, default=str))]
    )


@rank_zero_only
def _show(result: StreamResult) -> None:
    lines = ["", str(result), f"checkpoints, logs and results.json: {result.root}"]
    try:
        lines.append(f"plots: {', '.join(map(str, result.plot()))}")
    except ImportError:
        lines.append("no plots: pip install 'lightning-lance[plot]' installs what they need")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def run(args: list[str]) -> None:
    """Parse the arguments after ``stream``, and run it."""
    StreamCLI(args).run()
