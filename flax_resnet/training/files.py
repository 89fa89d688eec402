"""Files of a run's folder: config.json, dataset.json, metrics.jsonl, curves.png, and a lock."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import matplotlib.figure
import matplotlib.ticker

from flax_resnet.data import Dataset, Source
from flax_resnet.errors import InputError
from flax_resnet.training.checkpoint import Record, steps_in
from flax_resnet.training.config import Config

# Not what is computed, so it may change between two starts of one run.
_FREE_KEYS = (
    "data_dir",
    "data_feed",
    "stream_workers",
    "checkpoint_minutes",
    "keep_checkpoints",
    "on_nan",
)


def check_workdir(workdir: Path, config: Config) -> None:
    """Refuses a folder that cannot be written, or holds a run of another config.

    Raises:
      InputError: says which.
    """
    try:
        existing = next(p for p in [workdir, *workdir.absolute().parents] if p.exists())
    except OSError as error:  # a folder on the way is not to be looked into, a name too long
        raise InputError(f"cannot write workdir {workdir}: {error.strerror}") from error
    if not existing.is_dir():
        raise InputError(f"cannot write workdir {workdir}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write workdir {workdir}: {existing} is not writable")
    path = workdir / "config.json"
    if not path.exists():
        if steps_in(workdir):
            raise InputError(
                f"workdir {workdir} holds checkpoints without the config.json of their run: "
                "name another --workdir"
            )
        return
    # A key that an earlier version did not know has its default.
    theirs = _as_json(dataclasses.asdict(Config())) | read_json(path)
    ours = _as_json(dataclasses.asdict(config))
    keys = [key for key in sorted({*theirs, *ours}) if key not in _FREE_KEYS]
    other = [f"{k} ({theirs.get(k)} there)" for k in keys if theirs.get(k) != ours.get(k)]
    if other:
        raise InputError(
            f"workdir {workdir} holds a run of another config: {', '.join(other)}; "
            "name another --workdir"
        )


def write_description(
    workdir: Path,
    config: Config,
    train_set: Dataset | Source,
    test_set: Dataset | Source,
    statistics: tuple[Sequence[float], Sequence[float]],
) -> None:
    """Writes config.json and dataset.json.

    Args:
      workdir: the folder of the run.
      config: of the run.
      train_set, test_set: its splits.
      statistics: mean and std of its channels.

    Raises:
      InputError: if the folder's run had other data.
      OSError: if they cannot be written.
    """
    mean, std = statistics
    dataset = _as_json(
        {
            "name": config.dataset,
            "class_names": train_set.class_names,
            "train_examples": len(train_set),
            "test_examples": len(test_set),
            "image_shape": train_set.image_shape,
            "mean": mean,
            "std": std,
        }
    )
    path = workdir / "dataset.json"
    # A key that an earlier version did not write is not compared.
    if path.exists() and dataset | read_json(path) != dataset:
        raise InputError(f"the data is not what the run in {workdir} began with: see {path}")
    _write_json(path, dataset)
    _write_json(workdir / "config.json", dataclasses.asdict(config))


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


def begin_metrics(workdir: Path, records: Sequence[Record], has_checkpoint: bool) -> None:
    """Leaves in metrics.jsonl the lines of these records and no others.

    What follows them was torn off, or belongs to steps that will be done again.

    Raises:
      InputError: if the folder has lines of many epochs, and the run would begin anew.
    """
    path = workdir / "metrics.jsonl"
    content = path.read_bytes() if path.exists() else b""
    # A checkpoint is on disk at the latest when the second one after it is begun.
    epochs = content.count(b"\n")
    if epochs > 2 and not has_checkpoint:
        raise InputError(
            f"{path} has lines of {epochs} epochs, but there is no checkpoint to go on from: "
            "name another --workdir, or take it away to begin anew"
        )
    lines = "".join(_line(record) for record in records).encode()
    if content.startswith(lines):
        if len(content) > len(lines):
            os.truncate(path, len(lines))
    else:
        write_whole(path, lines.decode())


def append_metrics(workdir: Path, record: Record) -> None:
    """Adds a line to metrics.jsonl."""
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(_line(record))


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Draws loss and accuracy of training and test by epoch, if there is any."""
    if not records:
        return
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in records]
    marker = "." if len(epochs) < 40 else None
    for split in ("train", "test"):
        loss.plot(epochs, [r[f"{split}_loss"] for r in records], marker=marker, label=split)
        percent = [100 * r[f"{split}_accuracy"] for r in records]
        accuracy.plot(epochs, percent, marker=marker, label=split)
    for axes, label in ((loss, "loss"), (accuracy, "accuracy (%)")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _as_json(content: Any) -> Any:
    """As it comes back from a JSON file: tuples as lists."""
    return json.loads(json.dumps(content))


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      InputError: if it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it does not hold a JSON object")
    return content


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: Path, content: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)
