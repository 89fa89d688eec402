"""RandAugment and TrivialAugment of a picture, by Pillow, in the process that decodes it.

There one or two operations are done to each image. Compiled into the step, as the rest of the
augmentation is, all fourteen would be done to every one of them.

Operations and strengths are those of torchvision's RandAugment and TrivialAugmentWide with their
defaults. What comes in from the sides is black.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

AutoAugment = Literal["none", "randaugment", "trivialaugment"]
OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)

STRONGEST = 30  # of the levels, which begin with 0
_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


@dataclass(frozen=True)
class Strengths:
    """Of the operations at the strongest level; those of lower ones are in proportion.

    Attributes:
      shear: pixels a pixel.
      translate: pixels of an image of that many a side.
      rotate: degrees.
      enhance: how far from 1 the factors of `ImageEnhance` are.
      posterize: bits that are lost.
    """

    shear: float
    translate: Callable[[int], float]
    rotate: float
    enhance: float
    posterize: int


# E. D. Cubuk et al., arXiv:1909.13719, section 3, at the scale of AutoAugment's, and
# S. G. Mueller and F. Hutter, arXiv:2103.10158, table 6 ("Wide").
RAND = Strengths(0.3, lambda side: 150 / 331 * side, 30.0, 0.9, 4)
TRIVIAL = Strengths(0.99, lambda side: 32, 135.0, 0.99, 6)
_RAND_OPERATIONS, _RAND_LEVEL = 2, 9


def auto_augment(
    image: Image.Image, random: np.random.Generator, policy: AutoAugment
) -> Image.Image:
    """An image with the operations that are drawn for it.

    Args:
      image: "L" or "RGB".
      random: of this image in this epoch.
      policy: "randaugment", two operations at level 9 of 30; "trivialaugment", one at a level
        that is drawn too; or "none".
    """
    if policy == "randaugment":
        for _ in range(_RAND_OPERATIONS):
            image = apply(image, *_draw_operation(random), _RAND_LEVEL, RAND)
    elif policy == "trivialaugment":
        level = int(random.integers(STRONGEST + 1))
        image = apply(image, *_draw_operation(random), level, TRIVIAL)
    return image


def _draw_operation(random: np.random.Generator) -> tuple[str, int]:
    """An operation and a direction, 1 or -1, for those that have two."""
    return OPERATIONS[random.integers(len(OPERATIONS))], 1 if random.integers(2) else -1


def apply(
    image: Image.Image, operation: str, direction: int, level: int, strengths: Strengths
) -> Image.Image:
    """An image after an operation.

    Args:
      image: "L" or "RGB".
      operation: one of `OPERATIONS`.
      direction: 1 or -1: to the left or right, darker or brighter, ...
      level: from 0 to `STRONGEST`.
      strengths: at the strongest.
    """

    def at_level(strongest: float) -> float:
        return direction * strongest * level / STRONGEST

    match operation:
        case "shear_x":
            return _affine(image, (1, at_level(strengths.shear), 0, 0, 1, 0))
        case "shear_y":
            return _affine(image, (1, 0, 0, at_level(strengths.shear), 1, 0))
        case "translate_x":
            return _affine(image, (1, 0, -int(at_level(strengths.translate(image.width))), 0, 1, 0))
        case "translate_y":
            return _affine(
                image, (1, 0, 0, 0, 1, -int(at_level(strengths.translate(image.height))))
            )
        case "rotate":
            return image.rotate(at_level(strengths.rotate))
        case "brightness" | "color" | "contrast" | "sharpness":
            return _ENHANCERS[operation](image).enhance(1 + at_level(strengths.enhance))
        case "posterize":
            return ImageOps.posterize(image, 8 - round(strengths.posterize * level / STRONGEST))
        case "solarize":
            return ImageOps.solarize(image, math.ceil(255 - 255 * level / STRONGEST))
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Each pixel from the place that the matrix gives for its own, the nearest pixel there."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)
