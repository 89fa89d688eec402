"""Data sets as arrays or from disk, and what happens to a batch of them on the device."""

from flax_resnet.data.augment import augment, normalize
from flax_resnet.data.batches import EvalBatches, TrainBatches, epoch_order, stream
from flax_resnet.data.datasets import Dataset, Source, channel_statistics, load_dataset
from flax_resnet.data.erasing import erase
from flax_resnet.data.examples import Examples, ExampleSource
from flax_resnet.data.folders import Folder
from flax_resnet.data.mixing import mix
from flax_resnet.data.photos import Photos, without_bad
from flax_resnet.data.pictures import Sizing

__all__ = [
    "Dataset",
    "EvalBatches",
    "ExampleSource",
    "Examples",
    "Folder",
    "Photos",
    "Sizing",
    "Source",
    "TrainBatches",
    "augment",
    "channel_statistics",
    "epoch_order",
    "erase",
    "load_dataset",
    "mix",
    "normalize",
    "stream",
    "without_bad",
]
