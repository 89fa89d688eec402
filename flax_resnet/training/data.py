"""The two splits of a run: in memory where they fit there, else on disk."""

import contextlib
import math
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flax_resnet.data import (
    Dataset,
    EvalBatches,
    Examples,
    ExampleSource,
    Folder,
    Photos,
    Sizing,
    Source,
    TrainBatches,
    channel_statistics,
    stream,
    without_bad,
)
from flax_resnet.errors import InputError
from flax_resnet.progress import say, warn
from flax_resnet.training import hosts
from flax_resnet.training.config import FOLDER, Config, numbers_of
from flax_resnet.training.hardware import host_memory
from flax_resnet.training.jsonfiles import read_json, user_path
from flax_resnet.training.mesh import platform

_SHARE_OF_MEMORY = 0.25
_SMALLEST_DEVICE = 4 << 30
_BYTES_AT_ONCE = 4 << 20  # four times as many where they are squared
# Of ImageNet's training images, as torchvision and timm have them.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OF_RESNETV2 = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # as timm has them in resnetv2.py

Split = Dataset | Source | ExampleSource | Photos
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Data:
    """The two splits of a run.

    Attributes:
      train, test: in memory, or to be streamed.
      mean, std: that images are normalised by, of each channel, of pixels from 0 to 1.
      name: of the data set.
      is_resident: whether both lie in memory, and are to lie in that of every device.
      facts: further entries of dataset.json: of what files it is, and how many were left out.
    """

    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    is_resident: bool
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Room:
    """Bytes that data may take: the rest is for activations, gradients and the optimizer.

    Attributes:
      device: in the memory of every device.
      host: in this process's share of the host's.
    """

    device: int
    host: int


def find_room(mesh: Mesh) -> Room:
    """The same on all hosts, which are to decide alike."""
    hosts.wait_for_all("room")
    host = host_memory() // hosts.count_here()
    if platform(mesh) == "cpu":  # whose memory is the host's, and each device has a part
        device = host // len(mesh.local_devices)
    else:
        stats = mesh.local_devices[0].memory_stats() or {}  # an allocator may not tell
        device = stats.get("bytes_limit", _SMALLEST_DEVICE)
    return Room(*(int(_SHARE_OF_MEMORY * memory) for memory in hosts.minimum((device, host))))


def open_data(
    config: Config,
    workdir: Path,
    room: Room,
    own: tuple[Dataset | Examples, Dataset | Examples] | None = None,
) -> Data:
    """Loads the splits of a run, or only opens them where they do not fit.

    Args:
      config: names them.
      workdir: of the run, which may have begun.
      room: for the data.
      own: (train, test) in place of those of the config.

    Raises:
      InputError: if they cannot be read, do not belong together, or are to be streamed and
        cannot.
    """
    facts: dict[str, Any] = {}
    if own is None:
        name = config.dataset
        if name.startswith(FOLDER):
            name = FOLDER + os.path.basename(os.path.realpath(name.removeprefix(FOLDER)))
        train, facts["train"] = open_split(config, config.train_split, training=True)
        test, facts["test"] = open_split(config, config.eval_split)
    else:
        train, test = map(open_own, own)
        name = " and ".join(dict.fromkeys(type(split).__name__ for split in own))
    facts = {what: about for what, about in facts.items() if about}
    for what in ("image_shape", "class_names"):
        ours, theirs = getattr(train, what), getattr(test, what)
        if ours != theirs:
            hint = ""
            if what == "image_shape" and own is None:
                hint = "; --config.image_size=224 --config.crop=resized brings them to one"
            raise InputError(
                f"{what} of {name}: {ours} in training, {theirs} in the test split{hint}"
            )

    if len(train.class_names) == 1:
        warn(f"all images of {name} are of one class, {train.class_names[0]}")
    crops = isinstance(train, Photos) and train.random_crops
    is_resident = not crops and _fits(config, room, train, test)
    if is_resident:
        train, test = map(_load, (train, test))
    else:
        for split in (train, test):
            if isinstance(split, Source) and not split.can_be_streamed:
                raise InputError(
                    f"{name} cannot be streamed from TFRecord files: prepare it with "
                    "file_format='array_record', or set --config.data_feed=resident"
                )
        # Pictures would else be decoded again in every epoch and every evaluation.
        if config.data_feed != "stream":
            if test.nbytes <= room.host:
                test = _load(test)
            if isinstance(train, Photos) and train.estimate_kept() <= room.host:
                train = train.keeping()
    mean, std = _normalization(config, workdir, train, facts)
    return Data(train, test, mean, std, name, is_resident, facts)


def open_split(
    config: Config, split: str, *, training: bool = False, data_dir: str | None = None
) -> tuple[Source | Photos, dict[str, Any]]:
    """A split that a config names, and what dataset.json says of it.

    Args:
      config: names the data set.
      split: see `Source` and `Folder`.
      training: whether training reads it.
      data_dir: folder of TFDS, or the folder of pictures, if not the config's.

    Raises:
      InputError: if it cannot be read.
    """
    facts: dict[str, Any] = {}
    if config.dataset.startswith(FOLDER):
        sizes = sizing(config, config.channels or 3)
        pictures = Folder(data_dir or config.dataset.removeprefix(FOLDER), split)
        pictures, left_out = without_bad(pictures, skip=config.bad_images == "skip")
        facts = {"files": pictures.fingerprint(), "bad_images": left_out}
    else:
        if training and config.bad_images == "skip":
            raise InputError("bad_images='skip' is for a folder of pictures")
        pictures = Source(
            config.dataset,
            split,
            data_dir or config.data_dir,
            label_key=config.label_key,
            channels=config.channels,
        )
        if config.image_size is None:
            return pictures, facts
        if not pictures.can_be_streamed:
            raise InputError(
                f"image_size needs ArrayRecord files, and those of {config.dataset} are TFRecord: "
                "prepare it with file_format='array_record'"
            )
        sizes = sizing(config, pictures.image_shape[2])
    crops = training and config.crop == "resized"
    return Photos(pictures, sizes, random_crops=crops), facts


def sizing(config: Config, channels: int) -> Sizing:
    """How the pictures of a run with `image_size` come to it.

    Raises:
      InputError: if they are to have another number of channels than 1 or 3.
    """
    if channels not in (1, 3):
        raise InputError(f"with image_size pictures have 1 or 3 channels, not {channels}")
    size = config.image_size
    assert size is not None
    return Sizing(
        image_size=size,
        eval_resize=config.eval_resize or round(size / 0.875),
        interpolation=config.interpolation,
        channels=channels,
        crop_area=(config.crop_area[0], config.crop_area[1]),
        crop_ratio=(config.crop_ratio[0], config.crop_ratio[1]),
        auto_augment=config.auto_augment,
    )


def read_ahead(
    batches: TrainBatches | EvalBatches, config: Config
) -> Generator[dict[str, np.ndarray]]:
    """Every batch in turn, see `stream`, by as many processes or threads as suit the split."""
    split, workers = batches.source, -(-config.stream_workers // hosts.count_here())
    if isinstance(split, Dataset):  # which another process would be given whole
        return stream(batches, 0)
    if isinstance(split, Photos) and split.keeps:  # in memory, which threads share
        return stream(batches, 0, threads=max(1, workers))
    return stream(batches, workers)


def open_own(split: Dataset | Examples) -> Dataset | ExampleSource:
    """A split of a script's own.

    Raises:
      InputError: if it cannot be used, or is empty.
    """
    if not isinstance(split, Dataset):
        return ExampleSource(split)
    if not len(split):
        raise InputError("an fr.Dataset has no examples")
    labels = np.asarray(split.labels, np.int32)
    return Dataset(np.asarray(split.images), labels, tuple(split.class_names))


def _load(split: Split) -> Dataset:
    return split if isinstance(split, Dataset) else split.load()


def _fits(config: Config, room: Room, train: Split, test: Split) -> bool:
    """Whether the splits are to lie in memory."""
    if config.data_feed != "auto":
        return config.data_feed == "resident"
    cannot_be_streamed = isinstance(train, Source) and not train.can_be_streamed
    # The host decodes them.
    return cannot_be_streamed or train.nbytes + test.nbytes <= min(room.device, room.host)


# Normalisation.


def _normalization(
    config: Config, workdir: Path, train: Split, facts: Mapping[str, Any]
) -> Statistics:
    """(mean, std), as `config.normalize` says."""
    channels, chosen = train.image_shape[2], numbers_of(config.normalize)
    begun = workdir / "dataset.json"
    stored = read_json(begun) if begun.exists() else None
    if config.normalize == "imagenet":
        chosen = _IMAGENET
    elif config.normalize == "auto" and config.init_from:
        chosen = _of_source(config) if stored is None else _stored(stored, begun)
    if chosen is None:  # those of the data
        if stored is None or "train" not in facts or stored.get("train") != facts["train"]:
            return _measure(config, train)
        chosen = _stored(stored, begun)  # the same pictures, which need not be read for it
    if len(chosen[0]) != channels:
        raise InputError(
            f"normalize={config.normalize} has numbers for {len(chosen[0])} channels, but the "
            f"images have {channels}: --config.normalize=data has as many"
        )
    return chosen


def _of_source(config: Config) -> Statistics:
    """What the weights were trained with; says so."""
    assert config.init_from
    path = user_path(config.init_from) / "dataset.json"
    if os.path.isdir(path.parent):
        statistics, whose = _stored(read_json(path), path), f"of the run in {config.init_from}"
    else:
        statistics, whose = published_statistics(config.model)
    say(
        f"images are normalised by mean and standard deviation {whose}; "
        "--config.normalize=data takes those of the data"
    )
    return statistics


def published_statistics(model: str) -> tuple[Statistics, str]:
    """Of the images that most published weights of a named net were trained on; in words too."""
    if model.startswith("resnetv2_"):
        return _OF_RESNETV2, "0.5, as timm's weights of such nets want them"
    return _IMAGENET, "of ImageNet's images, as published weights mostly want them"


def _stored(content: Mapping[str, Any], path: Path) -> Statistics:
    try:
        mean, std = (tuple(map(float, content[key])) for key in ("mean", "std"))
        if len(mean) != len(std) or not all(map(math.isfinite, mean + std)):
            raise ValueError(mean, std)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is damaged: it does not hold mean and std") from error
    return mean, std


def _measure(config: Config, train: Split) -> Statistics:
    """Over all training images, as they are in evaluation."""
    if isinstance(train, Dataset):
        count = min(len(train), 1 + train.images.nbytes // _BYTES_AT_ONCE)
        return channel_statistics(np.array_split(train.images, count))
    batches = EvalBatches(train, min(config.eval_batch_size, len(train)), slice(None))
    with contextlib.closing(read_ahead(batches, config)) as read:
        return channel_statistics(b["image"][b["mask"]] for b in read)
