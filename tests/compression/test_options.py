"""Options are listed once, in a dataclass; who takes them shows the same names, defaults, types and help texts."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

import pytest
import torch

from lightning_lance import ConfigError, ContinualCallback, LanceCallback
from lightning_lance.avalanche import LancePlugin, LanceStrategy
from lightning_lance.avalanche.plugin import PluginOptions
from lightning_lance.compression.options import takes
from lightning_lance.trainer.callback import CallbackOptions
from lightning_lance.trainer.continual import StreamOptions

TAKERS = [(LanceCallback, CallbackOptions), (ContinualCallback, StreamOptions), (LancePlugin, PluginOptions)]


@pytest.mark.parametrize(("taker", "options"), TAKERS, ids=lambda found: found.__name__)
class TestTakers:
    def test_signature_is_the_dataclass(self, taker: Any, options: Any) -> None:
        shown = inspect.signature(taker).parameters
        assert list(shown) == [field.name for field in fields(options)]
        assert {name: found.default for name, found in shown.items()} == {f.name: f.default for f in fields(options)}
        assert MISSING not in {found.default for found in shown.values()}
        assert get_type_hints(taker.__init__) == get_type_hints(options)

    def test_every_option_is_explained(self, taker: Any, options: Any) -> None:
        text = taker.__init__.__doc__
        for field in fields(options):
            [line] = [line for line in text.splitlines() if line.startswith(f"    {field.name}: ")]
            assert len(line) > 12, field.name

    def test_values_arrive(self, taker: Any, options: Any) -> None:
        made = taker(0.5, bits=2, seed=3, layers=["a"])
        config = made.session.config if taker is LancePlugin else made.config
        assert config == options(rank=0.5, bits=2, seed=3, layers=["a"])
        with pytest.raises(TypeError, match="rnk"):
            taker(rnk=3)
        with pytest.raises(ConfigError, match="bits=3"):
            taker(bits=3)


def test_texts_of_a_class_win_over_those_of_its_bases() -> None:
    @dataclass
    class Base:
        """Base.

        Attributes:
            first: of the base,
                on two lines.
            second: of the base.

        Raises:
            third: nothing.
        """

        first: int = 1
        second: int = 2

    @dataclass
    class Own(Base):
        """Own.

        Attributes:
            second: of its own.
        """

        second: int = 4

    class Taker:
        @takes(Own)
        def __init__(self, *args: Any, **options: Any) -> None: ...

    assert Taker.__init__.__doc__ == (
        "Options.\n\nArgs:\n    first: of the base,\n        on two lines.\n    second: of its own."
    )
    assert str(inspect.signature(Taker)) == "(first: int = 1, second: int = 4)"


def test_a_strategy_tells_its_options_from_those_of_avalanche() -> None:
    model = torch.nn.Linear(4, 2)
    strategy = LanceStrategy(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), threshold=0.9, rank=4, train_mb_size=7
    )
    assert strategy.train_mb_size == 7
    assert strategy.lance.session.options == PluginOptions(threshold=0.9, rank=4)
    with pytest.raises(TypeError, match="treshold"):
        LanceStrategy(model=model, optimizer=strategy.optimizer, treshold=0.9)


def test_refresh_is_refused_in_continual_learning() -> None:
    with pytest.raises(ConfigError, match="refresh='epoch' is not allowed in continual learning"):
        LancePlugin(refresh="epoch")
