"""Data sets as arrays, and what happens to a batch of them on the device."""

from flax_resnet.data.augment import augment, normalize
from flax_resnet.data.datasets import Dataset, channel_statistics, load_dataset

__all__ = ["Dataset", "augment", "channel_statistics", "load_dataset", "normalize"]
