"""Class activation maps of a run's pictures, and how they are shown."""

from collections.abc import Callable

import jax
import matplotlib
import numpy as np
from PIL import Image

from flax_resnet.data import normalize
from flax_resnet.models import VGG, ResNet, ResNet9, class_activation_maps
from flax_resnet.runs import Run

# How much of a picture the hottest place hides.
_OPACITY = 0.75


def has_maps(run: Run) -> bool:
    """Whether `class_activation_maps` knows the run's model."""
    return isinstance(run.model, ResNet | ResNet9 | VGG)


def make_mapper(run: Run) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The compiled way from pixels and classes to maps.

    Args:
      run: whose model and variables it uses; see `has_maps`.

    Returns:
      images, uint8 [n, H, W, C], and classes, int [n] -> maps, float32 [n, H', W'].
    """

    @jax.jit
    def program(variables, images, classes):
        images = normalize(images, run.mean, run.std)
        return class_activation_maps(run.model, variables, images, classes)

    return lambda images, classes: np.asarray(program(run.variables, images, classes))


def heat(activation: np.ndarray, most: float) -> np.ndarray:
    """A map as colours to lay on its picture.

    Args:
      activation: float [h, w]; what is negative speaks against the class, and is not shown.
      most: what counts as hottest.

    Returns:
      uint8 [h, w, 4], RGBA.
    """
    share = np.clip(activation / max(most, 1e-12), 0, 1)
    colors = matplotlib.colormaps["plasma"](share)
    colors[..., 3] = _OPACITY * share
    return (255 * colors).round().astype(np.uint8)


def beside_its_map(image: np.ndarray, activation: np.ndarray, size: int) -> Image.Image:
    """A picture, and to its right the same under its map, in RGB.

    Args:
      image: uint8 [H, W, C] with C 1 or 3.
      activation: float [h, w].
      size: that the longer side of each has at least; a small picture is enlarged by a whole
        number, every pixel a square.
    """
    height, width = image.shape[:2]
    scale = max(1, -(-size // max(height, width)))
    shape = (width * scale, height * scale)
    picture = Image.fromarray(image.squeeze()).convert("RGBA")
    picture = picture.resize(shape, Image.Resampling.NEAREST)
    colors = Image.fromarray(heat(activation, activation.max()))
    mapped = Image.alpha_composite(picture, colors.resize(shape, Image.Resampling.BILINEAR))
    both = Image.new("RGB", (2 * shape[0], shape[1]))
    both.paste(picture.convert("RGB"), (0, 0))
    both.paste(mapped.convert("RGB"), (shape[0], 0))
    return both
