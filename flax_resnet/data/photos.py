"""Splits of pictures of any size: what a net sees of them in training and in evaluation."""

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from flax_resnet.data.datasets import Dataset
from flax_resnet.data.folders import Folder
from flax_resnet.data.pictures import (
    Frame,
    Picture,
    Sizing,
    decoded,
    draw_part,
    frame_of,
    middle,
    opened,
    part,
    read_for_evaluation,
    read_for_training,
    upright,
)
from flax_resnet.errors import InputError
from flax_resnet.models.caches import cache_folder
from flax_resnet.progress import bar, warn

_SHOWN = 3
_SAMPLE = 64


class Pictures(Protocol):
    """A split whose examples are files: `Folder`, and TFDS's `Source`."""

    class_names: tuple[str, ...]

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def files(self, index: np.ndarray) -> tuple[Sequence[Picture], np.ndarray]:
        """The pictures, and their labels, int32 [n]."""
        ...

    def where(self, i: int) -> str:
        """Example i, for people."""
        ...


class Photos:
    """A split of pictures, read as images of one size.

    It can be pickled, and every process reads by itself.

    Args:
      pictures: the files.
      sizing: how they come to one size.
      random_crops: whether training takes a random part of each picture, another every epoch.

    Attributes:
      pictures: as given.
      image_shape: (image_size, image_size, channels).
      class_names: one name a class.
      random_crops: as given.
    """

    can_be_streamed = True

    def __init__(self, pictures: Pictures, sizing: Sizing, *, random_crops: bool = False):
        self.pictures, self._sizing, self.random_crops = pictures, sizing, random_crops
        self._kept: _Kept | None = None
        self.class_names = pictures.class_names
        self.image_shape = (sizing.image_size, sizing.image_size, sizing.channels)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def nbytes(self) -> int:
        """Bytes of the images and labels."""
        return len(self) * (int(np.prod(self.image_shape)) + 4)

    @property
    def keeps(self) -> bool:
        """Whether pictures stay decoded in memory once they are read."""
        return self._kept is not None

    def keeping(self) -> "Photos":
        """The same images, of pictures that stay decoded in memory once they are read."""
        split = copy.copy(self)
        split._kept = _Kept()
        return split

    def estimate_kept(self) -> int:
        """Bytes that `keeping` will take, judged by the first pictures.

        Raises:
          InputError: if one of them cannot be read.
        """
        files, _ = self.pictures.files(np.arange(min(_SAMPLE, len(self))))
        pixels = 0
        for i, file in enumerate(files):
            with self._named(i), opened(file) as image:
                pixels += image.width * image.height
        # Of Pillow's, which takes four bytes for three channels; and at 1/2, 1/4, 1/8 too.
        return int(pixels / len(files) * len(self) * (1 if self._sizing.mode == "L" else 4) * 4 / 3)

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images as in evaluation, uint8 [n, *image_shape], and labels, int32 [n].

        Raises:
          InputError: if one cannot be read.
        """
        return self.read_crops(index, [None] * len(index))

    def read_crops(
        self, index: np.ndarray, randoms: Iterable[np.random.Generator | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `read`, but a random part of each picture that has a generator."""
        files, labels = self.pictures.files(index)
        images = np.empty((len(index), *self.image_shape), np.uint8)
        for place, (i, file, random) in enumerate(zip(index, files, randoms, strict=True)):
            with self._named(i):
                images[place] = self._image(int(i), file, random)
        return images, labels

    def _image(self, i: int, file: Picture, random: np.random.Generator | None) -> np.ndarray:
        sizing = self._sizing
        if random is None:
            if self._kept is None:
                return read_for_evaluation(file, sizing)
            return middle(self._kept.picture(i, file, sizing.mode), sizing)
        if self._kept is None:
            return read_for_training(file, sizing, random)
        frame = self._kept.frame(i, file)
        box, factor = draw_part(random, frame, sizing)
        picture = self._kept.picture(i, file, sizing.mode, factor)
        return part(picture, frame, box, sizing, random)

    @contextlib.contextmanager
    def _named(self, i: int) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.pictures.where(i)}: {error}") from error

    def load(self) -> Dataset:
        """All images, as in evaluation, in memory."""
        chunks = np.array_split(np.arange(len(self)), max(1, len(self) // 16))
        what = f"reading {len(self)} pictures of {self.pictures.name}"
        images = np.empty((len(self), *self.image_shape), np.uint8)
        labels = np.empty(len(self), np.int32)

        def fill(chunk: np.ndarray) -> None:
            images[chunk], labels[chunk] = self.read(chunk)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for _ in bar(threads.map(fill, chunks), len(chunks), what, unit=" batches"):
                pass
        return Dataset(images, labels, self.class_names)


class _Kept:
    """Pictures that have been decoded, at each factor that was asked for."""

    def __init__(self) -> None:
        self._frames: dict[int, Frame] = {}
        self._pictures: dict[tuple[int, int], Image.Image] = {}

    def frame(self, i: int, file: Picture) -> Frame:
        if i not in self._frames:
            with opened(file) as image:
                self._frames[i] = frame_of(image)
        return self._frames[i]

    def picture(self, i: int, file: Picture, mode: str, factor: int = 1) -> Image.Image:
        key = i, factor
        if key not in self._pictures:
            with opened(file) as image:
                self._pictures[key] = decoded(image, mode, factor)
        return self._pictures[key]


def find_bad(pictures: Folder) -> list[int]:
    """The examples of a folder that cannot be decoded; it is remembered for the next start.

    Unless one cannot be read for now, of which its size and time do not tell: for permissions, or
    of a disk that is away.
    """
    stats = [_stat(path) for path in pictures.paths]
    # Another version may read what this one cannot.
    versions = [importlib.metadata.version(name) for name in ("flax_resnet", "pillow")]
    digest = hashlib.sha256(" ".join(versions).encode())
    for path, stat in zip(pictures.paths, stats, strict=True):
        digest.update(os.fsencode(os.path.abspath(path)))
        digest.update(f"\0{stat and (stat.st_size, stat.st_mtime_ns)}\0".encode())
    folder = cache_folder("pictures")
    remembered = folder / f"{digest.hexdigest()[:32]}.json" if folder else None
    if remembered and (bad := _remembered(remembered, len(pictures))) is not None:
        return bad

    def look_at(path: str) -> bool | None:
        """None if it can be decoded; else whether that may pass."""
        try:
            with opened(path) as image:
                upright(image)
        except InputError as error:
            return _may_pass(error)
        return None

    what = f"looking at {len(pictures)} pictures of {pictures.name}"
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        looked_at = threads.map(look_at, pictures.paths)
        found = list(bar(looked_at, len(pictures), what, unit=" pictures"))
    bad = [i for i, may_pass in enumerate(found) if may_pass is not None]
    if remembered and not any(found):
        try:
            remembered.parent.mkdir(parents=True, exist_ok=True)
            remembered.write_text(json.dumps(bad))
        except OSError:
            pass  # then they are looked at again
    return bad


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:  # of a link to nothing, say
        return None


def _may_pass(error: InputError) -> bool:
    """Whether it is the system's, and not the picture's."""
    cause = error.__cause__
    return isinstance(cause, MemoryError) or getattr(cause, "errno", None) is not None


def _remembered(path: Path, count: int) -> list[int] | None:
    if not os.path.isfile(path):  # nothing there, or a pipe
        return None
    try:
        bad = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    is_one = isinstance(bad, list) and all(type(i) is int and 0 <= i < count for i in bad)
    return bad if is_one else None


def without_bad(pictures: Folder, *, skip: bool) -> tuple[Folder, int]:
    """A folder of pictures that can all be read, and how many were left out.

    Raises:
      InputError: if some cannot be read and are not to be skipped, or none is left.
    """
    bad = find_bad(pictures)
    if not bad:
        return pictures, 0
    named = ", ".join(map(pictures.where, bad[:_SHOWN]))
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    if not skip or len(bad) == len(pictures):
        raise InputError(
            f"{len(bad)} pictures of {len(pictures)} cannot be read: {named}{more}; "
            "take them out of the folder, or train with --config.bad_images=skip"
        )
    warn(f"left out as they cannot be read: {named}{more}")
    rest = pictures.without(bad)
    if lost := sorted(set(pictures.labels.tolist()) - set(rest.labels.tolist())):
        names = ", ".join(pictures.class_names[label] for label in lost)
        warn(f"no picture is left of {names}")
    return rest, len(bad)
