"""A Hugging Face transformer in Lightning, from its configuration alone.

Run it with `python -m examples.huggingface_model`.

Nothing is downloaded: weights are random, and the texts are sequences of numbers. With weights of the Hub, write
`AutoModelForSequenceClassification.from_pretrained(...)` in place of the configuration.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_lance import LanceCallback

LENGTH, WORDS = 64, 200


class Classifier(L.LightningModule):
    """BERT, small; does a text hold more words of the upper half of the vocabulary than of the lower?"""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=LENGTH,
        )
        self.model = BertForSequenceClassification(config)
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        words, labels = batch
        loss = self.model(input_ids=words, labels=labels).loss
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(texts: int) -> DataLoader:
    words = torch.randint(0, WORDS, (texts, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = (words.float().mean(1) > (WORDS - 1) / 2).long()
    return DataLoader(TensorDataset(words, labels), batch_size=32, shuffle=True)


def main(arguments: Sequence[str] | None = None) -> LanceCallback:
    """Returns the callback, with its report."""
    options = parser().parse_args(arguments)
    L.seed_everything(0, verbose=False)
    return trained(Classifier(), options.steps)


def trained(module: Classifier, steps: int) -> LanceCallback:
    """Train, and say how the loss went."""
    callback = LanceCallback()
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(module, loader(1024))
    print(f"loss {float(module.losses[0]):.3f} in the first step, {float(module.losses[-1]):.3f} in the last")
    return callback


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Train a Hugging Face model with LANCE.")
    result.add_argument("--steps", type=int, default=60)
    return result


if __name__ == "__main__":
    main()
