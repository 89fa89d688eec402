"""Data sets as arrays or from disk, and what happens to a batch of them on the device."""

from flax_resnet.data.augment import augment, normalize
from flax_resnet.data.batches import EvalBatches, TrainBatches, epoch_order, stream
from flax_resnet.data.datasets import Dataset, Source, channel_statistics, load_dataset

__all__ = [
    "Dataset",
    "EvalBatches",
    "Source",
    "TrainBatches",
    "augment",
    "channel_statistics",
    "epoch_order",
    "load_dataset",
    "normalize",
    "stream",
]
