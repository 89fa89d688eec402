"""Plans of runs without a folder, for tests of what is made of them."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax

import flax_resnet as fr
from flax_resnet.data import channel_statistics
from flax_resnet.training import cross_entropy, make_optimizer
from flax_resnet.training.data import Data
from flax_resnet.training.mesh import make_mesh
from flax_resnet.training.plan import Plan

# Small, so that it compiles fast: a block that keeps the shape and one that changes it.
MODEL = fr.ResNet(
    fr.BasicBlock, (1, 1), num_classes=10, widths=(8, 16), strides=(1, 2), cifar_stem=True
)


def planned(config, train=None, test=None, *, model=MODEL, devices=1, **fields):
    """A plan on the first devices, of one random batch if not of other data."""
    if train is None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (config.batch_size, 8, 8, 3), dtype=np.uint8)
        train = fr.Dataset(images, np.zeros(len(images), np.int32), tuple("abcdefghij"))
    learning_rate = optax.constant_schedule(config.learning_rate)
    usual = {
        "config": config,
        "workdir": Path("nowhere"),
        "brought": {},
        "mesh": make_mesh(config.batch_size, config.accumulation_steps, jax.devices()[:devices]),
        "data": Data(
            train, test or train, *channel_statistics([train.images]), "random", is_resident=True
        ),
        "model": model,
        "initial": {},
        "loss": partial(cross_entropy, label_smoothing=config.label_smoothing),
        "test_loss": cross_entropy,
        "augment": None,
        "optimizer": make_optimizer(config, learning_rate),
        "learning_rate": learning_rate,
        "total_steps": 1000,
    }
    return Plan(**usual | fields)
