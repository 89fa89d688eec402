"""Real CIFAR-10, where it is at hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from flax_resnet.data import channel_statistics, load_dataset

PREPARE = Path(__file__).parents[3] / "shared" / "data" / "prepare_cifar10.py"


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.skipif(not PREPARE.exists(), reason="no real CIFAR-10 beside the checkout")
def test_cifar10_that_tfds_prepared(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare_cifar10", PREPARE)
    assert spec is not None
    assert spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    some = [(split, rows[:5000]) for split, rows in prepare.read_jpeg()]
    monkeypatch.setattr(prepare, "read_jpeg", lambda: some)
    prepare.prepare_tfds(tmp_path, "array_record")

    for split, rows in some:
        ours = load_dataset("cifar10", split, str(tmp_path))
        images = np.stack([prepare.decode(jpeg) for jpeg, _ in rows])
        labels = np.array([label for _, label in rows])
        assert ours.class_names == tuple(prepare.NAMES)
        assert ours.images.shape == images.shape
        # TFDS shuffles: both sides sorted by their pixels.
        orders = [np.argsort([x.tobytes() for x in side]) for side in (ours.images, images)]
        np.testing.assert_array_equal(ours.images[orders[0]], images[orders[1]])
        # Pictures that stand in it twice may have two labels, in either order.
        assert (ours.labels[orders[0]] == labels[orders[1]]).mean() > 0.999
        np.testing.assert_array_equal(np.bincount(ours.labels), np.bincount(labels))
        mean, std = channel_statistics([ours.images])
        np.testing.assert_allclose(mean, images.mean((0, 1, 2)) / 255, rtol=1e-9)
        np.testing.assert_allclose(std, images.std((0, 1, 2)) / 255, rtol=1e-9)
