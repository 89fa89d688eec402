"""Random erasing of a batch, on the device, inside the compiled step."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flax_resnet.data.augment import rectangle

# Of torchvision's RandomErasing, as of the paper: the rectangle's share of the image, and its
# height by its width.
_AREA, _RATIO = (0.02, 0.33), (0.3, 3.3)
_ATTEMPTS = 10


def erase(
    images: Float[Array, "n h w c"], keys: Key[Array, " n"], probability: float
) -> Float[Array, "n h w c"]:
    """Puts the mean in place of a rectangle of some images.

    As torchvision's RandomErasing(p): the rectangle has 0.02 to 0.33 of the image's area and a
    ratio of 0.3 to 3.3, and lies within; if none of ten draws fits, nothing is erased. (Z. Zhong
    et al., arXiv:1708.04896, algorithm 1.)

    Args:
      images: [N, H, W, C], normalised, so that the mean is 0.
      keys: of each image.
      probability: share of the images that lose a rectangle.
    """
    return jax.vmap(partial(_erase_one, probability=probability))(images, keys)


def _erase_one(image, key, *, probability):
    """An image [H, W, C]."""
    height, width, _ = image.shape
    takes, areas, ratios, place = jax.random.split(key, 4)
    share = jax.random.uniform(areas, (_ATTEMPTS,), minval=_AREA[0], maxval=_AREA[1])
    area, (low, high) = share * height * width, jnp.log(jnp.float32(_RATIO))
    ratio = jnp.exp(jax.random.uniform(ratios, (_ATTEMPTS,), minval=low, maxval=high))
    h, w = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (h < height) & (w < width)
    first = fits.argmax()
    sides = jnp.stack([h, w])[:, first]
    places = jnp.float32([height, width]) - sides + 1
    start = jnp.floor(jax.random.uniform(place, (2,)) * places)
    inside = rectangle(image.shape, start, start + sides)
    takes_one = fits[first] & jax.random.bernoulli(takes, probability)
    return jnp.where(inside & takes_one, 0, image)
