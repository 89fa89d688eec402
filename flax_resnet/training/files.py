"""A run's folder: config.json, dataset.json, and a lock."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import filelock

from flax_resnet.data.datasets import LARGEST_IMAGE, entries_below
from flax_resnet.errors import InputError, printable
from flax_resnet.training.checkpoint_files import steps_in
from flax_resnet.training.config import FOLDER, Config
from flax_resnet.training.data import Data
from flax_resnet.training.jsonfiles import is_list_of, read_json, write_json
from flax_resnet.training.own import without_replaced

# Of config.json, beside the keys of `Config`: by name, what a script has brought.
BROUGHT = "brought"

# Folders in each other, down to those of a checkpoint's arrays.
_DEPTH = 6

# Not what is computed, so it may change between two starts of one run.
_FREE_KEYS = (
    "data_dir",
    "data_feed",
    "stream_workers",
    "checkpoint_minutes",
    "keep_checkpoints",
    "on_nan",
    "log_every",
    "profile_steps",
)


def _is_image_shape(value: Any) -> bool:
    is_one = is_list_of(int, value) and len(value) == 3 and min(value) >= 1
    return is_one and math.prod(value) <= LARGEST_IMAGE


def _is_numbers(value: Any) -> bool:
    return is_list_of(float, value) and all(map(math.isfinite, value))


# What dataset.json holds at least.
DESCRIPTION: dict[str, Callable[[Any], bool]] = {
    "class_names": partial(is_list_of, str),
    "image_shape": _is_image_shape,
    "mean": _is_numbers,
    "std": _is_numbers,
}


def check_workdir(workdir: Path, config: Config, brought: Mapping[str, str]) -> None:
    """Refuses a folder that cannot be written, or holds a run of another config.

    Args:
      workdir: the folder.
      config: of the run.
      brought: by name, what a script has brought in place of what the config names.

    Raises:
      InputError: says which.
    """
    try:
        os.fspath(workdir).encode()
    except UnicodeEncodeError as error:  # Orbax would refuse it after the first epoch
        raise InputError(f"workdir {printable(str(workdir))} is not UTF-8") from error
    try:
        existing = next(p for p in [workdir, *workdir.absolute().parents] if p.exists())
    except OSError as error:  # a folder on the way is not to be looked into, a name too long
        raise InputError(f"cannot write workdir {workdir}: {error.strerror}") from error
    if not existing.is_dir():
        raise InputError(f"cannot write workdir {workdir}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write workdir {workdir}: {existing} is not writable")
    check_files(workdir)
    path = workdir / "config.json"
    if not path.exists():
        if steps_in(workdir):
            raise InputError(
                f"workdir {workdir} holds checkpoints without the config.json of their run: "
                "name another --workdir"
            )
        return
    stored = read_json(path)
    _check_brought(workdir, stored.pop(BROUGHT, {}), brought)
    # A key that an earlier version did not know has its default.
    theirs = _as_json(dataclasses.asdict(Config())) | stored
    ours = without_replaced(_as_json(dataclasses.asdict(config)), brought)
    keys = [key for key in sorted({*stored, *ours}) if key not in _FREE_KEYS]
    other = [f"{k} ({theirs.get(k)} there)" for k in keys if theirs.get(k) != ours.get(k)]
    if all(str(one.get("dataset")).startswith(FOLDER) for one in (theirs, ours)):
        # Pictures may move; dataset.json tells whether they are the same.
        other = [key for key in other if not key.startswith("dataset (")]
    if other:
        raise InputError(
            f"workdir {workdir} holds a run of another config: {', '.join(other)}; "
            "name another --workdir, or set these as they are there"
        )


def check_files(workdir: Path) -> None:
    """Refuses a folder of a run with a pipe in it, say, where reading might never end.

    Raises:
      InputError: names it.
    """
    for entry in entries_below(workdir, _DEPTH):
        if not entry.is_file():
            raise InputError(f"{entry.path} is not a file: take it out of the folder of the run")


def _check_brought(workdir: Path, theirs: Any, ours: Mapping[str, str]) -> None:
    if not isinstance(theirs, dict):
        raise InputError(f"{workdir / 'config.json'} is damaged: {BROUGHT} is no JSON object")
    for name in sorted({*theirs, *ours}):
        if name not in ours:
            raise InputError(
                f"workdir {workdir} holds a run with a {name} of its own, {theirs[name]}: "
                f"give it to fr.train as {name}="
            )
        if name not in theirs:
            raise InputError(
                f"workdir {workdir} holds a run whose {name} is that of its config, not "
                f"{ours[name]}: name another workdir"
            )
        if theirs[name] != ours[name]:
            raise InputError(
                f"workdir {workdir} holds a run with {theirs[name]} for its "
                f"{name}, not {ours[name]}: name another workdir"
            )


def write_description(
    workdir: Path, config: Config, data: Data, brought: Mapping[str, str]
) -> None:
    """Writes config.json and dataset.json.

    Args:
      workdir: the folder of the run.
      config: of the run.
      data: its splits.
      brought: see `check_workdir`; the keys in whose place that stands are left out.

    Raises:
      InputError: if the folder's run had other data.
      OSError: if they cannot be written.
    """
    dataset = _as_json(
        {
            "name": data.name,
            "class_names": data.train.class_names,
            "train_examples": len(data.train),
            "test_examples": len(data.test),
            "image_shape": data.train.image_shape,
            "mean": data.mean,
            "std": data.std,
            **data.facts,
        }
    )
    path = workdir / "dataset.json"
    if path.exists():
        stored = read_json(path)  # a key that an earlier version did not write is not compared
        if data.name.startswith(FOLDER):  # it may have another name: the pictures are compared
            stored["name"] = data.name
        if dataset | stored != dataset:
            raise InputError(f"the data is not what the run in {workdir} began with: see {path}")
    write_json(path, dataset)
    content = without_replaced(dataclasses.asdict(config), brought)
    write_json(workdir / "config.json", content | ({BROUGHT: brought} if brought else {}))


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes the folder, and keeps every other run out of it.

    The lock ends with the process, whatever ends it.

    Raises:
      InputError: if another run is in it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / ".lock")
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise InputError(f"another run is at work in {workdir}: name another --workdir") from error
    except OSError as error:
        raise InputError(f"cannot write workdir {workdir}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _as_json(content: Any) -> Any:
    """As it comes back from a JSON file: tuples as lists."""
    return json.loads(json.dumps(content))
