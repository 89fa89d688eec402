"""Augmentation and normalisation of a batch, on the device, inside the compiled step."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float32, Int, Key, Shaped


def augment(
    images: Shaped[ArrayLike, "n h w c"],
    index: Int[ArrayLike, " n"],
    key: Key[Array, ""],
    *,
    crop_padding: int,
    flip: bool,
) -> Shaped[Array, "n h w c"]:
    """A random crop and a random horizontal flip of each image.

    What an image becomes depends on `key` and its own index alone, so not on the batch
    that it stands in or on the number of devices.

    Args:
      images: [N, H, W, C], any dtype; uint8 is cheapest to move.
      index: int32 [N], the place of each image in the data set.
      key: of the seed and the epoch.
      crop_padding: black pixels added on every side before a crop of H x W, at a place
        uniform over all (2 * crop_padding + 1) ** 2; 0 for none. Like torchvision's
        RandomCrop(H, padding=crop_padding), before normalisation.
      flip: whether half of the images are mirrored left to right.

    Returns:
      Images of the same shape and dtype.
    """
    images, index = jnp.asarray(images), jnp.asarray(index)
    keys = jax.vmap(partial(jax.random.fold_in, key))(index)
    # One draw of 32 bits for each decision: row, column, side.
    row, column, side = jax.vmap(partial(jax.random.bits, shape=(3,)))(keys).T
    if crop_padding:
        places = 2 * crop_padding + 1
        pad = (crop_padding, crop_padding)
        padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
        crop = partial(jax.lax.dynamic_slice, slice_sizes=images.shape[1:])
        start = (jnp.int32(row % places), jnp.int32(column % places), jnp.zeros_like(index))
        images = jax.vmap(lambda image, *at: crop(image, at))(padded, *start)
    if flip:
        images = jnp.where((side % 2 == 0)[:, None, None, None], images, images[:, :, ::-1])
    return images


def normalize(
    images: Shaped[ArrayLike, "n h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float32[Array, "n h w c"]:
    """float32 (images / 255 - mean) / std.

    Args:
      images: uint8 [N, H, W, C].
      mean, std: of each channel, in units of full white; see `channel_statistics`.
    """
    centre, scale = (255 * jnp.float32(x).reshape(1, 1, 1, -1) for x in (mean, std))
    return (jnp.asarray(images, jnp.float32) - centre) / scale
