"""What a run has been through: the part of it that is no array."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# A line of metrics.jsonl, as README.md tells.
Record = dict[str, Any]


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

    @property
    def best(self) -> Record | None:
        """The first record with the highest test accuracy."""
        return best_of(self.records)

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


def best_of(records: Sequence[Record]) -> Record | None:
    """The first of the records with the highest test accuracy; None if there was no evaluation."""
    evaluated = [record for record in records if record["test_accuracy"] is not None]
    return max(evaluated, key=lambda record: record["test_accuracy"], default=None)
