"""Random erasing against the distribution of its paper."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_resnet.data import erase

N, HEIGHT, WIDTH = 3000, 24, 20


def reference(rng):
    """Area of a rectangle that algorithm 1 of arXiv:1708.04896 erases; 0 where none fits."""
    for _ in range(10):
        area = rng.uniform(0.02, 0.33) * HEIGHT * WIDTH
        ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
        h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if h < HEIGHT and w < WIDTH:
            return h, w, rng.integers(0, HEIGHT - h + 1), rng.integers(0, WIDTH - w + 1)
    return 0, 0, 0, 0


def test_rectangles_are_those_of_the_paper():
    keys = jax.random.split(jax.random.key(0), N)
    images = jnp.ones((N, HEIGHT, WIDTH, 2))
    erased = np.asarray(jax.jit(partial(erase, probability=0.6))(images, keys)) == 0
    np.testing.assert_array_equal(erased[..., 0], erased[..., 1])
    erased = erased[..., 0]
    hit = erased.any((1, 2))
    assert stats.binomtest(int(hit.sum()), N, 0.6).pvalue > 0.01
    rows, columns = erased[hit].any(2), erased[hit].any(1)
    np.testing.assert_array_equal(erased[hit], rows[:, :, None] & columns[:, None, :])
    ours = [rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1)]
    rng = np.random.default_rng(0)
    theirs = np.array([reference(rng) for _ in range(N)]).T
    for a, b in zip(ours, theirs, strict=True):
        same: Any = stats.ks_2samp(a, b)
        assert same.pvalue > 1e-3
        assert a.mean() == pytest.approx(b.mean(), abs=5 * b.std() / np.sqrt(len(a)))
    for extreme in (np.min, np.max):  # of the ratio
        of_theirs = extreme(theirs[0, theirs[0] > 0] / theirs[1, theirs[1] > 0])
        assert extreme(ours[0] / ours[1]) == pytest.approx(of_theirs, rel=0.1)
    for lengths, starts in ((ours[0], ours[2]), (ours[1], ours[3])):  # in one piece
        assert (lengths + starts <= max(HEIGHT, WIDTH)).all()


def test_of_none_nothing_is_erased():
    keys = jax.random.split(jax.random.key(0), 50)
    assert (np.asarray(erase(jnp.ones((50, 8, 8, 1)), keys, 0.0)) == 1).all()
