"""mixup and cutmix of a batch, on the device, inside the compiled step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from flax_resnet.data.augment import rectangle

_QUANTILES = 4096


def mix(
    images: Float[Array, "n h w c"],
    labels: Int[Array, " n"],
    keys: Key[Array, " n"],
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> tuple[Float[Array, "n h w c"], Int[Array, " n"], Float[Array, " n"]]:
    """Mixes the two images of each pair of neighbours in the batch with each other.

    So no image leaves the device that it is on. The last of an odd number stays. The loss is
    then share * loss(logits, labels) + (1 - share) * loss(logits, other labels), as in both
    papers. Each image has its own share and place, by its own key.

    Args:
      images: [N, H, W, C], normalised.
      labels: int32 [N].
      keys: of each image.
      mixup: alpha of mixup, share * image + (1 - share) * other with share from Beta(alpha,
        alpha); 0 for none. (H. Zhang et al., arXiv:1710.09412, section 2.)
      cutmix: alpha of cutmix, in which a rectangle of the other covers 1 - share of the image,
        less where it goes beyond the edge; 0 for none. (S. Yun et al., arXiv:1905.04899,
        section 3.1.) With both above 0 each image gets one of the two, with equal chances.

    Returns:
      The images, the others' labels, int32 [N], and the shares, float32 [N].
    """
    others, other_labels = _swap_neighbours(images), _swap_neighbours(labels)
    one = partial(_mix_one, mixup=mixup, cutmix=cutmix)
    mixed, share = jax.vmap(one)(images, others, keys)
    return mixed, other_labels, share


def _swap_neighbours(array):
    pairs = array[: len(array) // 2 * 2].reshape(-1, 2, *array.shape[1:])
    swapped = pairs[:, ::-1].reshape(-1, *array.shape[1:])
    return jnp.concatenate([swapped, array[-1:]]) if len(array) % 2 else swapped


def _mix_one(image, other, key, *, mixup, cutmix):
    """An image [H, W, C] mixed, and its share."""
    choice, share_key, place = jax.random.split(key, 3)
    uniform = jax.random.uniform(share_key)
    if not cutmix:
        return _mean(image, other, _beta_quantile(mixup, uniform))
    pasted = _paste(image, other, _beta_quantile(cutmix, uniform), place)
    if not mixup:
        return pasted
    mean = _mean(image, other, _beta_quantile(mixup, uniform))
    takes_mean = jax.random.bernoulli(choice)
    return jax.tree.map(partial(jnp.where, takes_mean), mean, pasted)


def _beta_quantile(alpha, uniform):
    """Of Beta(alpha, alpha), by a table.

    jax.random.beta tries until all images have one: a loop in which devices wait for each other.
    """
    from scipy.special import betaincinv  # a fifth of a second of import

    table = jnp.float32(betaincinv(alpha, alpha, np.linspace(0, 1, _QUANTILES + 1)))
    place = uniform * _QUANTILES
    below = jnp.int32(place)
    return table[below] + (place - below) * (table[below + 1] - table[below])


def _mean(image, other, share):
    return share * image + (1 - share) * other, share


def _paste(image, other, share, key):
    """The image with a rectangle of the other, whose centre is uniform over the pixels."""
    sizes, keys = image.shape[:2], jax.random.split(key)
    centre = jnp.stack(
        [jax.random.randint(one, (), 0, size) for one, size in zip(keys, sizes, strict=True)]
    )
    half = jnp.floor(jnp.int32(sizes) * jnp.sqrt(1 - share)) // 2  # the sides are in proportion
    inside = rectangle(image.shape, centre - half, centre + half)
    return jnp.where(inside, other, image), 1 - inside.mean(dtype=jnp.float32)
