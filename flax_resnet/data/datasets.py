"""Image data sets from TensorFlow Datasets as arrays, without TensorFlow."""

import contextlib
import hashlib
import io
import logging
import struct
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants
from tensorflow_datasets.core.registered import DatasetNotFoundError
from tqdm import tqdm

from flax_resnet.data.builders import CIFAR10_ARCHIVE, CIFAR10_URL, Cifar10, Digits
from flax_resnet.errors import InputError

logger = logging.getLogger(__name__)

# A tfds.core.DatasetBuilder. TFDS annotates its attributes so widely that a type checker
# rejects every use of them.
_Builder = Any

# How long a server may take to answer before there is no network.
_SECONDS_TO_ANSWER = 8.0


@dataclass(frozen=True)
class Dataset:
    """A split in memory.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N], indices into class_names.
      class_names: one name a class.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def load_dataset(name: str, split: str, data_dir: str | None = None) -> Dataset:
    """Reads a split of a TFDS image classification data set, preparing it if need be.

    `cifar10` and `digits` are prepared without TensorFlow; any other data set with an
    `image` of one size and a `label` is read once it is prepared. The decoded arrays
    are cached beside the TFDS folder, or in the user's cache folder where that cannot
    be written, and read back in well under a second; a cache that is damaged, or older
    than the TFDS folder, is made anew.

    Args:
      name: `cifar10`, `digits` (`flax_resnet.data.builders.Digits`; needs no network),
        or another name of TFDS.
      split: a split string of TFDS: "train", "train[:90%]", "train[10:20]+test".
      data_dir: folder of TFDS; default $TFDS_DATA_DIR, or ~/tensorflow_datasets.

    Raises:
      InputError: if there is no such data set or split, if it is not prepared and
        cannot be, or if its folder is damaged.
    """
    builder = _open(name, data_dir)
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    except (ValueError, KeyError) as error:
        known = ", ".join(builder.info.splits)
        raise InputError(f"{name} has no split {split!r}; it has: {known}") from error

    whole = {name: _load_whole(builder, name) for name in {part.splitname for part in parts}}
    images = [whole[part.splitname][0][part.from_ : part.to] for part in parts]
    labels = [whole[part.splitname][1][part.from_ : part.to] for part in parts]
    dataset = Dataset(
        images[0] if len(parts) == 1 else np.concatenate(images),
        labels[0] if len(parts) == 1 else np.concatenate(labels),
        tuple(builder.info.features["label"].names),
    )
    if not len(dataset):
        raise InputError(f"split {split!r} of {name} is empty")
    return dataset


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, as the seed computes them.

    Args:
      images: uint8 [N, H, W, C].

    Returns:
      (mean, std) in units of full white: of images / 255.
    """
    # Sums of integers are exact, so the variance below loses no digit, and chunks keep
    # a data set of 150 MB from becoming 1.2 GB of float64.
    channels = images.shape[-1]
    count = images.size // channels
    total = np.zeros(channels, np.uint64)
    squares = np.zeros(channels, np.uint64)
    for chunk in np.array_split(images, max(1, len(images) // 1024)):
        total += chunk.sum(0, dtype=np.uint64).sum((0, 1))
        squares += np.square(chunk, dtype=np.uint32).sum(0, dtype=np.uint64).sum((0, 1))
    mean = tuple(int(t) / count / 255 for t in total)
    std = tuple(
        (count * int(q) - int(t) ** 2) ** 0.5 / count / 255
        for t, q in zip(total, squares, strict=True)
    )
    return mean, std


# Opening and preparing a TFDS folder.


def _open(name: str, data_dir: str | None) -> _Builder:
    """A builder whose data is on disk."""
    ours = {"cifar10": Cifar10, "digits": Digits}
    open_builder = ours.get(name, partial(tfds.builder, name))
    try:
        builder: _Builder = open_builder(data_dir=data_dir)
    except DatasetNotFoundError as error:
        raise InputError(
            f"unknown data set {name!r}: use cifar10, digits, or another name of TFDS"
        ) from error
    except Exception as error:  # TFDS lets through whatever its parsers raise
        folder = data_dir or constants.DATA_DIR
        raise InputError(_damaged(name, folder, error)) from error
    if not builder.is_prepared():
        if builder.data_path.exists():
            raise InputError(_damaged(name, builder.data_path, "it has no dataset_info.json"))
        _prepare(builder)
    if not {"image", "label"} <= set(builder.info.features or ()):
        raise InputError(f"data set {name!r} has no image and label to classify")
    return builder


def _damaged(name: str, folder: Any, reason: Any) -> str:
    reason = " ".join(str(reason).split())[:300]
    return f"the TFDS folder {folder} of {name} is damaged: {reason}; delete it and start again"


def _prepare(builder: _Builder) -> None:
    """Runs TFDS's download_and_prepare, after a look whether it can succeed."""
    name, folder = builder.name, Path(builder.data_path).parents[1]
    if isinstance(builder, Cifar10):
        archive = folder / "downloads" / "manual" / CIFAR10_ARCHIVE
        if archive.exists():
            builder.archive = archive
        elif not _reachable(CIFAR10_URL):
            raise InputError(
                f"no data and no network: cifar10 is not in {folder}, and {CIFAR10_URL} cannot be "
                "reached. Either name a folder that has it with --config.data_dir=DIR, or put that "
                f"archive at {archive}, or train on data that needs no download with "
                "--config configs/digits_resnet8.py"
            )
    elif name != "digits" and not _reachable("https://storage.googleapis.com"):
        raise InputError(
            f"no data and no network: {name} is not in {folder}; name a folder that has it with "
            "--config.data_dir=DIR"
        )
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints where it writes to
            builder.download_and_prepare(file_format="array_record")
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"TFDS needs TensorFlow to prepare {name}: run `tfds build {name}` where it is "
            "installed, and name the folder with --config.data_dir=DIR"
        ) from error
    except Exception as error:  # of the disk, the download, its checksum, the examples
        raise InputError(f"{name} cannot be prepared in {folder}: {error}") from error


def _reachable(url: str) -> bool:
    """Whether a server answers at all."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5)
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except OSError:
            pass

    # A daemon thread, because looking the name up ignores every timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS_TO_ANSWER)
    return bool(answers)


# Decoding, and the cache of what was decoded.


def _load_whole(builder: _Builder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of a whole split, from the cache if that is sound."""
    try:
        fingerprint = _fingerprint(builder, split)
    except OSError as error:
        raise InputError(_damaged(builder.name, builder.data_path, error)) from error

    version = str(builder.info.version)
    file_name = f"{builder.info.full_name.replace('/', '-')}-{split}.npz"
    beside = Path(builder.data_path).parent / f"{version}-flax_resnet" / file_name
    place = hashlib.sha256(str(builder.data_path).encode()).hexdigest()[:12]
    in_user_cache = platformdirs.user_cache_path("flax_resnet") / place / file_name
    for path in (beside, in_user_cache):
        cached = _read_cache(path, fingerprint)
        if cached is not None:
            return cached

    images, labels = _decode(builder, split)
    for path in (beside, in_user_cache):
        try:
            _write_cache(path, fingerprint, images, labels)
            break
        except OSError as error:
            logger.info("no cache at %s: %s", path, error)
    return images, labels


def _fingerprint(builder: _Builder, split: str) -> str:
    """Changes whenever a file of the split, or what TFDS says about them, does."""
    digest = hashlib.sha256((builder.data_path / "dataset_info.json").read_bytes())
    for path in builder.info.splits[split].filepaths:
        stat = path.stat()
        digest.update(f"{path.name} {stat.length} {stat.mtime}\n".encode())
    return digest.hexdigest()


def _read_cache(path: Path, fingerprint: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(images, labels), or None if there is no cache or it is stale or damaged."""
    if not path.exists():
        return None
    try:
        # Reading an array to its end checks its CRC-32.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if arrays["fingerprint"].item() == fingerprint:
                return arrays["images"], arrays["labels"]
            logger.info("the cache %s is stale", path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("the cache %s is damaged (%s) and is made anew", path, error)
    return None


def _write_cache(path: Path, fingerprint: str, images: np.ndarray, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        np.savez(file, fingerprint=np.array(fingerprint), images=images, labels=labels)
        file.replace(path)  # whole or not at all


def _decode(builder: _Builder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a split in the order of its files, as `tfds.data_source` does."""
    count = builder.info.splits[split].num_examples
    examples = tqdm(
        _examples(builder, split),
        f"decoding {builder.name} {split}",
        count,
        unit=" images",
        disable=None,
        leave=False,
    )
    images, labels = [], []
    try:
        for image, label in examples:
            images.append(image)
            labels.append(label)
        if len(images) != count:
            raise ValueError(f"{split} has {len(images)} examples of {count}")
    except Exception as error:  # of the file readers, the protocol buffers and the decoders
        raise InputError(_damaged(builder.name, builder.data_path, error)) from error
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise InputError(f"the images of {builder.name} differ in size: {sorted(shapes)[:3]} ...")
    return np.stack(images), np.array(labels, np.int32)


def _examples(builder: _Builder, split: str) -> Iterator[tuple[np.ndarray, np.integer]]:
    features = tfds.features.FeaturesDict({k: builder.info.features[k] for k in ("image", "label")})
    for record in _records(builder, split):
        example: Any = features.deserialize_example_np(record)
        yield example["image"], example["label"]


def _records(builder: _Builder, split: str) -> Iterator[bytes]:
    """The serialised examples of a split, from ArrayRecord or TFRecord files."""
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        for path in builder.info.splits[split].filepaths:
            yield from _tfrecords(path)
    else:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        source = builder.as_data_source(split, deserialize_method=raw)
        for start in range(0, len(source), 1000):  # in one read each
            yield from source.__getitems__(range(start, min(start + 1000, len(source))))


def _tfrecords(path: Any) -> Iterator[bytes]:
    """Records of a TFRecord file: length, its CRC, data, its CRC.

    The CRCs are not looked at: a PNG or JPEG inside brings its own.

    Raises:
      EOFError: if the file ends inside a record.
    """
    with path.open("rb") as file:
        while head := file.read(12):
            (length,) = struct.unpack("<Q", head[:8].ljust(8, b"\xff"))
            if len(head) < 12 or length > path.stat().length:
                raise EOFError(f"{path} ends inside a record")
            data = file.read(length + 4)
            if len(data) < length + 4:
                raise EOFError(f"{path} ends inside a record")
            yield data[:-4]
