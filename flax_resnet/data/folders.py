"""A folder of photographs as a data set, read where they lie: PATH/SPLIT/CLASS/*."""

import copy
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from flax_resnet.data.datasets import parts_of
from flax_resnet.data.pictures import find_files, is_picture
from flax_resnet.errors import InputError, printable
from flax_resnet.progress import warn

# Names that people give to the pictures for evaluation: where one is there it goes by all of them.
_EVALUATION = ("test", "val", "valid", "validation")


class Folder:
    """A split of a folder.

    PATH/train/CLASS/* and PATH/val/CLASS/*, or test, as torchvision's ImageFolder and timm have
    them; with the classes directly in PATH there is one split, train. The order is that of the
    paths' SHA-256: a part such as train[:90%] is one by chance.

    Args:
      path: the folder.
      split: a split string as TFDS has them: "train", "train[:90%]", "val".

    Attributes:
      name: of the folder.
      class_names: the names of the folders in train, sorted.
      paths: of the pictures.
      labels: int32 [N].

    Raises (when made):
      InputError: if there is no such folder or split, if a split or a class is empty, if a split
        has a class that `train` lacks, or if what would be classes are splits.
    """

    def __init__(self, path: str, split: str):
        if not path:
            raise InputError("name the folder of pictures: dataset=folder:PATH")
        root = Path(os.path.expanduser(path))
        self.name = printable(os.path.basename(os.path.realpath(root)))
        try:
            is_folder, has_splits = root.is_dir(), (root / "train").is_dir()
        except OSError as error:  # not to be looked into, a name too long
            raise InputError(f"{root} cannot be read: {error.strerror}") from error
        if not is_folder:
            raise InputError(f"there is no folder {root}")
        folders = {f.name: f for f in _folders(root)} if has_splits else {"train": root}
        evaluation = [folders[name] for name in _EVALUATION if name in folders]
        for name in _EVALUATION:
            if len(evaluation) == 1 and re.search(rf"\b{name}\b", split):
                folders[name] = evaluation[0]
        if not has_splits:
            _refuse_splits(root)
        self.class_names = tuple(f.name for f in _folders(folders["train"]))
        if not self.class_names:
            raise InputError(f"{folders['train']} has no folders, one a class, with pictures")
        named = {n for n in folders if split == "all" or re.search(rf"\b{re.escape(n)}\b", split)}
        found = {name: _examples(folders[name], self.class_names) for name in named}
        infos = [tfds.core.SplitInfo(name, [len(examples)], 0) for name, examples in found.items()]
        hint = "; of one split, use train[:90%] and train[90%:]" if not has_splits else ""
        known = f"{', '.join(sorted(folders))}{hint}"
        parts = parts_of(split, tfds.core.SplitDict(infos), str(root), known)
        examples = [e for p in parts for e in found[p.splitname][slice(p.from_, p.to)]]
        if not examples:
            raise InputError(f"split {split!r} of {root} is empty")
        self.paths, labels = (list(values) for values in zip(*examples, strict=True))
        self.labels = np.array(labels, np.int32)
        self._root = root

    def __len__(self) -> int:
        return len(self.paths)

    def files(self, index: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The files and labels of some examples."""
        return [self.paths[i] for i in index], self.labels[index]

    def where(self, i: int) -> str:
        """An example, for people."""
        return printable(self.paths[i])

    def fingerprint(self) -> str:
        """Changes whenever a picture comes, goes or gets another size."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(os.fsencode(os.path.relpath(path, self._root)))
            digest.update(f"\0{os.stat(path).st_size}\0".encode())
        return digest.hexdigest()

    def without(self, bad: Iterable[int]) -> "Folder":
        """The same but for some examples."""
        left = np.setdiff1d(np.arange(len(self)), list(bad))
        other = copy.copy(self)
        other.paths, other.labels = [self.paths[i] for i in left], self.labels[left]
        return other


def _refuse_splits(root: Path) -> None:
    """Raises InputError where what would be classes are splits, or have them inside."""
    folders = _folders(root)
    for folder in folders:
        if (folder / "train").is_dir():
            raise InputError(f"{folder} has a folder train, but pictures are PATH/train/CLASS/*")
    if folders and all(_is_split(folder) for folder in folders):
        names = ", ".join(folder.name for folder in folders)
        raise InputError(f"{root} has {names} for classes: call the splits train and val")


def _is_split(folder: Path) -> bool:
    """By its name; of names such as Training and seg_test only if it has folders, as of classes."""
    name = folder.name.lower()
    looks_so = any(part in name for part in ("train", "test", "val"))
    return name in ("train", *_EVALUATION) or (looks_so and bool(_folders(folder)))


def _folders(path: Path) -> list[Path]:
    """Those directly in it, but hidden ones, sorted by name."""
    try:
        return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _examples(folder: Path, class_names: tuple[str, ...]) -> list[tuple[str, int]]:
    """(path, label) of all pictures of a split; says which files it leaves out."""
    labels = {name: label for label, name in enumerate(class_names)}
    examples, others = [], []
    for of_class in _folders(folder):
        if of_class.name not in labels:
            raise InputError(
                f"{printable(str(folder))} has a class that train has not: "
                f"{printable(of_class.name)}"
            )
        pictures = []
        for file in find_files(of_class):
            (pictures if is_picture(file) else others).append(file)
        if not pictures:
            raise InputError(f"class {printable(str(of_class))} has no pictures")
        examples += [(os.fspath(picture), labels[of_class.name]) for picture in pictures]

    if others:
        endings = ", ".join(sorted({printable(file.suffix) or "none" for file in others}))
        warn(f"{folder}: {len(others)} files are no pictures by their endings, {endings}")

    def key(example: tuple[str, int]) -> bytes:
        return hashlib.sha256(os.fsencode(os.path.relpath(example[0], folder))).digest()

    return sorted(examples, key=key)
