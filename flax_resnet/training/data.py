"""The two splits of a run: in memory where they fit there, else on disk."""

import contextlib
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from flax_resnet.data import (
    Dataset,
    EvalBatches,
    Examples,
    ExampleSource,
    Source,
    channel_statistics,
    checked,
    stream,
)
from flax_resnet.errors import InputError
from flax_resnet.training.config import Config
from flax_resnet.training.hardware import host_memory

# The rest of the memory is for activations, gradients and the optimizer.
_SHARE_OF_MEMORY = 0.25

Split = Dataset | Source | ExampleSource


@dataclass(frozen=True)
class Data:
    """The two splits of a run.

    Attributes:
      train, test: both in memory, or both to be streamed.
      mean, std: of the training images' channels, in units of full white.
      name: of the data set.
    """

    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str

    @property
    def is_resident(self) -> bool:
        """Whether both lie in memory, and are to lie in that of every device."""
        return isinstance(self.train, Dataset) and isinstance(self.test, Dataset)


def open_data(
    config: Config, mesh: Mesh, own: tuple[Dataset | Examples, Dataset | Examples] | None = None
) -> Data:
    """Loads the splits of a run, or only opens them where they do not fit.

    Args:
      config: names them.
      mesh: whose memory counts.
      own: (train, test) in place of those of the config.

    Raises:
      InputError: if they cannot be read, do not belong together, or are to be streamed and
        cannot.
    """
    if own is None:
        name = config.dataset
        train, test = (
            Source(
                name,
                split,
                config.data_dir,
                label_key=config.label_key,
                channels=config.channels,
            )
            for split in (config.train_split, config.eval_split)
        )
    else:
        train, test = map(_open_own, own)
        name = " and ".join(dict.fromkeys(type(split).__name__ for split in own))
    for what in ("image_shape", "class_names"):
        ours, theirs = getattr(train, what), getattr(test, what)
        if ours != theirs:
            raise InputError(f"{what} of {name}: {ours} in training, {theirs} in the test split")

    if _fits(config, mesh, train, test):
        train, test = (s if isinstance(s, Dataset) else s.load() for s in (train, test))
        chunks = np.array_split(train.images, max(1, len(train) // 1024))
        return Data(train, test, *channel_statistics(chunks), name)
    for split in (train, test):
        if isinstance(split, Source) and not split.can_be_streamed:
            raise InputError(
                f"{name} cannot be streamed from TFRecord files: prepare it with "
                "file_format='array_record', or set --config.data_feed=resident"
            )
    batches = EvalBatches(train, min(config.eval_batch_size, len(train)), slice(None))
    with contextlib.closing(stream(batches, config.stream_workers)) as read:
        statistics = channel_statistics(b["image"][b["mask"]] for b in read)
    return Data(train, test, *statistics, name)


def _open_own(split: Dataset | Examples) -> Dataset | ExampleSource:
    return checked(split) if isinstance(split, Dataset) else ExampleSource(split)


def _fits(config: Config, mesh: Mesh, train: Split, test: Split) -> bool:
    """Whether the splits are to lie in memory."""
    if config.data_feed != "auto":
        return config.data_feed == "resident"
    cannot_be_streamed = isinstance(train, Source) and not train.can_be_streamed
    return cannot_be_streamed or train.nbytes + test.nbytes <= _SHARE_OF_MEMORY * _memory(mesh)


def _memory(mesh: Mesh) -> int:
    """Bytes of a device's memory, or of the host's where that is what the device has."""
    stats = mesh.local_devices[0].memory_stats() or {}
    return stats.get("bytes_limit", host_memory())
