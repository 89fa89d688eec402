"""mixup and cutmix against NumPy and the distributions of their papers."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_resnet.data import mix

N, SIZE = 2000, (12, 16)
OTHERS = np.arange(N) ^ 1


@pytest.fixture(scope="module")
def batch():
    """Images of which each has a colour of its own."""
    colours = np.arange(N, dtype=np.float32)[:, None, None, None]
    images = np.broadcast_to(colours, (N, *SIZE, 2))
    return jnp.asarray(images), jnp.arange(N), jax.random.split(jax.random.key(0), N)


def mixed(batch, **alphas):
    images, other_labels, share = jax.jit(partial(mix, **alphas))(*batch)
    np.testing.assert_array_equal(other_labels, OTHERS)
    return np.asarray(images), np.asarray(share)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_is_the_mean_of_two_images(batch, alpha):
    images, share = mixed(batch, mixup=alpha)
    own = np.arange(N, dtype=np.float64)
    expected = share * own + (1 - share) * own[OTHERS]
    np.testing.assert_allclose(
        images, np.broadcast_to(expected[:, None, None, None], images.shape), rtol=1e-5
    )
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_pastes_a_rectangle_of_the_other(batch):
    images, share = mixed(batch, cutmix=1.0)
    pasted = images[..., 0] != np.arange(N)[:, None, None]
    np.testing.assert_array_equal(images[..., 0], images[..., 1])
    others = np.broadcast_to(OTHERS[:, None, None], pasted.shape)
    np.testing.assert_array_equal(images[..., 0][pasted], others[pasted])
    rows, columns = pasted.any(2), pasted.any(1)
    np.testing.assert_array_equal(pasted, rows[:, :, None] & columns[:, None, :])
    for edge in (rows, columns):  # without a gap
        assert (np.abs(np.diff(edge.astype(int), axis=1)).sum(1) <= 2).all()
    np.testing.assert_allclose(share, 1 - pasted.mean((1, 2)), atol=1e-6)
    # Sides in proportion, where the edge has cut nothing off.
    inside = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1]) & pasted.any((1, 2))
    height, width = rows[inside].sum(1), columns[inside].sum(1)
    assert (np.abs(height / SIZE[0] - width / SIZE[1]) <= 2 / SIZE[0]).all()


def test_cutmix_covers_what_its_paper_says(batch):
    """Mean share, with boxes and centres drawn by NumPy as section 3.1 and its code have them."""
    _, share = mixed(batch, cutmix=1.0)
    rng = np.random.default_rng(0)
    height, width = SIZE
    drawn = []
    for lam in rng.beta(1, 1, 20_000):
        cut = np.sqrt(1 - lam)
        y, x = rng.integers(height), rng.integers(width)
        h, w = int(height * cut) // 2, int(width * cut) // 2
        rows = min(y + h, height) - max(y - h, 0)
        columns = min(x + w, width) - max(x - w, 0)
        drawn.append(1 - rows * columns / (height * width))
    assert share.mean() == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / np.sqrt(N))
    # Rounded, as there are few different areas.
    same: Any = stats.ks_2samp(np.round(np.float64(share), 4), np.round(drawn, 4))
    assert same.pvalue > 0.001


def test_with_both_each_image_gets_one(batch):
    images, _ = mixed(batch, mixup=1.0, cutmix=1.0)
    own, other = np.arange(N)[:, None, None], OTHERS[:, None, None]
    is_mixup = ((images[..., 0] != own) & (images[..., 0] != other)).all((1, 2))
    assert stats.binomtest(int(is_mixup.sum()), N).pvalue > 0.01


def test_what_an_image_becomes_depends_on_its_key_and_neighbour_alone(batch):
    images, labels, keys = batch
    whole, _, share = mix(images[:9], labels[:9], keys[:9], mixup=0.4, cutmix=1.0)
    part, _, part_share = mix(images[4:8], labels[4:8], keys[4:8], mixup=0.4, cutmix=1.0)
    np.testing.assert_array_equal(whole[4:8], part)
    np.testing.assert_array_equal(share[4:8], part_share)
    np.testing.assert_array_equal(whole[8], images[8])


def test_no_image_leaves_its_device(batch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    arrays = jax.device_put([array[:32] for array in batch], sharding)
    program = jax.jit(partial(mix, mixup=0.4, cutmix=1.0), out_shardings=sharding)
    text = str(program.lower(*arrays).compile().as_text())
    assert not re.search("collective-permute|all-gather|all-to-all|all-reduce", text)
