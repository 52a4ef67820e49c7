"""The LightningModule of the fine-tuning experiments: any of the networks, of which the last layers are trained.

    lightning-lance fit --config examples/configs/cifar10_mobilenet_v2.yaml

The recipe of the paper (Apolinario & Roy, arXiv 2509.21617): SGD .05 with momentum .9, annealed by a cosine to 1 % over
50 epochs of batches of 128, gradients clipped at 2, images of 224 pixels, energy .7 in every mode.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from examples.models.by_name import check_network, classifier_of, make_network
from examples.models.selection import select_published


class ImageClassifier(L.LightningModule):
    """A network whose last layers and classifier are trained; the rest is frozen, batch norms in eval mode.

    The network is made at the start of a fit, for the classes of the data: `model` without its classifier, and
    `classifier`.

    Args:
        network: its name, a key of `examples.models.by_name.NETWORKS`.
        last: layers to train beside the classifier, counted from the output: convolutions that are not depthwise, and
            linear layers. `"all"`: everything is trained.
        pretrained: with the ImageNet weights that torchvision or timm downloads, or a package ships.
        weights: a file with such weights instead.
        config: description of a MCUNet, see `examples.models.by_name.make_network`.
        learning_rate: of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        final: fraction of the learning rate at the end of the cosine.
        classes: of the classifier; those of the data by default.

    Attributes:
        normalization: mean and deviation of the channels that the network wants, which the data asks for.

    Raises:
        ValueError: there is no network of that name.
        ConfigError: at the start of a fit, the network has no so many layers.
    """

    def __init__(
        self,
        network: str,
        last: int | Literal["all"] = 2,
        pretrained: bool = True,
        weights: str | None = None,
        config: str | None = None,
        learning_rate: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        final: float = 0.01,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.normalization = check_network(network).normalization
        self.save_hyperparameters()
        self.model: nn.Module | None = None
        if classes is not None:
            self._make(classes)

    def configure_model(self) -> None:
        if self.model is not None:
            return
        data = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "classes", None)
        if classes is None:
            raise ValueError(
                "classes is not given, and the data does not say how many there are. Give classes=N, or a DataModule "
                "with the attribute classes such as examples.data.images.ImageDataModule."
            )
        self._make(classes)

    def _make(self, classes: int) -> None:
        given = self.hparams
        network = make_network(given["network"], classes, given["pretrained"], given["weights"], given["config"])
        # One name for the classifier of every network; it comes last, as in the network itself.
        parent, _, name = classifier_of(network, given["network"]).rpartition(".")
        classifier = network.get_submodule(parent).get_submodule(name)
        setattr(network.get_submodule(parent), name, nn.Identity())
        self.model = network
        self.classifier = classifier
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        if given["last"] != "all":
            network.requires_grad_(False)
            for chosen in select_published(self, given["last"], "classifier"):
                self.get_submodule(chosen).requires_grad_(True)
        self.train(self.training)

    def trained_layers(self) -> dict[str, nn.Module]:
        """Layers beside the classifier whose weight is trained, by name."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.requires_grad and name != "classifier"
        }

    def train(self, mode: bool = True) -> ImageClassifier:
        super().train(mode)
        for module in self.modules():
            frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and frozen:
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        assert self.model is not None
        return self.classifier(self.model(images))

    def loss(self, batch: Any) -> Tensor:
        """Cross-entropy of a batch of images and labels."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("accuracy", self.accuracy, prog_bar=True)

    validation_step = test_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> dict[str, Any]:
        given = self.hparams
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(
            trained, given["learning_rate"], given["momentum"], weight_decay=given["weight_decay"]
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=steps, eta_min=given["final"] * given["learning_rate"]
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
