"""Residual networks in Flax linen, and a trainer for them."""

from flax_resnet import models
from flax_resnet.data import Dataset, load_dataset
from flax_resnet.errors import InputError
from flax_resnet.models import *  # noqa: F403
from flax_resnet.runs import Run, load_run
from flax_resnet.training import TrainState, default_config, train

__all__ = [
    "Dataset",
    "InputError",
    "Run",
    "TrainState",
    "default_config",
    "load_dataset",
    "load_run",
    "train",
]
__all__ += models.__all__
