"""Sequences from scratch: made sounds, the rows of an image, text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from examples.benchmarks.tasks.images import TransformerBlock, mnist
from examples.benchmarks.tasks.task import ACCURACY, NEXT_CHARACTER, Data, Pairs, Task, adamw, sgd
from examples.data.mnist import CLASSES

SOUNDS = 8
LENGTH = 512
NOISE = 1.0

CHARACTERS = 128
"""ASCII; other characters are read as 0."""

CONTEXT = 64


def _sounds(count: int, generator: torch.Generator) -> Pairs:
    """Eight kinds of sound in noise, of random pitch, phase and speed: `(count, 1, 512)` and their kinds."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    kinds = torch.randint(SOUNDS, (count,), generator=generator)
    time = torch.arange(LENGTH) / LENGTH
    pitch, phase, speed = uniform(15, 40), uniform(0, 1), uniform(2, 5)
    turns = pitch * time + phase
    swing = torch.sin(2 * math.pi * (speed * time + phase))
    waves = (
        torch.sin(2 * math.pi * turns),
        torch.sign(torch.sin(2 * math.pi * turns)),
        2 * (turns % 1) - 1,
        torch.sin(2 * math.pi * (turns + pitch * time**2)),
        torch.sin(2 * math.pi * (turns + pitch * (time - time**2))),
        torch.sin(2 * math.pi * turns) * (1 + swing),
        torch.sin(2 * math.pi * (turns + swing)),
        torch.randn(count, LENGTH, generator=generator) * (1 + swing),
    )
    clean = torch.stack(waves)[kinds, torch.arange(count)]
    sounds = clean + NOISE * torch.randn(count, LENGTH, generator=generator)
    return sounds[:, None], kinds


def _sound_data() -> Data:
    generator = torch.Generator().manual_seed(0)
    return Data(_sounds(3000, generator), _sounds(3000, generator))


def _conv1d() -> nn.Module:
    blocks: list[nn.Module] = []
    for before, after in ((1, 32), (32, 48), (48, 64), (64, 64)):
        blocks.append(nn.Sequential(nn.Conv1d(before, after, 9, 2, 4), nn.BatchNorm1d(after), nn.LeakyReLU(0.1)))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, SOUNDS))


class Rows(nn.Module):
    """Reads an image row by row: `(B, 1, 28, 28)` to `(B, classes)`."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(28, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x.squeeze(1))[0][:, -1])  # type: ignore[no-any-return]


def _text_data() -> Data:
    """Python's own documentation, from the package `pydoc_data`: windows of 64 characters and the ones after them."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    codes = torch.tensor([code if (code := ord(character)) < CHARACTERS else 0 for character in text])
    border = int(0.85 * len(codes))
    generator = torch.Generator().manual_seed(0)

    def windows(part: Tensor, count: int) -> Pairs:
        starts = torch.randint(len(part) - CONTEXT - 1, (count,), generator=generator)
        rows = part[starts[:, None] + torch.arange(CONTEXT + 1)]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return Data(windows(codes[:border], 6000), windows(codes[border:], 1000))


class CharacterTransformer(nn.Module):
    """A language model of characters: `(B, L)` codes to `(B, L, characters)`."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, width)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads, causal=True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(codes) + self.places)))  # type: ignore[no-any-return]


conv1d = Task(
    "Conv1d with batch norm, made sounds, SGD",
    _conv1d,
    _sound_data,
    ACCURACY,
    sgd(0.05),
    epochs=4,
    batch=32,
    seeds=6,
    segments=[str(index) for index in range(4)],
)

lstm = Task(
    "LSTM on the rows of images, AdamW",
    Rows,
    mnist,
    ACCURACY,
    adamw(4e-3),
    epochs=6,
    batch=64,
    seeds=6,
    segments=["recurrent"],
    published=False,
)

text = Task(
    "transformer of characters, text, AdamW",
    CharacterTransformer,
    _text_data,
    NEXT_CHARACTER,
    adamw(3e-3),
    epochs=1,
    batch=16,
    seeds=3,
    segments=[f"blocks.{index}" for index in range(3)],
)
