"""The strategy and the plugin on real Avalanche streams."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import concat_datasets
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import forgetting_metrics
from avalanche.logging import InteractiveLogger, TextLogger
from avalanche.models import MultiHeadClassifier, as_multitask
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, MIRPlugin, RARPlugin, ReplayPlugin
from torch import Tensor, nn

from lightning_lance import ConfigError, LanceWarning, PlanError, StateError, is_swapped
from lightning_lance.avalanche import LancePlugin, LanceStrategy
from lightning_lance.continual.layers import Reserved, reserved_variant
from tests.avalanche.streams import (
    BATCHES,
    EPOCHS,
    Growing,
    MultiHead,
    Plain,
    accuracies,
    class_stream,
    domain_stream,
    evaluator,
    settings,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore:.*nearly full"),
]


class Watch(SupervisedPlugin):  # type: ignore[misc]
    """Checks the promise after each experience, from weights and bases that it copies before."""

    def __init__(self, lance: LancePlugin | None = None) -> None:
        super().__init__()
        self.lance = lance
        self.checked: list[str] = []
        self.moved: list[str] = []
        self.swapped = 0

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        memories = (self.lance or strategy.lance).session.memories
        self.before = {
            name: (strategy.model.get_submodule(name).weight.detach().clone(), memory.protected.clone())
            for name, memory in memories.items()
        }

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.swapped += is_swapped(strategy.model)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        assert not is_swapped(strategy.model)
        for name, (old, protected) in self.before.items():
            module = strategy.model.get_submodule(name)
            variant = reserved_variant(module)
            assert variant is not None
            side, _ = variant.side(module, True)
            change = (side.rows(module.weight.detach()) - side.rows(old)).double()
            assert float((change @ protected.double()).norm()) <= 1e-5 * float(change.norm())
            self.checked.append(name)
            if float(change.norm()) > 1e-4 * float(old.norm()):
                self.moved.append(name)


def learn(strategy: Any, stream: Any) -> list[list[float]]:
    """Accuracy of every test experience after every training experience."""
    matrix = []
    for experience in stream.train_stream:
        strategy.train(experience)
        matrix.append(accuracies(strategy.eval(stream.test_stream)))
    return matrix


@pytest.mark.parametrize("reserved", ["full", 0.95, 16])
def test_a_task_incremental_stream_is_learned_and_not_forgotten(reserved: Any) -> None:
    watch, stream = Watch(), class_stream()
    strategy = LanceStrategy(plugins=[watch], reserved=reserved, threshold=0.9, **settings(MultiHead()))
    matrix = learn(strategy, stream)
    assert watch.swapped == 2 * EPOCHS * BATCHES  # the first experience trains stock layers
    assert sorted(watch.checked) == ["body.0", "body.0", "body.5", "body.5"]
    assert set(watch.moved) == {"body.0", "body.5"}
    assert [matrix[i][i] for i in range(3)] == pytest.approx([1.0] * 3, abs=0.1)
    assert min(matrix[2]) > 0.85
    assert strategy.lance.session.experience == 3
    capacity = strategy.lance.capacity
    assert set(capacity) == {"body.0", "body.5"}
    assert capacity["body.5"].width == 144


def test_less_is_forgotten_than_by_naive_training() -> None:
    forgotten = {}
    for kind in (Naive, LanceStrategy):
        torch.manual_seed(0)
        model, stream = Plain(), domain_stream()
        more: dict[str, Any] = {"threshold": 0.9} if kind is LanceStrategy else {}
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        matrix = learn(kind(**settings(model, optimizer=optimizer), **more), stream)
        forgotten[kind] = sum(matrix[i][i] - matrix[2][i] for i in range(2)) / 2
    assert forgotten[Naive] > 0.1
    assert forgotten[LanceStrategy] < 0.05


def test_as_multitask_finds_its_head() -> None:
    model, watch, stream = as_multitask(Plain(), "classifier"), Watch(), class_stream()
    strategy = LanceStrategy(plugins=[watch], threshold=0.9, **settings(model))
    matrix = learn(strategy, stream)
    assert min(matrix[2]) > 0.85
    assert set(strategy.lance.capacity) == {"model.body.0", "model.body.5"}
    assert watch.checked


def test_a_growing_classifier_is_said_to_be_unprotected_once() -> None:
    strategy, stream = LanceStrategy(threshold=0.9, **settings(Growing())), class_stream(task_labels=False)
    experiences = iter(stream.train_stream)
    with pytest.warns(LanceWarning, match="classifier: one classifier for all experiences, which is not protected"):
        strategy.train(next(experiences))
    strategy.eval(stream.test_stream)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="classifier", category=LanceWarning)
        for experience in experiences:
            strategy.train(experience)
            strategy.eval(stream.test_stream)
    assert set(strategy.lance.capacity) == {"body.0", "body.5"}
    assert strategy.model.classifier.classifier.out_features == 6


def test_a_domain_incremental_stream_protects_its_classifier_too() -> None:
    watch, stream = Watch(), domain_stream()
    strategy = LanceStrategy(plugins=[watch], threshold=0.8, **settings(Plain()))
    matrix = learn(strategy, stream)
    assert set(strategy.lance.capacity) == {"body.0", "body.5", "classifier"}
    assert watch.checked.count("classifier") == 2
    assert matrix[2][0] > 0.8 * matrix[0][0]


def test_a_head_by_name_trains_freely() -> None:
    strategy, stream = LanceStrategy(heads="classifier", threshold=0.8, **settings(Plain())), domain_stream()
    experiences = list(stream.train_stream)
    strategy.train(experiences[0])
    before = strategy.model.classifier.bias.detach().clone()
    strategy.train(experiences[1])
    assert "classifier" not in strategy.lance.capacity
    assert not torch.equal(strategy.model.classifier.bias, before)


@pytest.mark.parametrize(("every", "mode"), [(1, "epoch"), (2, "iteration"), (0, "epoch")])
def test_evaluation_within_training_sees_the_model_that_trains(every: int, mode: str) -> None:
    """Heads of later tasks appear while it evaluates."""
    seen: list[bool] = []

    class Compare(SupervisedPlugin):  # type: ignore[misc]
        def after_eval_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(any(isinstance(module, Reserved) for module in strategy.model.modules()))

    stream = class_stream()
    more = {"eval_every": every, "peval_mode": mode}
    strategy = LanceStrategy(plugins=[Compare()], threshold=0.9, **settings(MultiHead(), **more))
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[stream.test_stream])
    assert any(seen) == (every > 0)  # else it comes after the end of the experience
    assert len(strategy.model.classifier.classifiers) == 3
    assert min(accuracies(strategy.eval(stream.test_stream))) > 0.8


def test_loggers_and_forgetting_metrics_work() -> None:
    text, stream = io.StringIO(), class_stream()
    plugin = EvaluationPlugin(
        forgetting_metrics(experience=True, stream=True), loggers=[TextLogger(text), InteractiveLogger()]
    )
    strategy = LanceStrategy(threshold=0.9, **settings(MultiHead(), evaluator=plugin))
    metrics: dict[str, float] = {}
    for experience in stream.train_stream:
        strategy.train(experience)
        metrics = strategy.eval(stream.test_stream)
    assert metrics["StreamForgetting/eval_phase/test_stream"] < 0.1
    assert "StreamForgetting" in text.getvalue()


def test_the_list_of_plugins_is_not_changed_and_ours_comes_first() -> None:
    watch = Watch()
    plugins = [watch]
    strategy = LanceStrategy(plugins=plugins, **settings(MultiHead()))
    assert plugins == [watch]
    assert strategy.plugins[:2] == [strategy.lance, watch]


def test_unknown_and_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="epochs"):
        LanceStrategy(epochs=3, **settings(MultiHead()))
    with pytest.raises(ConfigError, match="threshold=7"):
        LanceStrategy(threshold=7, **settings(MultiHead()))
    strategy = LanceStrategy(heads="nowhere", **settings(MultiHead()))
    with pytest.raises(PlanError, match="heads='nowhere' matches no module or parameter"):
        strategy.train(next(iter(class_stream().train_stream)))
    assert not is_swapped(strategy.model)


class Boom(SupervisedPlugin):  # type: ignore[misc]
    """Fails in the middle of a given experience."""

    def __init__(self, experience: int) -> None:
        super().__init__()
        self.experience: int | None = experience

    def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if strategy.clock.train_exp_counter == self.experience and strategy.clock.train_exp_iterations == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("reserved", ["full", 8])
def test_an_error_in_training_restores_the_model_and_training_can_go_on(failing: int, reserved: Any) -> None:
    boom, stream = Boom(failing), class_stream()
    strategy = LanceStrategy(plugins=[boom], reserved=reserved, threshold=0.9, **settings(MultiHead()))
    experiences = list(stream.train_stream)
    ids = None
    for index, experience in enumerate(experiences[: failing + 1]):
        if index == failing:
            with pytest.raises(KeyboardInterrupt):
                strategy.train(experience)
        else:
            strategy.train(experience)
    ids = {id(p) for p in strategy.model.parameters()}
    assert not is_swapped(strategy.model)
    assert all(p.requires_grad for p in strategy.model.parameters())
    assert {id(p) for group in strategy.optimizer.param_groups for p in group["params"]} == ids
    assert strategy.lance.session.experience == failing
    boom.experience = None
    for experience in experiences[failing:]:
        strategy.train(experience)
    assert min(accuracies(strategy.eval(stream.test_stream))) > 0.8


def test_the_plugin_cleans_up_after_an_error_before_the_next_experience() -> None:
    plugin, boom, stream = LancePlugin(threshold=0.9), Boom(1), class_stream()
    strategy = Naive(plugins=[plugin, boom], **settings(MultiHead()))
    experiences = list(stream.train_stream)
    strategy.train(experiences[0])
    with pytest.raises(KeyboardInterrupt):
        strategy.train(experiences[1])
    boom.experience = None
    strategy.train(experiences[1])
    assert not is_swapped(strategy.model)
    assert plugin.session.experience == 2


REHEARSING = [ReplayPlugin(mem_size=20), MIRPlugin(8), RARPlugin(batch_size_mem=8)]


@pytest.mark.parametrize("other", REHEARSING, ids=lambda plugin: type(plugin).__name__)
def test_replay_beside_the_plugin_is_refused(other: Any) -> None:
    strategy = Naive(plugins=[LancePlugin(), other], **settings(MultiHead()))
    with pytest.raises(StateError, match=f"{type(other).__name__} beside LANCE is not supported"):
        strategy.train(next(iter(class_stream().train_stream)))
    assert not is_swapped(strategy.model)


@pytest.mark.parametrize("verbose", [True, False])
def test_a_table_is_printed_after_each_experience(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = LanceStrategy(verbose=verbose, **settings(MultiHead()))
    for experience in list(class_stream().train_stream)[:2]:
        strategy.train(experience)
        printed = capsys.readouterr().out
        assert (strategy.lance.session.table() in printed) == verbose
        assert ("body.0" in printed) == verbose


def test_each_experience_is_evaluated_with_its_own_columns_also_in_mixed_batches() -> None:
    torch.manual_seed(0)
    network = MultiHead()
    network.classifier = MultiHeadClassifier(32, 2, masking=False)  # masks know a single task
    strategy, stream = LanceStrategy(columns=0.1, **settings(network)), class_stream()
    for experience in stream.train_stream:
        strategy.train(experience)
    session, model = strategy.lance.session, strategy.model
    assert session.rule.names == ["0", "1", "2"]
    assert session.rule.bytes > 0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Outputs(SupervisedPlugin):  # type: ignore[misc]
        def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
            seen.append((strategy.mb_x.clone(), strategy.mb_task_id.clone(), strategy.mb_output.clone()))

    strategy.plugins.append(Outputs())
    strategy.eval(stream.test_stream)
    everything = concat_datasets([found.dataset for found in stream.test_stream])
    mixed = with_classes_timeline(with_task_labels(benchmark_from_datasets(test=[everything])))
    strategy.eval(mixed.test_stream)
    assert any(len(labels.unique()) > 1 for _, labels, _ in seen)
    for inputs, labels, outputs in seen:
        for label in labels.unique():
            rows = labels == label
            expected = session.export(model, str(int(label))).eval()(inputs[rows], labels[rows])
            assert torch.allclose(outputs[rows][:, : expected.shape[1]], expected, atol=1e-5)
    shared = model.eval()(seen[-1][0], seen[-1][1])
    assert not torch.allclose(shared, seen[-1][2], atol=1e-4)
    assert "forward" not in vars(strategy)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_plugin_keeps_the_promise_beside_others() -> None:
    plugin, stream = LancePlugin(threshold=0.9), class_stream()
    watch = Watch(plugin)
    strategy = Naive(plugins=[plugin, EWCPlugin(ewc_lambda=0.1), watch], **settings(MultiHead()))
    matrix = learn(strategy, stream)
    assert watch.checked
    assert set(watch.moved) == {"body.0", "body.5"}
    assert min(matrix[2]) > 0.8


class Projected(SupervisedPlugin):  # type: ignore[misc]
    """Names of the layers whose input is projected, in each experience."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[set[str]] = []

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        compression = strategy.lance.session.compression
        assert compression is not None
        self.names.append(set(compression.layers))


def test_the_published_method_is_one_word() -> None:
    model, watch, projected = MultiHead(), Watch(), Projected()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    more = {**settings(model), "optimizer": optimizer, "plugins": [watch, projected], "train_epochs": 2}
    strategy = LanceStrategy(preset="published", threshold=0.9, heads="classifier", **more)
    alone = LancePlugin(preset="published", threshold=0.9, heads="classifier")
    assert strategy.lance.session.config == alone.session.config
    learn(strategy, class_stream())
    # Nothing at first; later the body, and never a head.
    assert projected.names == [set()] * 2 + [{"body.0", "body.5"}] * 4
    assert set(watch.checked) == {"body.0", "body.5"}
    assert not strategy.lance.session.rule.names
    with pytest.raises(ConfigError, match=r"rank=4 contradicts preset='published'"):
        LancePlugin(preset="published", rank=4)


def test_calibration_leaves_no_trace_in_random_states_and_statistics() -> None:
    """With nothing compressed and nothing protected yet, a first experience is that of the stock strategy."""
    results = []
    for kind in (Naive, LanceStrategy):
        torch.manual_seed(0)
        more: dict[str, Any] = {"rank": None, "bits": None} if kind is LanceStrategy else {}
        model = MultiHead()
        more["optimizer"] = torch.optim.SGD(model.parameters(), 0.01)
        strategy = kind(**settings(model, **more))
        strategy.train(next(iter(class_stream().train_stream)))
        results.append(strategy.model.state_dict())
    for key, value in results[0].items():
        assert torch.allclose(results[1][key], value, atol=1e-6), key


def test_a_full_layer_is_frozen_and_said_once() -> None:
    strategy, stream = LanceStrategy(threshold=1.0, rule="threshold", **settings(MultiHead())), class_stream()
    experiences = list(stream.train_stream)
    strategy.train(experiences[0])
    before = strategy.model.body[0].weight.detach().clone()
    with pytest.warns(LanceWarning, match=r"body.0: \d+ of \d+ directions are protected; its weight is frozen"):
        strategy.train(experiences[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="body.0")
        strategy.train(experiences[2])
    assert torch.equal(strategy.model.body[0].weight, before)


class NormHead(MultiHead):
    """Holds what no basis protects."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, inputs: Tensor, task_labels: Any) -> Tensor:
        return self.classifier(self.body(inputs) * self.scale, task_labels)


def test_what_cannot_be_protected_is_frozen_and_named() -> None:
    strategy, stream = LanceStrategy(threshold=0.9, rule="threshold", **settings(NormHead())), class_stream()
    experiences = list(stream.train_stream)
    strategy.train(experiences[0])
    before = {key: value.clone() for key, value in strategy.model.state_dict().items()}
    with pytest.warns(LanceWarning, match="no basis can protect them: scale"):
        strategy.train(experiences[1])
    after = strategy.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    # The first head is not used any more; the second one is new.
    assert changed == {"body.0.weight", "body.5.weight"}
    assert "classifier.classifiers.1.classifier.weight" in after


def test_the_evaluator_sees_the_same_accuracy_before_and_after_the_end_of_an_experience() -> None:
    """Folding the reserved update into the weight changes nothing."""
    stream, seen = class_stream(), []

    class Probe(SupervisedPlugin):  # type: ignore[misc]
        inputs = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))

        def note(self, strategy: Any) -> None:
            training = strategy.model.training
            strategy.model.eval()
            with torch.no_grad():
                seen.append(strategy.model.body(self.inputs))
            strategy.model.train(training)

        def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            self.note(strategy)

        def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            self.note(strategy)

    strategy = LanceStrategy(
        plugins=[Probe()], threshold=0.9, rule="threshold", **settings(MultiHead(), evaluator=evaluator())
    )
    strategy.train(stream.train_stream)  # several experiences in one call
    assert strategy.lance.session.experience == 3
    assert not is_swapped(strategy.model)
    for experience in range(3):
        last_epoch, folded = seen[(EPOCHS + 1) * (experience + 1) - 2], seen[(EPOCHS + 1) * (experience + 1) - 1]
        assert torch.allclose(last_epoch, folded, atol=1e-5)
    assert not torch.allclose(seen[EPOCHS], seen[2 * EPOCHS], atol=1e-3)
