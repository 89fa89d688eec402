"""The files of a run's folder that are not checkpoints.

config.json, dataset.json, metrics.jsonl, events.out.tfevents.* and curves.png.
"""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import tensorboard.summary

from flax_resnet.data import Dataset, Source
from flax_resnet.errors import InputError
from flax_resnet.training.config import Config

Record = dict[str, Any]

# Where the data lies and how it is read may change between two starts of one run.
_FREE_KEYS = ("data_dir", "data_feed", "stream_workers")


def check_workdir(workdir: Path, config: Config) -> None:
    """Refuses a folder that cannot be written, or holds a run of another config.

    Raises:
      InputError: says which.
    """
    existing = next(p for p in [workdir, *workdir.absolute().parents] if p.exists())
    if not existing.is_dir():
        raise InputError(f"cannot write workdir {workdir}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write workdir {workdir}: {existing} is not writable")
    path = workdir / "config.json"
    if not path.exists():
        return
    theirs, ours = _read_json(path), _as_json(dataclasses.asdict(config))
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
    statistics: tuple[Sequence[float], Sequence[float]],
) -> None:
    """Makes the folder, and writes config.json and dataset.json.

    Args:
      workdir: the folder.
      config: of the run.
      train_set: what it trains on.
      statistics: mean and std of its channels.

    Raises:
      InputError: if they cannot be written, or the folder's run had other data.
    """
    mean, std = statistics
    dataset = _as_json(
        {
            "name": config.dataset,
            "class_names": train_set.class_names,
            "train_examples": len(train_set),
            "mean": mean,
            "std": std,
        }
    )
    path = workdir / "dataset.json"
    if path.exists() and _read_json(path) != dataset:
        raise InputError(f"the data is not what the run in {workdir} began with: see {path}")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _write_json(path, dataset)
        _write_json(workdir / "config.json", dataclasses.asdict(config))
    except OSError as error:
        raise InputError(f"cannot write workdir {workdir}: {error}") from error


def read_metrics(workdir: Path) -> list[Record]:
    """The records of metrics.jsonl; a last line that was torn off is cut from the file.

    Raises:
      InputError: if a line before the last cannot be read.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def append_metrics(workdir: Path, record: Record) -> None:
    """Adds a line to metrics.jsonl."""
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def write_scalars(writer: tensorboard.summary.Writer, record: Record) -> None:
    """Shows a record in TensorBoard, as train/loss, test/loss, learning_rate, ..."""
    for name, value in record.items():
        if name not in ("epoch", "step"):
            writer.add_scalar(re.sub("^(train|test)_", r"\1/", name), value, record["step"])
    writer.flush()


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it does not hold a JSON object")
    return content


def _write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
