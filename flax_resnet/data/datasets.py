"""Image data sets from TensorFlow Datasets as arrays, without TensorFlow."""

import contextlib
import hashlib
import http.client
import io
import logging
import os
import struct
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants
from tensorflow_datasets.core.registered import DatasetNotFoundError

from flax_resnet.data.builders import CIFAR10_ARCHIVE, CIFAR10_URL, Cifar10, Digits
from flax_resnet.errors import InputError, short_reason
from flax_resnet.models.caches import cache_folder
from flax_resnet.progress import bar, say, shows_bars

logger = logging.getLogger(__name__)

# A tfds.core.DatasetBuilder. TFDS annotates its attributes so widely that a type checker
# rejects every use of them.
_Builder = Any

_Range = tuple[str, int, int]  # a split of TFDS and the examples from start to stop - 1

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

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.images.shape[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of images and labels."""
        return self.images.nbytes + self.labels.nbytes

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of some examples, as `Source.read`."""
        return self.images[index], self.labels[index]


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
        cannot be, if its folder is damaged, or if it has examples without a label.
    """
    return _load(*_open_split(name, split, data_dir))


def _load(builder: _Builder, ranges: list[_Range]) -> Dataset:
    whole = {name: _load_whole(builder, name) for name in {name for name, _, _ in ranges}}
    images = [whole[name][0][start:stop] for name, start, stop in ranges]
    labels = np.concatenate([whole[name][1][start:stop] for name, start, stop in ranges])
    _check_labels(builder, labels)
    return Dataset(
        images[0] if len(ranges) == 1 else np.concatenate(images),
        labels,
        tuple(builder.info.features["label"].names),
    )


class Source:
    """A split that stays on disk, for a data set too large to be loaded.

    Opening, preparing and the names are as in `load_dataset`, and so is the order of the
    examples. It can be pickled, and every process reads by itself.

    Attributes:
      image_shape: (H, W, C).
      class_names: one name a class.

    Raises (when made):
      InputError: as `load_dataset`, or if the images differ in size.
    """

    def __init__(self, name: str, split: str, data_dir: str | None = None):
        self._builder, self._ranges = _open_split(name, split, data_dir)
        self._ends = np.cumsum([stop - start for _, start, stop in self._ranges])
        self._features = _two_features(self._builder)
        self._readers: dict[str, Any] = {}
        self.class_names = tuple(self._builder.info.features["label"].names)
        self.image_shape = self._builder.info.features["image"].shape
        if None in self.image_shape and self.can_be_streamed:
            self.image_shape = self._decode(np.array([0]))[0][0].shape

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded images and labels."""
        return len(self) * (int(np.prod(self.image_shape)) + 4)

    @property
    def can_be_streamed(self) -> bool:
        """Whether examples can be read in any order, as from ArrayRecord but not TFRecord."""
        return self._builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD

    def load(self) -> Dataset:
        """The split in memory, as `load_dataset` returns it."""
        return _load(self._builder, self._ranges)

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads examples.

        Args:
          index: int [n], the places of the examples in the split.

        Returns:
          Images, uint8 [n, H, W, C], and labels, int32 [n].

        Raises:
          InputError: if they cannot be read, differ in size, or have no label.
        """
        images, labels = self._decode(index)
        _check_sizes(self._builder, {self.image_shape, *(image.shape for image in images)})
        _check_labels(self._builder, labels)
        return np.stack(images), labels

    def _decode(self, index: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        images, labels = [np.empty(0)] * len(index), np.empty(len(index), np.int32)
        range_of_each = np.searchsorted(self._ends, index, side="right")
        try:
            for i in np.unique(range_of_each):
                split, _, stop = self._ranges[i]
                if split not in self._readers:
                    self._readers[split] = _reader(self._builder, split)
                (places,) = np.nonzero(range_of_each == i)
                within = index[places] - self._ends[i] + stop
                records = self._readers[split].__getitems__(within.tolist())
                for place, record in zip(places, records, strict=True):
                    example: Any = self._features.deserialize_example_np(record)
                    images[place], labels[place] = example["image"], example["label"]
            return images, labels
        except Exception as error:  # of the file readers and the decoders
            raise InputError(
                _damaged(self._builder.name, self._builder.data_path, error)
            ) from error


def channel_statistics(
    chunks: Iterable[np.ndarray],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, over all pixels.

    Args:
      chunks: the images in parts, uint8 [n, H, W, C] each.

    Returns:
      (mean, std) in units of full white: of images / 255.
    """
    # Sums of integers are exact, so the variance below loses no digit, and no order or
    # size of the chunks changes it.
    count = total = squares = 0
    for chunk in chunks:
        count += chunk.size // chunk.shape[-1]
        total += chunk.sum(0, dtype=np.uint64).sum((0, 1))
        squares += np.square(chunk, dtype=np.uint32).sum(0, dtype=np.uint64).sum((0, 1))
    sums = [(int(t), int(q)) for t, q in zip(np.asarray(total), np.asarray(squares), strict=True)]
    mean = tuple(t / count / 255 for t, _ in sums)
    std = tuple((count * q - t**2) ** 0.5 / count / 255 for t, q in sums)
    return mean, std


# Opening and preparing a TFDS folder.


def _open_split(name: str, split: str, data_dir: str | None) -> tuple[_Builder, list[_Range]]:
    """A builder whose data is on disk, and the ranges of its splits that `split` names."""
    builder = _open(name, data_dir)
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    except (ValueError, KeyError, NotImplementedError) as error:
        known = ", ".join(builder.info.splits)
        raise InputError(f"{name} has no split {split!r}; it has: {known}") from error
    ranges = []
    for part in parts:  # what is left open is None
        count = builder.info.splits[part.splitname].num_examples
        start, stop = part.from_ or 0, count if part.to is None else part.to
        ranges.append((part.splitname, start, max(start, stop)))
    if not sum(stop - start for _, start, stop in ranges):
        raise InputError(f"split {split!r} of {name} is empty")
    return builder, ranges


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
        folder = os.path.join(os.path.expanduser(data_dir or constants.DATA_DIR), name)
        if name.isidentifier() and os.path.isdir(folder):
            raise InputError(_damaged(name, folder, error)) from error
        raise InputError(f"cannot open data set {name!r}: {short_reason(error)}") from error
    if not builder.is_prepared():
        if builder.data_path.exists():
            raise InputError(_damaged(name, builder.data_path, "it has no dataset_info.json"))
        try:
            _prepare(builder)
        except InputError:
            builder = open_builder(data_dir=data_dir)
            if not builder.is_prepared():  # by another process, which was faster
                raise
    features = dict(builder.info.features or {})
    image, label = features.get("image"), features.get("label")
    if not (
        isinstance(image, tfds.features.Image)
        and isinstance(label, tfds.features.ClassLabel)
        and image.np_dtype == np.uint8
    ):
        raise InputError(f"data set {name!r} has no 8-bit `image` with a class as its `label`")
    if builder.info.file_format not in (
        tfds.core.FileFormat.ARRAY_RECORD,
        tfds.core.FileFormat.TFRECORD,
    ):
        raise InputError(
            f"data set {name!r} is in {builder.info.file_format.value} files: prepare it with "
            "file_format='array_record'"
        )
    return builder


def _damaged(name: str, folder: Any, reason: Any) -> str:
    return (
        f"the TFDS folder {folder} of {name} is damaged: {short_reason(reason)}; "
        "delete it and start again"
    )


def _prepare(builder: _Builder) -> None:
    """Runs TFDS's download_and_prepare, after a look whether it can succeed."""
    name, folder = builder.name, Path(builder.data_dir_root)
    if isinstance(builder, Cifar10):
        archive = folder / "downloads" / "manual" / CIFAR10_ARCHIVE
        if archive.exists():
            builder.archive = archive
        elif not _reachable(CIFAR10_URL):
            raise InputError(
                f"no data and no network: cifar10 is not in {folder}, and {CIFAR10_URL} cannot be "
                "reached. Either name a folder that has it by $TFDS_DATA_DIR or data_dir "
                f"(train.py: --config.data_dir=DIR), or put that archive at {archive}, or train "
                "on data that needs no download with --config configs/digits_resnet8.py"
            )
    elif name != "digits" and not _reachable("https://storage.googleapis.com"):
        raise InputError(
            f"no data and no network: {name} is not in {folder}; name a folder that has it by "
            "$TFDS_DATA_DIR or data_dir (train.py: --config.data_dir=DIR)"
        )
    say(f"preparing {name} in {folder} ...")
    if not shows_bars():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints where it writes to
            builder.download_and_prepare(file_format="array_record")
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"TFDS needs TensorFlow to prepare {name}: run `tfds build {name}` where it is "
            "installed, and name the folder by $TFDS_DATA_DIR or data_dir (train.py: "
            "--config.data_dir=DIR)"
        ) from error
    except Exception as error:  # of the disk, the download, its checksum, the examples
        raise InputError(f"{name} cannot be prepared in {folder}: {short_reason(error)}") from error


def _reachable(url: str) -> bool:
    """Whether a server answers at all."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5)
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except (OSError, http.client.HTTPException, ValueError):  # the last of a proxy's address
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
    in_user_cache = cache_folder(place)
    paths = [beside, in_user_cache / file_name] if in_user_cache else [beside]
    for path in paths:
        cached = _read_cache(path, fingerprint)
        if cached is not None:
            return cached

    images, labels = _decode(builder, split)
    for path in paths:
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
    if not os.path.exists(path):  # where Path raises: in a folder not to be looked into
        return None
    try:
        # Reading an array to its end checks its CRC-32.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if arrays["fingerprint"].item() == fingerprint:
                return arrays["images"], arrays["labels"]
            logger.info("the cache %s is stale", path)
    except Exception as error:  # of NumPy, zipfile and zlib, whatever bit is wrong
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
    what = f"decoding {builder.name} {split}"
    examples = bar(_examples(builder, split), count, what, unit=" images")
    images, labels = [], []
    try:
        for image, label in examples:
            images.append(image)
            labels.append(label)
        if len(images) != count:
            raise ValueError(f"{split} has {len(images)} examples of {count}")
    except Exception as error:  # of the file readers, the protocol buffers and the decoders
        raise InputError(_damaged(builder.name, builder.data_path, error)) from error
    _check_sizes(builder, {image.shape for image in images})
    return np.stack(images), np.array(labels, np.int32)


def _check_labels(builder: _Builder, labels: np.ndarray) -> None:
    if (labels < 0).any():  # what TFDS gives examples whose label is not published
        raise InputError(f"{builder.name} has examples without a label in this split")


def _check_sizes(builder: _Builder, shapes: set[tuple[int, ...]]) -> None:
    if len(shapes) != 1:
        raise InputError(f"the images of {builder.name} differ in size: {sorted(shapes)[:3]} ...")


def _examples(builder: _Builder, split: str) -> Iterator[tuple[np.ndarray, np.integer]]:
    features = _two_features(builder)
    for record in _records(builder, split):
        example: Any = features.deserialize_example_np(record)
        yield example["image"], example["label"]


def _two_features(builder: _Builder) -> Any:
    return tfds.features.FeaturesDict({k: builder.info.features[k] for k in ("image", "label")})


def _reader(builder: _Builder, split: str) -> Any:
    """Random access to the serialised examples of a split in ArrayRecord files."""
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split, deserialize_method=raw)


def _records(builder: _Builder, split: str) -> Iterator[bytes]:
    """The serialised examples of a split, from ArrayRecord or TFRecord files."""
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        for path in builder.info.splits[split].filepaths:
            yield from _tfrecords(path)
    else:
        source = _reader(builder, split)
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
