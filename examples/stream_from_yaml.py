"""A stream of experiences through Lightning, from a YAML file.

Run it with `python -m examples.stream_from_yaml`.

The same as `lightning-lance stream --config examples/configs/split_mnist.yaml`, called from Python.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lance.cli import main as lightning_lance

CONFIG = Path(__file__).parent / "configs" / "split_mnist.yaml"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns what the stream has recorded."""
    options, more = parser().parse_known_args(arguments)
    lightning_lance(["stream", "--config", str(CONFIG), f"--stream.root={options.root}", *more])
    return json.loads(Path(options.root, "results.json").read_text(encoding="utf-8"))


def parser() -> argparse.ArgumentParser:
    """The command line; options of the tool itself are passed on."""
    result = argparse.ArgumentParser(description="Run a stream from a YAML file.")
    result.add_argument("--root", default="runs/from_yaml", help="folder of the stream")
    return result


if __name__ == "__main__":
    main()
