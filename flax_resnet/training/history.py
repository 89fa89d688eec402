"""What a run has been through: the part of it that is no array."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

# A line of metrics.jsonl, as README.md tells.
Record = dict[str, Any]

# What a record has at least; the second ones may be null.
_METRICS = ("epoch", "step", "train_loss", "train_accuracy", "images_per_second", "seconds")
_OPTIONAL_METRICS = ("test_loss", "test_accuracy", "learning_rate")
# Earlier versions lack these.
_LATER_METRICS = ("gradient_norm",)
# Of any version.
_MOST_ROLLBACKS = 1000


@dataclass
class History:
    """What a run has been through so far; with its `TrainState`, all that it goes on from.

    Attributes:
      records: a line of metrics.jsonl for every epoch that is done.
      losses, accuracies, gradient_norms: of the steps of the epoch that is not done.
      seconds: that these took.
      rollbacks: how often the run went back because loss or gradient was not finite; each
        time the examples come in another order, with other augmentation.
    """

    records: list[Record] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rollbacks: int = 0

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "History":
        """What a checkpoint holds of it.

        Raises:
          ValueError, KeyError, TypeError, OverflowError: if no run has written that.
        """
        history = cls(**{field.name: content[field.name] for field in fields(cls)})
        of_steps = (history.losses, history.accuracies, history.gradient_norms)
        for values in (history.records, *of_steps):
            if not isinstance(values, list):
                raise TypeError(f"{values!r} is no list")
        for record in history.records:
            check_record(record)
        check_numbers([history.seconds, *itertools.chain(*of_steps)])
        if type(history.rollbacks) is not int or not 0 <= history.rollbacks < _MOST_ROLLBACKS:
            raise ValueError(f"it went back {history.rollbacks!r} times")
        return history

    def add_steps(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Adds what steps of the epoch gave, see `train_step`; each [steps]."""
        self.losses += metrics["loss"].tolist()
        self.accuracies += metrics["accuracy"].tolist()
        self.gradient_norms += metrics["gradient_norm"].tolist()

    def means(self, start: int = 0, stop: int | None = None) -> Record:
        """Means over the steps of the epoch from `start` to before `stop`, counted from 0."""
        return {
            "train_loss": statistics.fmean(self.losses[start:stop]),
            "train_accuracy": statistics.fmean(self.accuracies[start:stop]),
            "gradient_norm": statistics.fmean(self.gradient_norms[start:stop]),
        }

    def end_epoch(self, record: Record) -> None:
        """Adds the record of the epoch, and begins the next."""
        self.records.append(record)
        self.losses, self.accuracies, self.gradient_norms, self.seconds = [], [], [], 0.0


def check_record(record: Any) -> None:
    """Raises ValueError, KeyError, TypeError or OverflowError for what is no `Record`."""
    check_numbers([record[name] for name in _METRICS])
    check_numbers([v for name in _OPTIONAL_METRICS if (v := record[name]) is not None])
    check_numbers([record[name] for name in _LATER_METRICS if name in record])


def check_numbers(values: Sequence[Any]) -> None:
    """Raises ValueError or OverflowError unless all are finite numbers."""
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{value!r} is not a number")


def best_of(records: Sequence[Record]) -> Record | None:
    """The first of the records with the highest test accuracy; None if there was no evaluation."""
    evaluated = [record for record in records if record["test_accuracy"] is not None]
    return max(evaluated, key=lambda record: record["test_accuracy"], default=None)
