"""Small trainings that need no network, from scratch and fine-tuned: what the learning suite runs."""

from __future__ import annotations

from examples.benchmarks.tasks import dense, finetuning, images, sequences
from examples.benchmarks.tasks.task import Task

TASKS: dict[str, Task] = {
    "mlp": images.mlp,
    "digits_cnn": images.digits_cnn,
    "cnn_bn": images.cnn_bn,
    "resnet18": images.resnet18,
    "vit": images.vit,
    "lite0_last4": finetuning.lite0_last4,
    "lite0_digits_last4": finetuning.lite0_digits_last4,
    "lite0_all": finetuning.lite0_all,
    "conv1d": sequences.conv1d,
    "lstm": sequences.lstm,
    "text": sequences.text,
    "unet": dense.unet,
    "autoencoder": dense.autoencoder,
}
