"""The files of a run's folder that are not checkpoints.

config.json, dataset.json, metrics.jsonl, events.out.tfevents.* and curves.png.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import tensorboard.summary
from ml_collections import ConfigDict

from flax_resnet.data import Dataset
from flax_resnet.errors import InputError

Record = dict[str, Any]

# Where the data lies may change between two starts of one run.
_FREE_KEYS = ("data_dir",)


def check_workdir(workdir: Path, config: ConfigDict) -> None:
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
    try:
        theirs = json.loads(path.read_text())
        names = theirs.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as the config of a run: {error}") from error
    ours = json.loads(config.to_json())
    keys = [k for k in sorted({*names, *ours}) if k not in _FREE_KEYS]
    other = [f"{k} ({theirs.get(k)} there)" for k in keys if theirs.get(k) != ours.get(k)]
    if other:
        raise InputError(
            f"workdir {workdir} holds a run of another config: {', '.join(other)}; "
            "name another --workdir"
        )


def write_description(
    workdir: Path,
    config: ConfigDict,
    train_set: Dataset,
    statistics: tuple[Sequence[float], Sequence[float]],
) -> None:
    """Makes the folder, and writes config.json and dataset.json.

    Raises:
      InputError: if they cannot be written, or the folder's run had other data.
    """
    mean, std = statistics
    dataset = {
        "name": config.dataset,
        "class_names": list(train_set.class_names),
        "train_examples": len(train_set),
        "mean": list(mean),
        "std": list(std),
    }
    path = workdir / "dataset.json"
    if path.exists() and json.loads(path.read_text()) != dataset:
        raise InputError(f"the data is not what the run in {workdir} began with: see {path}")
    _write_json(workdir / "config.json", json.loads(config.to_json()))
    _write_json(path, dataset)


def _write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def write_scalars(writer: tensorboard.summary.Writer, record: Record) -> None:
    """Shows a record in TensorBoard, as train/loss, test/loss, learning_rate, ..."""
    for name, value in record.items():
        if name not in ("epoch", "step"):
            writer.add_scalar(re.sub("^(train|test)_", r"\1/", name), value, record["step"])
    writer.flush()


def read_metrics(workdir: Path) -> list[Record]:
    """The records of metrics.jsonl; a last line that was torn off is cut from the file."""
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


def plot_curves(records: list[Record], path: Path) -> None:
    """Draws loss and accuracy of training and test by epoch."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    epochs = [r["epoch"] for r in records]
    for axes, metric, scale in zip(figure.subplots(1, 2), ("loss", "accuracy"), (1, 100)):
        for split in ("train", "test"):
            values = [r[f"{split}_{metric}"] * scale for r in records]
            axes.plot(epochs, values, marker="." if len(epochs) < 40 else None, label=split)
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss" if metric == "loss" else "accuracy (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
