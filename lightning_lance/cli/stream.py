"""The subcommand ``stream``: an Avalanche benchmark through :class:`~lightning_lance.avalanche.StreamRunner`."""

from __future__ import annotations

import sys

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from lightning_lance.avalanche.datamodule import AvalancheDataModule
from lightning_lance.avalanche.result import StreamResult
from lightning_lance.avalanche.runner import OWN, StreamRunner
from lightning_lance.cli import PROGRAM
from lightning_lance.cli.app import LanceParser, check_options
from lightning_lance.continual_callback import ContinualCallback

DESCRIPTION = """Train on one experience of an Avalanche benchmark after another, each with a Lightning Trainer. The
same command goes on where an interrupted one has stopped."""


class StreamCLI(LightningCLI):
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
            parser_class=LanceParser,
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
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model, self.datamodule = self.config_init["model"], self.config_init["data"]
        lance = None if self.config["plain"] else self.config_init["lance"]
        self.runner = StreamRunner(
            self.model,
            self.datamodule,
            trainer=dict(self.config_init["trainer"]),
            lance=lance,
            **self.config_init["stream"],
        )

    def run(self) -> StreamResult:
        """Run the stream, print its table and draw its plots."""
        root = self.runner.store.root
        if getattr(rank_zero_only, "rank", 0) == 0:
            root.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(root / "config.yaml"), overwrite=True, multifile=False)
        self.result = self.runner.run()
        _show(self.result)
        return self.result


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
