"""A colour stream without a download: characters of the fonts that matplotlib ships, on cluttered backgrounds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.streams.experiences import Experience, benchmark

SIZE = 32
CANVAS = 48
FONTS = (
    "DejaVuSans",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
)
# Characters that differ in shape, not only in size, and that each of the fonts has.
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghmnqrty23456789ΓΔΘΛΞΠΣΦΨΩαγδεζηθλμξπστφψωБДЖИЛЦЧШЫЭЮЯ&@#%$?!+=§¶€£∞√"


@functools.cache
def glyph_masks() -> Tensor:
    """Every character in every font, white on black: `(characters, fonts, 48, 48)` in [0, 1]."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masks = torch.empty(len(CHARACTERS), len(FONTS), CANVAS, CANVAS)
    for column, name in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 30)
        for row, character in enumerate(CHARACTERS):
            image = Image.new("L", (CANVAS, CANVAS))
            ImageDraw.Draw(image).text((CANVAS / 2, CANVAS / 2), character, fill=255, font=font, anchor="mm")
            masks[row, column] = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return masks


@dataclass(frozen=True)
class Scene:
    """What the images of one experience have in common.

    Attributes:
        turn: rotation of the characters, radians.
        ink: their colour relative to the background, unit vector `(3,)`.
        paper: mean colour of the background, `(3,)`.
        stripes: direction and frequency of a pattern behind them, radians per half image.
    """

    turn: float
    ink: Tensor
    paper: Tensor
    stripes: tuple[float, float]

    @classmethod
    def draw(cls, generator: torch.Generator) -> Scene:
        """A random scene."""
        ink = torch.randn(3, generator=generator)
        paper = torch.randn(3, generator=generator)
        turn, direction, frequency = torch.rand(3, generator=generator).tolist()
        return cls(2 * math.pi * turn, ink / ink.norm(), paper, (math.pi * direction, 4 + 8 * frequency))


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _transform(masks: Tensor, turn: float, generator: torch.Generator) -> Tensor:
    """A turn, and random rotation, scale, shear and shift around it: `(n, 48, 48)` to `(n, 32, 32)`."""
    count = len(masks)
    angle = turn + _uniform((count,), -math.pi / 9, math.pi / 9, generator)
    scale = _uniform((count, 2), 0.7, 1.0, generator)
    shear = _uniform((count,), -0.25, 0.25, generator)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    slant = torch.eye(2).repeat(count, 1, 1)
    slant[:, 0, 1] = shear
    matrix = (rotation @ slant) * scale[:, None, :] * (SIZE / CANVAS)
    shift = _uniform((count, 2, 1), -0.12, 0.12, generator)
    grid = F.affine_grid(torch.cat([matrix, shift], 2), [count, 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0].clamp_(0, 1)


def _backgrounds(count: int, scene: Scene, generator: torch.Generator) -> Tensor:
    """Smooth random colour fields with the stripes of a scene, `(n, 3, 32, 32)`."""
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    field = 0.3 * F.interpolate(coarse, (SIZE, SIZE), mode="bilinear", align_corners=True)
    axis = torch.linspace(-1, 1, SIZE)
    direction = scene.stripes[0] + 0.1 * torch.randn(count, 1, 1, generator=generator)
    phase = _uniform((count, 1, 1), 0, 2 * math.pi, generator)
    along = direction.cos() * axis[None, None, :] + direction.sin() * axis[None, :, None]
    wave = (scene.stripes[1] * along + phase).sin()[:, None]
    colour = scene.paper[:, None, None] + 0.3 * torch.randn(count, 3, 1, 1, generator=generator)
    return field + colour + wave * 0.4 * torch.randn(count, 3, 1, 1, generator=generator)


def render(characters: Tensor, scene: Scene, generator: torch.Generator, noise: float = 0.2) -> Tensor:
    """One random image of each character in a scene, standardised.

    Font, place, size, slant, colours, background and pixel noise are drawn anew for each image.

    Args:
        characters: indices into :data:`CHARACTERS`, shape `(n,)`.
        scene: what the images have in common.
        generator: source of all randomness.
        noise: standard deviation of the pixel noise, in units of the standard deviation of an ink's colour channels.

    Returns:
        `(n, 3, 32, 32)`, each image of zero mean and unit variance.
    """
    count = len(characters)
    fonts = torch.randint(len(FONTS), (count,), generator=generator)
    mask = _transform(glyph_masks()[characters, fonts], scene.turn, generator)[:, None]
    background = _backgrounds(count, scene, generator)
    colour = scene.ink[:, None, None] * _uniform((count, 1, 1, 1), 1.2, 2.2, generator)
    colour = colour + 0.2 * torch.randn(count, 3, 1, 1, generator=generator)
    image = background + mask * colour + noise * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (image - image.mean((1, 2, 3), keepdim=True)) / image.std((1, 2, 3), keepdim=True)


def split_glyphs(
    experiences: int = 10,
    seed: int = 0,
    train_per_class: int = 60,
    test_per_class: int = 20,
    multi_head: bool = True,
) -> Any:
    """Ten characters per experience in an order drawn from the seed, each experience in a scene of its own.

    Args:
        experiences: length of the stream, at most 10.
        seed: of the order of the characters, of the scenes and of every image.
        train_per_class: training images of each character.
        test_per_class: test images of each character.
        multi_head: see :func:`examples.streams.experiences.benchmark`.
    """
    most = len(CHARACTERS) // 10
    if not 1 <= experiences <= most:
        raise ValueError(f"experiences={experiences}: there are {len(CHARACTERS)} characters, so 1 to {most}.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(CHARACTERS), generator=generator)[: 10 * experiences].view(experiences, 10)
    parts: tuple[list[Experience], list[Experience]] = ([], [])
    for classes in order:
        scene = Scene.draw(generator)
        for part, per_class in zip(parts, (train_per_class, test_per_class), strict=True):
            characters = classes.repeat_interleave(per_class)
            # In pieces, so that the intermediate images stay in the processor's cache.
            images = torch.cat([render(piece, scene, generator) for piece in characters.split(64)])
            part.append((images, characters))
    return benchmark(*parts, multi_head)
