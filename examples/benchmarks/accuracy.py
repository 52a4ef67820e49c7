"""Does compression cost accuracy? Back-propagation, LANCE by default and with projections, and as published.

    python -m examples.benchmarks.accuracy --json examples/benchmarks/accuracy.json

The task of `examples.finetune_digits`, with three seeds and 6 epochs: all pointwise convolutions of EfficientNet-Lite0
and its classifier. The bytes of the layer inputs are those that papers count; all that autograd keeps is what the
machine has to hold.
"""

from __future__ import annotations

from collections.abc import Sequence

from examples.finetune_digits import Run, by_variant, mean_std, parser, run_all, show, size, times, write

CLASSIFIER = "classifier"


def convolution_bytes(layers: dict[str, int]) -> int:
    """Bytes of the trained convolutions; the classifier's input is left out, as in the papers."""
    return sum(count for name, count in layers.items() if not name.endswith(CLASSIFIER))


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Header and rows. Bytes are those of the first seed; they hardly depend on it."""
    groups = by_variant(runs)
    header = ["variant", "accuracy", "inputs of the trained convolutions", "all that autograd keeps"]
    rows = [header]
    for variant, group in groups.items():
        run = group[0]
        before, after = convolution_bytes(run.inputs), convolution_bytes(run.kept_inputs)
        inputs, total = size(after), size(run.kept_bytes)
        if "plain" in groups and variant != "plain":
            inputs += f" ({times(before, after)})"
            total += f" ({times(groups['plain'][0].kept_bytes, run.kept_bytes)})"
        rows.append([variant, mean_std([run.accuracy for run in group], digits=4), inputs, total])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: the options of `examples.finetune_digits` with other defaults."""
    command = parser()
    command.description = __doc__
    command.set_defaults(variant="plain,lance,compact,published", seeds="0,1,2", epochs=6)
    options = command.parse_args(arguments)
    runs = run_all(options)
    show(f"{options.epochs} epochs, mean ± standard deviation over {len(options.seeds)} seeds", table(runs))
    if options.json is not None:
        write(options.json, runs)


if __name__ == "__main__":
    main()
