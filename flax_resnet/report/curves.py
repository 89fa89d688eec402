"""The numbers that a report draws, and how its runs look."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax_resnet.progress import warn
from flax_resnet.runs import Run
from flax_resnet.training.history import Record
from flax_resnet.training.jsonfiles import read_text

# Okabe and Ito's, which the colour-blind tell apart, without black and yellow, which are not seen
# on one of the papers.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
# SVG paths around a point: circle, square, triangle, diamond, x. Five, so that the next six runs
# have other ones in the same colours.
MARKERS = (
    "m-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0",
    "m-2.8,-2.8h5.6v5.6h-5.6z",
    "m0,-3.8l3.7,6.6h-7.4z",
    "m0,-4.2l4,4.2l-4,4.2l-4,-4.2z",
    "m-3,-3l6,6m0,-6l-6,6",
)
# More points than a chart has pixels are not seen.
_POINTS = 1000
_DIGITS = 5


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The charts, each of all runs.

    Returns:
      For each chart its "name", what its "x" is, "epoch" or "step", whether it is drawn as "log",
      and its "lines", each with the number of its "run", its "split", "test", "train" or "", and
      its points, "x" and "y".
    """
    epochs = [list(run.records) for run in runs]
    # A short run has few lines in steps.jsonl, or none.
    steps = [max(_read_steps(run), list(run.records), key=len) for run in runs]

    def accuracy(value: float) -> float:
        return 100 * value

    def error(value: float) -> float:
        return 100 * (1 - value)

    splits = ("test", "train")
    shown = [
        _chart("Accuracy (%)", "epoch", epochs, {s: f"{s}_accuracy" for s in splits}, accuracy),
        _chart("Error (%)", "epoch", epochs, {s: f"{s}_accuracy" for s in splits}, error, log=True),
        _chart("Loss", "epoch", epochs, {s: f"{s}_loss" for s in splits}, log=True),
        _chart("Learning rate", "step", steps, {"": "learning_rate"}),
        _chart("Gradient norm", "step", steps, {"": "gradient_norm"}, log=True),
        _chart("Training images per second", "epoch", epochs, {"": "images_per_second"}),
    ]
    return [chart for chart in shown if chart["lines"]]


def _chart(
    name: str,
    x: str,
    records_of_runs: Sequence[Sequence[Record]],
    keys: Mapping[str, str],
    change: Callable[[float], float] = float,
    *,
    log: bool = False,
) -> dict[str, Any]:
    """A chart of the values under the keys, by their splits."""
    lines = []
    for run, records in enumerate(records_of_runs):
        for split, key in keys.items():
            points = [
                (record[x], _rounded(change(record[key])))
                for record in records
                if record.get(key) is not None
            ]
            points = points[:: math.ceil(len(points) / _POINTS)] if points else []
            if points:
                xs, ys = zip(*points, strict=True)
                lines.append({"run": run, "split": split, "x": xs, "y": ys})
    return {"name": name, "x": x, "log": log, "lines": lines}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _read_steps(run: Run) -> list[Record]:
    """The lines of steps.jsonl, without those that are none."""
    path = run.workdir / "steps.jsonl"
    try:
        return list(_records(read_text(path, errors="replace").splitlines()))
    except FileNotFoundError:  # of an earlier version
        return []
    except (OSError, ValueError) as error:
        warn(f"{path} cannot be read: {error}; the curves go by epochs")
        return []


def _records(lines: Iterable[str]) -> Iterable[Record]:
    for line in lines:
        try:
            record = json.loads(line)
            rate = record["learning_rate"]
            numbers = [record["step"], 0 if rate is None else rate, record["gradient_norm"]]
            if all(math.isfinite(number) for number in numbers):
                yield record
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
