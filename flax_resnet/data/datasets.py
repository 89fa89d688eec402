"""Image data sets from TensorFlow Datasets as arrays, without TensorFlow."""

import contextlib
import hashlib
import io
import logging
import math
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import naming

from flax_resnet.data.builders import Digits
from flax_resnet.data.preparing import BY_WHAT, prepare
from flax_resnet.errors import InputError, short_reason
from flax_resnet.models.caches import cache_folder
from flax_resnet.progress import bar

logger = logging.getLogger(__name__)

# A tfds.core.DatasetBuilder. TFDS annotates its attributes so widely that a type checker
# rejects every use of them.
_Builder = Any

# Of pictures in examples: all decode in the process.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

# Pillow's names for images of 8 bits, by the number of their channels.
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

# Beyond these, in bytes and in classes, what TFDS tells of its files is damaged.
LARGEST_IMAGE = 2**28
_LARGEST_EXAMPLE = 2 * LARGEST_IMAGE
_MOST_CLASSES = 10**6

# A split that takes more bytes is not decoded for a small part of it.
_LARGE = 2**30

# Larger files that TFDS reads whole are damaged: bytes by the ending of the name. Those in .txt
# have the names of the classes.
_MOST_BYTES = {".json": 2**23, ".txt": 2**25}

_Range = tuple[str, int, int]  # a split of TFDS and the examples from start to stop - 1


@dataclass(frozen=True)
class Dataset:
    """A split in memory.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N], indices into class_names.
      class_names: one name a class.

    Raises (when made):
      InputError: if `images` is not of that dtype and form or has a side of 0, `labels` is not N
        integers below the number of `class_names`, or `class_names` are not strings.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels, names = self.images, self.labels, self.class_names
        dtype, shape = getattr(images, "dtype", type(images).__name__), np.shape(images)
        if dtype != np.uint8 or len(shape) != 4 or not min(shape[1:]):
            raise InputError(
                f"images must be uint8 of shape [N, H, W, C], from 0 to 255, not {dtype} of shape "
                f"{list(shape)}"
            )
        if np.shape(labels) != shape[:1] or np.asarray(labels).dtype.kind not in "iu":
            raise InputError(
                f"labels must be {shape[0]} integers, one an image, not "
                f"{np.asarray(labels).dtype} of shape {list(np.shape(labels))}"
            )
        check_class_names(names)
        if len(labels) and not (np.min(labels) >= 0 and np.max(labels) < len(names)):
            raise InputError(
                f"labels must be from 0 to {len(names) - 1}, for {len(names)} class_names, not "
                f"{np.min(labels)} to {np.max(labels)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.image_shape))
        return f"<Dataset: {len(self)} images of {size}, {len(self.class_names)} classes>"

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


def check_class_names(names: Sequence[str]) -> None:
    """Raises InputError unless they are strings, one at least."""
    if not len(names) or not all(isinstance(name, str) for name in names):
        raise InputError(f"class_names must be strings, one a class, not {short_reason(names)}")


def load_dataset(
    name: str,
    split: str,
    data_dir: str | None = None,
    *,
    label_key: str = "label",
    channels: int | None = None,
) -> Dataset:
    """Reads a split of a TFDS image classification data set, preparing it if need be.

    Any data set with an `image` of one size and a class as its label will do; TensorFlow is
    not needed. The decoded arrays are cached beside the TFDS folder, or in the user's cache
    folder where that cannot be written, and read back in well under a second; a cache that is
    damaged, or older than the TFDS folder, is made anew.

    Args:
      name: `digits` (`flax_resnet.data.builders.Digits`; needs no network), `cifar10`, or
        another name of TFDS.
      split: a split string of TFDS: "train", "train[:90%]", "train[10:20]+test".
      data_dir: folder of TFDS; default $TFDS_DATA_DIR, or ~/tensorflow_datasets.
      label_key: the feature that is the label: cifar100 has `coarse_label` too.
      channels: of the images, 3 for gray ones as red, green and blue; None for as many as
        they have.

    Raises:
      InputError: if there is no such data set, split or label, if it is not prepared and
        cannot be, if its folder is damaged, if it has examples without a label, or if its
        images cannot have so many channels.
    """
    return Source(name, split, data_dir, label_key=label_key, channels=channels).load()


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

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | None = None,
        *,
        label_key: str = "label",
        channels: int | None = None,
    ):
        self._builder, self._ranges = _open_split(name, split, _data_folder(data_dir), label_key)
        self._label_key = label_key
        self._ends = np.cumsum([stop - start for _, start, stop in self._ranges])
        self._decoder = _Decoder(self._builder, label_key)
        self._readers: dict[str, Any] = {}
        self.class_names = tuple(self._builder.info.features[label_key].names)
        *size, depth = self._builder.info.features["image"].shape
        if channels not in (None, depth) and (depth, channels) != (1, 3):
            raise InputError(
                f"channels={channels} does not fit {name}, whose images have {depth}: only 1 can "
                "become 3"
            )
        self._repeats = (channels or depth) // depth
        if None in size:
            size = self._first().shape[:2]
        self.image_shape = (*size, channels or depth)

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
        names = {name for name, _, _ in self._ranges}
        examples = sum(self._builder.info.splits[name].num_examples for name in names)
        all_bytes = examples * int(np.prod(self.image_shape))
        if self.can_be_streamed and 2 * len(self) < examples and all_bytes > _LARGE:
            return self._load_alone()
        whole = {name: _load_whole(self._builder, name, self._label_key) for name in names}
        images = [_part(whole[name][0], start, stop) for name, start, stop in self._ranges]
        labels = np.concatenate([whole[name][1][start:stop] for name, start, stop in self._ranges])
        _check_labels(self._builder, labels, len(self.class_names))
        return Dataset(
            self._with_channels(images[0] if len(images) == 1 else np.concatenate(images)),
            labels,
            self.class_names,
        )

    def _first(self) -> np.ndarray:
        """The first image."""
        if self.can_be_streamed:
            return self._examples(np.array([0]), self._decoder)[0][0]
        try:
            return self._decoder(next(_records(self._builder, self._ranges[0][0])))[0]
        except Exception as error:  # of the file readers and the decoders
            reason = _damaged(self._builder.name, self._builder.data_path, error)
            raise InputError(reason) from error

    def _load_alone(self) -> Dataset:
        """`load` of a small part of what is large, without the rest and its cache."""
        images, labels = np.empty((len(self), *self.image_shape), np.uint8), []
        parts = np.array_split(np.arange(len(self)), -(-len(self) // 1024))
        for index in bar(parts, len(parts), f"decoding a part of {self.name}", unit=" parts"):
            images[index], some = self.read(index)
            labels.append(some)
        return Dataset(images, np.concatenate(labels), self.class_names)

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads examples.

        Args:
          index: int [n], the places of the examples in the split.

        Returns:
          Images, uint8 [n, H, W, C], and labels, int32 [n].

        Raises:
          InputError: if they cannot be read, differ in size, or have no label.
        """
        images, labels = self._examples(index, self._decoder)
        _check_sizes(self._builder, {self.image_shape[:2], *(image.shape[:2] for image in images)})
        _check_labels(self._builder, labels, len(self.class_names))
        return self._with_channels(np.stack(images)), labels

    @property
    def name(self) -> str:
        """Of the data set."""
        return self._builder.name

    def files(self, index: np.ndarray) -> tuple[list[io.BytesIO], np.ndarray]:
        """The images of some examples as the files that they are, and their labels.

        Raises:
          InputError: if they cannot be read, or have no label.
        """
        files, labels = self._examples(index, self._decoder.file)
        _check_labels(self._builder, labels, len(self.class_names))
        return files, labels

    def where(self, i: int) -> str:
        """An example, for people."""
        return f"example {i} of {self.name}"

    def _with_channels(self, images: np.ndarray) -> np.ndarray:
        return images if self._repeats == 1 else np.repeat(images, self._repeats, -1)

    def _examples(
        self, index: np.ndarray, decode: Callable[[bytes], tuple[Any, int]]
    ) -> tuple[list[Any], np.ndarray]:
        """What `decode` makes of serialised examples, and their labels."""
        images: list[Any] = [None] * len(index)
        labels = np.empty(len(index), np.int32)
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
                    images[place], labels[place] = decode(record)
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
      (mean, std) of images / 255.
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


def _data_folder(data_dir: str | None) -> str:
    """The folder of TFDS, by default the user's; ~ stands for a home folder.

    Raises:
      InputError: if there is no such home, or it is not a folder of this machine.
    """
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    expanded = os.path.expanduser(folder)
    say_it = f"name another by {BY_WHAT}"
    if expanded.startswith("~"):
        raise InputError(f"there is no home folder for {short_reason(folder)}: {say_it}")
    if "://" in expanded or "\0" in expanded:
        raise InputError(f"{short_reason(folder)} is no folder of this machine: {say_it}")
    return expanded


def _open_split(
    name: str, split: str, data_dir: str, label_key: str
) -> tuple[_Builder, list[_Range]]:
    """A builder whose data is on disk, and the ranges of its splits that `split` names."""
    builder = _open(name, data_dir)
    _check_features(builder, label_key)
    parts = parts_of(split, builder.info.splits, name, ", ".join(builder.info.splits))
    for part in parts:
        _check_files(builder, part.splitname)
    ranges = []
    for part in parts:  # what is left open is None
        count = builder.info.splits[part.splitname].num_examples
        start, stop = part.from_ or 0, count if part.to is None else part.to
        ranges.append((part.splitname, start, max(start, stop)))
    if not sum(stop - start for _, start, stop in ranges):
        raise InputError(f"split {split!r} of {name} is empty")
    return builder, ranges


def parts_of(split: str, splits: Any, name: str, known: str) -> list[Any]:
    """The parts that a split string of TFDS names.

    Args:
      split: such as "train[:90%]+test".
      splits: a tfds.core.SplitDict.
      name: whose they are, for people.
      known: those that there are, for people.

    Raises:
      InputError: if it names none.
    """
    try:
        return tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    except (ValueError, KeyError, NotImplementedError) as error:
        reason = "" if "Unknown split" in str(error) else f" ({short_reason(error, 100)})"
        raise InputError(f"{name} has no split {split!r}; it has: {known}{reason}") from error


def _open(name: str, data_dir: str) -> _Builder:
    """A builder whose data is on disk."""
    shown = short_reason(repr(name), 100)
    try:
        parsed, _ = naming.parse_builder_name_kwargs(name)
    except Exception as error:  # TFDS lets through whatever its parsers raise
        _refuse_folder(name)
        raise InputError(f"cannot open data set {shown}: {short_reason(error)}") from error
    if parsed.namespace:  # others' data sets, for which TFDS asks their servers
        _refuse_folder(name)
        raise InputError(
            f"data set {shown} is not one of TFDS's own: prepare it with TFDS, and give its name "
            f"there, {parsed.name}"
        )
    folder = os.path.join(data_dir, parsed.name)
    _check_folder(parsed.name, folder)
    open_builder = Digits if name == "digits" else partial(tfds.builder, name)
    try:
        builder: _Builder = open_builder(data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(
            f"unknown data set {shown}: use cifar10, digits, another name of TFDS, or folder:PATH "
            "for a folder of pictures"
        ) from error
    except Exception as error:  # TFDS lets through whatever its parsers raise
        if name.isidentifier() and os.path.isdir(folder):
            raise InputError(_damaged(name, folder, error)) from error
        raise InputError(f"cannot open data set {shown}: {short_reason(error)}") from error
    if not builder.is_prepared():
        if builder.data_path.exists():
            raise InputError(_damaged(name, builder.data_path, "it has no dataset_info.json"))
        try:
            prepare(builder)
        except InputError:
            builder = open_builder(data_dir=data_dir)
            if not builder.is_prepared():  # by another process, which was faster
                raise
    if builder.info.file_format not in (
        tfds.core.FileFormat.ARRAY_RECORD,
        tfds.core.FileFormat.TFRECORD,
    ):
        raise InputError(
            f"data set {name!r} is in {builder.info.file_format.value} files: prepare it with "
            "file_format='array_record'"
        )
    return builder


def _refuse_folder(name: str) -> None:
    """Raises InputError for what is no name of TFDS, but a folder's."""
    if os.path.isdir(name) or name.lower().startswith("folder:"):
        raise InputError(f"a folder of pictures is dataset=folder:PATH, not {short_reason(name)}")


def _check_folder(name: str, folder: str) -> None:
    """Refuses a data set's folder, if there is one, that TFDS could not read."""
    for entry in entries_below(folder):
        if not entry.is_file():
            raise InputError(_damaged(name, folder, f"{entry.path} is not a file"))
        most = _MOST_BYTES.get(os.path.splitext(entry.name)[1])
        with contextlib.suppress(FileNotFoundError):  # of another process that prepares it
            if most is not None and (size := entry.stat().st_size) > most:
                raise InputError(_damaged(name, folder, f"{entry.path} has {size:,} bytes"))


def entries_below(folder: str | os.PathLike[str], depth: int = 3) -> Iterator[os.DirEntry[str]]:
    """All but folders, in a folder that need not exist, and in its folders.

    Args:
      folder: to look in.
      depth: of its folders; those of a data set are for configuration, version and files.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # told by who reads them
        for entry in entries:
            if entry.is_dir():
                if depth:
                    yield from entries_below(entry.path, depth - 1)
            elif os.path.exists(entry.path):
                yield entry


def _check_files(builder: _Builder, split: str) -> None:
    """Refuses a split whose files are not there, or cannot hold so many examples."""
    try:
        size = sum(os.stat(path).st_size for path in builder.info.splits[split].filepaths)
        count = builder.info.splits[split].num_examples
        if count > size:
            raise ValueError(f"{split} has {count} examples in {size} bytes")
    except Exception as error:  # of the disk, and of TFDS, which makes the names of a template
        raise InputError(_damaged(builder.name, builder.data_path, error)) from error


def _check_features(builder: _Builder, label_key: str) -> None:
    features = dict(builder.info.features or {})
    image = features.get("image")
    if not (isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8):
        raise InputError(f"data set {builder.name!r} has no 8-bit `image`")
    shape: Any = image.shape
    sides = [1 if side is None else side for side in shape]
    has_form = len(sides) == 3 and shape[2] in _MODES and min(sides) >= 1
    if not has_form or math.prod(sides) > LARGEST_IMAGE:
        reason = f"its images are of shape {list(shape)}"
        raise InputError(_damaged(builder.name, builder.data_path, reason))
    classes = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    if label_key not in classes:
        raise InputError(
            f"data set {builder.name!r} has no class label {label_key!r}; it has: "
            f"{', '.join(classes) or 'none'}"
        )
    count = features[label_key].num_classes or 0
    if 1 <= count <= _MOST_CLASSES:
        count = len(features[label_key].names)  # in another file
    if not 1 <= count <= _MOST_CLASSES:
        raise InputError(_damaged(builder.name, builder.data_path, f"it has {count} classes"))


def _damaged(name: str, folder: Any, reason: Any) -> str:
    return (
        f"the TFDS folder {folder} of {name} is damaged: {short_reason(reason)}; "
        "delete it and start again"
    )


# Decoding, and the cache of what was decoded.


def _load_whole(builder: _Builder, split: str, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of a whole split, from the cache if that is sound."""
    try:
        fingerprint = _fingerprint(builder, split)
    except OSError as error:
        raise InputError(_damaged(builder.name, builder.data_path, error)) from error

    count = builder.info.splits[split].num_examples
    version = str(builder.info.version)
    other_label = "" if label_key == "label" else f"-{label_key.replace('/', '-')}"
    file_name = f"{builder.info.full_name.replace('/', '-')}-{split}{other_label}.npz"
    beside = Path(builder.data_path).parent / f"{version}-flax_resnet" / file_name
    place = hashlib.sha256(str(builder.data_path).encode()).hexdigest()[:12]
    in_user_cache = cache_folder(place)
    paths = [beside, in_user_cache / file_name] if in_user_cache else [beside]
    for path in paths:
        cached = _read_cache(path, fingerprint, count)
        if cached is not None:
            return cached

    images, labels = _decode(builder, split, label_key)
    for path in paths:
        try:
            _write_cache(path, fingerprint, images, labels)
            break
        except OSError as error:
            logger.info("no cache at %s: %s", path, error)
    return images, labels


def _part(images: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Some of the images, which do not keep many others in memory."""
    part = images[start:stop]
    return part.copy() if 2 * len(part) < len(images) else part


def _fingerprint(builder: _Builder, split: str) -> str:
    """Changes whenever a file of the split, or what TFDS says about them, does."""
    digest = hashlib.sha256((builder.data_path / "dataset_info.json").read_bytes())
    for path in builder.info.splits[split].filepaths:
        stat = os.stat(path)  # not the path's own, which wants to know the owner's name
        digest.update(f"{path.name} {stat.st_size} {int(stat.st_mtime)}\n".encode())
    return digest.hexdigest()


def _read_cache(path: Path, fingerprint: str, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(images, labels), or None if there is no cache or it is stale or damaged."""
    if not os.path.exists(path):  # where Path raises: in a folder not to be looked into
        return None
    try:
        if not path.is_file():
            raise ValueError("not a file")
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("not ours, which is not compressed")
        # Reading an array to its end checks its CRC-32.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if arrays["fingerprint"].item() == fingerprint:
                images, labels = arrays["images"], arrays["labels"]
                if (images.dtype, images.ndim, len(images)) != (np.uint8, 4, count):
                    raise ValueError("other images")
                if (labels.dtype, labels.shape) != (np.int32, (count,)):
                    raise ValueError("other labels")
                return images, labels
            logger.info("the cache %s is stale", path)
    except Exception as error:  # of NumPy, zipfile and zlib, whatever bit is wrong
        # NumPy would have the user unpickle what it does not know.
        reason = "" if "pickle" in str(error) else f" ({short_reason(error)})"
        logger.warning("the cache %s is damaged%s and is made anew", path, reason)
    return None


def _write_cache(path: Path, fingerprint: str, images: np.ndarray, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        np.savez(file, fingerprint=np.array(fingerprint), images=images, labels=labels)
        file.replace(path)  # whole or not at all


def _decode(builder: _Builder, split: str, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a split in the order of its files, as `tfds.data_source` does."""
    count = builder.info.splits[split].num_examples
    what = f"decoding {builder.name} {split}"
    examples = bar(
        map(_Decoder(builder, label_key), _records(builder, split)), count, what, unit=" images"
    )
    images, labels = np.empty(0), np.empty(count, np.int32)
    shapes, done = set(), 0
    try:
        for image, label in examples:
            if not shapes:
                images = np.empty((count, *image.shape), np.uint8)
            shapes.add(image.shape)
            if len(shapes) == 1 and done < count:
                images[done], labels[done] = image, label
            done += 1
        if done != count:
            raise ValueError(f"{split} has {done} examples of {count}")
    except Exception as error:  # of the file readers, the protocol buffers and the decoders
        raise InputError(_damaged(builder.name, builder.data_path, error)) from error
    _check_sizes(builder, shapes)
    return images, labels


def _check_labels(builder: _Builder, labels: np.ndarray, num_classes: int) -> None:
    if (labels < 0).any():  # what TFDS gives examples whose label is not published
        raise InputError(f"{builder.name} has examples without a label in this split")
    if (labels >= num_classes).any():
        reason = f"a label is {labels.max()}, of {num_classes} classes"
        raise InputError(_damaged(builder.name, builder.data_path, reason))


def _check_sizes(builder: _Builder, shapes: set[tuple[int, ...]]) -> None:
    if len(shapes) != 1:
        raise InputError(
            f"the images of {builder.name} differ in size: {sorted(shapes)[:3]} ...; "
            "--config.image_size=224 --config.crop=resized brings them to one"
        )


class _Decoder:
    """From a serialised example to its image, uint8 [H, W, C], and its label."""

    def __init__(self, builder: _Builder, label_key: str):
        features = builder.info.features
        *self._size, self._depth = features["image"].shape
        self._label_key = label_key
        # The image as the bytes of its file: TFDS's decoder takes a palette's indices for gray.
        self._features = tfds.features.FeaturesDict(
            {"image": tfds.features.Text(), label_key: features[label_key]}
        )

    def file(self, record: bytes) -> tuple[io.BytesIO, int]:
        """The image as the file that it is."""
        example: Any = self._features.deserialize_example_np(record)
        return io.BytesIO(example["image"]), int(example[self._label_key])

    def __call__(self, record: bytes) -> tuple[np.ndarray, int]:
        file, label = self.file(record)
        with Image.open(file, formats=_FORMATS) as image:
            for size, expected in zip(reversed(image.size), self._size, strict=True):
                if expected not in (None, size):
                    raise ValueError(f"an image of {image.width} x {image.height} pixels")
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"an image of more than 8 bits (mode {image.mode})")
            mode = _MODES[self._depth]
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        return pixels.reshape(*pixels.shape[:2], self._depth), label


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
        size = os.fstat(file.fileno()).st_size
        while head := file.read(12):
            (length,) = struct.unpack("<Q", head[:8].ljust(8, b"\xff"))
            if len(head) < 12 or length > min(size, _LARGEST_EXAMPLE):
                raise EOFError(f"{path} ends inside a record")
            data = file.read(length + 4)
            if len(data) < length + 4:
                raise EOFError(f"{path} ends inside a record")
            yield data[:-4]
