"""What the page shows of a run, and of several beside each other."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_resnet.data import Dataset, Examples
from flax_resnet.errors import InputError
from flax_resnet.evaluate import (
    Evaluation,
    evaluate,
    open_test_set,
    percent,
    percent_range,
    summarize,
)
from flax_resnet.maps import has_maps, heat, make_mapper
from flax_resnet.progress import duration
from flax_resnet.report.calibration import calibration
from flax_resnet.report.pictures import SMALL, data_url, filters
from flax_resnet.runs import Run
from flax_resnet.training import check_config
from flax_resnet.training.data import Split
from flax_resnet.training.history import best_of
from flax_resnet.training.own import without_replaced

_MISTAKES = 12
# A table of the confusions has so many classes at most.
_CLASSES = 20
# And a picture of them so many rows.
_SIDE = 500
_PAIRS = 6
_PICTURES_OF_A_PAIR = 4
_THUMBNAIL = 96
# Of the headline numbers, which of two is better.
_BETTER: dict[str, Callable[..., float]] = {
    "test accuracy": max,
    "top-5 accuracy": max,
    "best accuracy": max,
    "test loss": min,
    "calibration error": min,
    "time": min,
    "training speed": max,
    "parameters": min,
}


class Number(NamedTuple):
    """A headline number: as runs are compared by it, as it is written, and a remark on it."""

    value: float
    text: str
    remark: str


def describe(run: Run, data_dir: str | None, own_data: Dataset | Examples | None) -> dict[str, Any]:
    """All that the template asks for, by name; "problem" says why there is no evaluation."""
    described: dict[str, Any] = {
        "config": _config(run),
        "environment": run.hardware | run.versions,
        "class_names": run.class_names,
        "filters": filters(run),
        "is_small": max(run.image_shape) <= SMALL,
    }
    try:
        if run.model is None:
            raise InputError(f"its model, {run.brought['model']}, is its script's own")
        data = open_test_set(run, data_dir, own_data if "data" in run.brought else None)
        evaluation = evaluate(run, data)
    except InputError as error:
        return described | {"problem": str(error), "numbers": _numbers(run), "facts": _facts(run)}
    summary = summarize(run, evaluation)
    reliability = calibration(evaluation.probabilities.max(-1), evaluation.correct)
    return described | {
        "problem": None,
        "numbers": _numbers(run, summary, reliability["error"]),
        "facts": _facts(run),
        "confusion": _confusion(run, evaluation),
        "pairs": _pairs(run, data, evaluation),
        "classes": _classes(summary["classes"], evaluation),
        "calibration": reliability,
        "mistakes": _mistakes(run, data, evaluation),
    }


def _config(run: Run) -> list[tuple[str, str, bool]]:
    """Keys, their values, and whether these differ from the default."""
    defaults = check_config({})
    return [(name, f"{value}, of its own", True) for name, value in run.brought.items()] + [
        (key, str(value), value != getattr(defaults, key))
        for key, value in without_replaced(vars(run.config), run.brought).items()
    ]


def _numbers(
    run: Run, summary: dict[str, Any] | None = None, calibration_error: float = math.nan
) -> dict[str, Number]:
    """What stands large at the top, by name."""
    numbers: dict[str, Number] = {}
    if summary is not None:
        accuracy, top5, loss = (summary[k] for k in ("accuracy", "top5_accuracy", "loss"))
        interval = f"95% interval {percent_range(summary['interval'])}"
        numbers["test accuracy"] = Number(accuracy, percent(accuracy), interval)
        name = "cross-entropy" if "loss" in run.brought else "test loss"
        numbers[name] = Number(loss, f"{loss:.4f}", f"{summary['examples']:,} images")
        if len(run.class_names) > 5:
            numbers["top-5 accuracy"] = Number(top5, percent(top5), "among five classes")
        error = percent(calibration_error)
        numbers["calibration error"] = Number(calibration_error, error, "expected")
    records = run.records
    if best := best_of(records):
        accuracy, remark = best["test_accuracy"], f"after epoch {best['epoch']}"
        numbers["best accuracy"] = Number(accuracy, percent(accuracy), remark)
    if records:
        seconds = sum(record["seconds"] for record in records)
        of = f" of {run.config.num_epochs}" if not run.config.num_steps else ""
        numbers["time"] = Number(seconds, duration(seconds), f"{len(records)}{of} epochs")
        speed = float(np.median([record["images_per_second"] for record in records]))
        numbers["training speed"] = Number(speed, f"{speed:,.0f}", "images a second")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.variables["params"]))
    return numbers | {"parameters": Number(parameters, f"{parameters:,}", run.model_name)}


def _facts(run: Run) -> dict[str, str]:
    """What stands under the title."""
    config = run.config
    return {
        "model": run.model_name,
        "data": run.data_name,
        "splits": "-" if "data" in run.brought else f"{config.train_split}, {config.eval_split}",
        "checkpoint": f"the newest, step {run.step:,}",
        "evaluated in": np.dtype(getattr(run.model, "dtype", None) or np.float32).name,
    }


def compare(described: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns of a table with a row a run: headline numbers, then what of the config differs.

    Args:
      described: what `describe` gives of each run.

    Returns:
      For each column its "name", its "cells", of which "best" has the numbers, and whether it is
      of the "config".
    """
    columns = []
    for name, better in _BETTER.items():
        numbers = [about["numbers"].get(name) for about in described]
        values = [number.value for number in numbers if number]
        if values:
            is_tie = len(set(values)) == 1
            best = None if is_tie else better(values)
            columns.append(
                {
                    "name": name,
                    "cells": [number.text if number else "-" for number in numbers],
                    "best": {i for i, n in enumerate(numbers) if n and n.value == best},
                    "config": False,
                }
            )
    configs = [{key: value for key, value, _ in about["config"]} for about in described]
    for key in dict.fromkeys(key for config in configs for key in config):
        cells = [config.get(key, "-") for config in configs]
        if len(set(cells)) > 1:
            columns.append({"name": key, "cells": cells, "best": set(), "config": True})
    return columns


# Of the test split.


def confusion_matrix(evaluation: Evaluation, count: int) -> np.ndarray:
    """Numbers of examples, int [K, K]: a row a true class, a column a predicted one.

    Of more than 500 classes, `count`, neighbours are one.
    """
    side = min(count, _SIDE)
    labels, predictions = (
        classes.astype(np.int64) * side // count
        for classes in (evaluation.labels, evaluation.predictions)
    )
    return np.bincount(labels * side + predictions, minlength=side**2).reshape(side, side)


def _confusion(run: Run, evaluation: Evaluation) -> dict[str, Any]:
    """Rows for a table, or a picture where there are many classes."""
    matrix = confusion_matrix(evaluation, len(run.class_names))
    # The root, for mistakes to be seen beside what is right.
    tint = np.sqrt(matrix / np.maximum(matrix.sum(1, keepdims=True), 1))
    if len(matrix) > _CLASSES:
        color = np.broadcast_to((140, 90, 190), (*tint.shape, 3))  # seen on light and dark paper
        pixels = np.dstack([color, 255 * tint]).round().astype(np.uint8)
        return {"rows": None, "picture": data_url(pixels)}
    return {
        "rows": [
            (
                name,
                [
                    (int(n), round(20 + 65 * t), i == j)
                    for j, (n, t) in enumerate(zip(*row, strict=True))
                ],
            )
            for i, (name, *row) in enumerate(zip(run.class_names, matrix, tint, strict=True))
        ]
    }


def _classes(classes: list[dict[str, Any]], evaluation: Evaluation) -> list[dict[str, Any]]:
    """Of each class name, examples, precision, recall and F1; None where there is nothing."""
    predictions, count = evaluation.predictions, len(classes)
    predicted = np.bincount(predictions, minlength=count)
    hits = np.bincount(predictions[evaluation.correct], minlength=count)
    described = []
    for i, one in enumerate(classes):
        seen = one["examples"] + predicted[i]  # F1 = 2 hits / (examples + predicted)
        described.append(
            {
                "name": one["name"],
                "examples": one["examples"],
                "recall": one["accuracy"],
                "interval": one["interval"],
                "precision": hits[i] / predicted[i] if predicted[i] else None,
                "f1": 2 * hits[i] / seen if seen else None,
            }
        )
    return described


def _pairs(run: Run, data: Split, evaluation: Evaluation) -> list[dict[str, Any]]:
    """What is most often taken for what, with the surest of these mistakes."""
    wrong = ~evaluation.correct
    mistakes = np.stack([evaluation.labels[wrong], evaluation.predictions[wrong]], axis=1)
    of_all, counts = np.unique(mistakes, axis=0, return_counts=True)
    pairs = []
    for pair in np.argsort(-counts, stable=True)[:_PAIRS]:
        label, predicted = of_all[pair]
        is_one = (evaluation.labels == label) & (evaluation.predictions == predicted)
        shown = _surest(evaluation, np.flatnonzero(is_one))[:_PICTURES_OF_A_PAIR]
        images, _ = data.read(shown)
        pairs.append(
            {
                "label": run.class_names[label],
                "prediction": run.class_names[predicted],
                "count": int(counts[pair]),
                "share": counts[pair] / (evaluation.labels == label).sum(),
                "pictures": [
                    (int(i), data_url(image, _THUMBNAIL))
                    for i, image in zip(shown, images, strict=True)
                ],
            }
        )
    return pairs


def _surest(evaluation: Evaluation, examples: np.ndarray) -> np.ndarray:
    """The examples, int [n], those with the most probable predictions first."""
    confidence = _only(evaluation, examples).probabilities.max(-1)
    return examples[np.argsort(-confidence, stable=True)]


def _only(evaluation: Evaluation, examples: np.ndarray) -> Evaluation:
    return Evaluation(evaluation.logits[examples], evaluation.labels[examples])


def _mistakes(run: Run, data: Split, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The surest mistakes; with them where the net saw its class, and where the true one."""
    shown = _surest(evaluation, np.flatnonzero(~evaluation.correct))[:_MISTAKES]
    if not len(shown):
        return []
    images, labels = data.read(shown)
    only = _only(evaluation, shown)
    predictions, probabilities = only.predictions, only.probabilities
    maps: list[list[str]] = [[] for _ in shown]
    if has_maps(run):
        activation_maps = make_mapper(run)
        of_both = np.stack([activation_maps(images, c) for c in (predictions, labels)], axis=1)
        maps = [[data_url(heat(one, both.max())) for one in both] for both in of_both]
    height, width = run.image_shape[:2]
    return [
        {
            "index": int(i),
            "picture": data_url(images[n]),
            "maps": maps[n],
            "height": height / width,
            "prediction": run.class_names[predictions[n]],
            "probability": probabilities[n, predictions[n]],
            "label": run.class_names[labels[n]],
            "own_probability": probabilities[n, labels[n]],
        }
        for n, i in enumerate(shown)
    ]
