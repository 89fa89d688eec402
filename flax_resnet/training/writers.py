"""What is written of a run while it goes on, behind one interface.

A further writer is one more class, and one more object in the list of `open_writers`.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.data.batches import read_for_epoch
from flax_resnet.errors import InputError
from flax_resnet.progress import Progress, duration, say, warn
from flax_resnet.training import programs, tensorboard
from flax_resnet.training.history import History, Record, best_of
from flax_resnet.training.jsonfiles import read_text, write_whole
from flax_resnet.training.plan import Plan
from flax_resnet.training.steps import TrainState, split_layers

_IMAGES_SHOWN = 64


class Writer:
    """What writes something of a run; each method does nothing unless overridden.

    All methods raise OSError where a file cannot be written.
    """

    def steps(self, history: History, metrics: Mapping[str, np.ndarray]) -> None:
        """Steps are done, and in the history; their metrics, [steps, ...]."""

    def log(self, record: Record) -> None:
        """A line of steps.jsonl: `log_every` steps are done since the last."""

    def evaluating(self, epoch: int) -> None:
        """The steps of this epoch, counted from 1, are done; the test split is next."""

    def epoch(self, record: Record, state: TrainState) -> None:
        """A line of metrics.jsonl: an epoch is done."""

    def close(self) -> None:
        """The run ends here, in order or not."""


@contextlib.contextmanager
def open_writers(plan: Plan, state: TrainState, history: History) -> Iterator[list[Writer]]:
    """All writers of a run that goes on from here; of several hosts the first has them."""
    kinds = (MetricsFile, StepsFile, TensorBoard, ProgressBar)
    with contextlib.ExitStack() as stack:
        writers = []
        for kind in kinds if jax.process_index() == 0 else ():
            writers.append(kind(plan, state, history))
            stack.callback(writers[-1].close)
        yield writers


def take_up_files(plan: Plan, history: History, step: int, *, has_checkpoint: bool) -> None:
    """Leaves in metrics.jsonl and steps.jsonl what belongs to the steps before, and no more.

    What follows was torn off, or belongs to steps that will be done again.

    Raises:
      InputError: if the folder has lines of many epochs, and the run would begin anew.
    """
    path = plan.workdir / "metrics.jsonl"
    # A checkpoint is on disk at the latest when the second one after it is begun.
    epochs = _read(path).count("\n")
    if epochs > 2 and not has_checkpoint:
        raise InputError(
            f"{path} has lines of {epochs} epochs, but there is no checkpoint to go on from: "
            "name another --workdir, or delete that file to begin anew"
        )
    _leave(path, map(_line, history.records))
    path = plan.workdir / "steps.jsonl"
    whole = (line for line in _read(path).splitlines(keepends=True) if line.endswith("\n"))
    _leave(path, (line for line in whole if _step_of(line) <= step))


def _leave(path: Path, lines: Iterable[str]) -> None:
    content, wanted = _read(path), "".join(lines)
    if content.startswith(wanted):
        if content != wanted:
            os.truncate(path, len(wanted.encode()))
    else:
        write_whole(path, wanted)


def _read(path: Path) -> str:
    try:
        return read_text(path, errors="replace")
    except FileNotFoundError:
        return ""
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}; delete it to go on") from error


def _step_of(line: str) -> float:
    """Infinite for what is no line of steps.jsonl."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return float("inf")


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


class MetricsFile(Writer):
    """metrics.jsonl, a line an epoch, and curves.png at the end."""

    def __init__(self, plan: Plan, state: TrainState, history: History):
        self._workdir, self._history = plan.workdir, history

    def epoch(self, record: Record, state: TrainState) -> None:
        with (self._workdir / "metrics.jsonl").open("a") as file:
            file.write(_line(record))

    def close(self) -> None:
        write_curves(self._workdir, self._history.records)


def write_curves(workdir: Path, records: Sequence[Record]) -> None:
    """Draws curves.png; says so where it cannot, if nothing worse is to be said."""
    before = sys.exc_info()[1]
    try:
        plot_curves(records, workdir / "curves.png")
    except OSError as error:  # which is not to stand in the way of how the run has ended
        if not isinstance(before, InputError | OSError):  # of the same full disk
            warn(f"there is no curves.png: {error}")


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Draws loss and accuracy of training and test by epoch, if there is any."""
    if not records:
        return
    import matplotlib.figure  # with ticker a third of a second
    import matplotlib.ticker

    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for split in ("train", "test"):
        shown = [record for record in records if record[f"{split}_loss"] is not None]
        epochs = [record["epoch"] for record in shown]
        marker = "." if len(epochs) < 40 else None
        loss.plot(epochs, [r[f"{split}_loss"] for r in shown], marker=marker, label=split)
        percent = [100 * r[f"{split}_accuracy"] for r in shown]
        accuracy.plot(epochs, percent, marker=marker, label=split)
    for axes, label in ((loss, "loss"), (accuracy, "accuracy (%)")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


class StepsFile(Writer):
    """steps.jsonl, a line every `log_every` steps."""

    def __init__(self, plan: Plan, state: TrainState, history: History):
        self._path = plan.workdir / "steps.jsonl"

    def log(self, record: Record) -> None:
        with self._path.open("a") as file:
            file.write(_line(record))


class TensorBoard(Writer):
    """Two event files, the second, in test/, of the test split; see `tensorboard`."""

    def __init__(self, plan: Plan, state: TrainState, history: History):
        self._frozen = plan.config.freeze
        self._layer_norms: list[np.ndarray] = []
        self._writer = tensorboard.open_writer(plan.workdir, int(state.step))
        self._test_writer = tensorboard.open_writer(plan.workdir / "test", int(state.step))
        if not history.records:
            tensorboard.write_config(self._writer, vars(plan.config) | plan.brought)
            tensorboard.write_images(self._writer, _first_inputs(plan, history.rollbacks))

    def steps(self, history: History, metrics: Mapping[str, np.ndarray]) -> None:
        self._layer_norms.append(metrics["layer_gradient_norms"])

    def log(self, record: Record) -> None:
        values = {name: value for name, value in record.items() if name not in ("epoch", "step")}
        tensorboard.write_scalars(self._writer, record["step"], "step", values)

    def epoch(self, record: Record, state: TrainState) -> None:
        tensorboard.write_epoch(self._writer, self._test_writer, record)
        scales = {p: v for p, v in flatten_dict(state.params).items() if p[-1] == "scale"}
        gradients = {}
        if self._layer_norms:  # else an earlier start of the run did all steps of this epoch
            norms = np.concatenate(self._layer_norms)
            gradients = split_layers(norms, state.params, self._frozen)
            self._layer_norms = []
        tensorboard.write_histograms(
            self._writer, record["step"], unflatten_dict(jax.device_get(scales)), gradients
        )

    def close(self) -> None:
        self._writer.close()
        self._test_writer.close()


def _first_inputs(plan: Plan, rollbacks: int) -> np.ndarray:
    """The first training images as they are cropped, flipped, ... in the first epoch.

    What random_erasing, mixup and cutmix make of them is not in it.
    """
    train = plan.data.train
    index = np.arange(min(_IMAGES_SHOWN, len(train)))
    images, _ = read_for_epoch(train, index, plan.config.seed, 0, rollbacks)
    augment = programs.make_augment(plan, rollbacks)
    return np.asarray(jax.jit(augment)(images, index, 0))


class ProgressBar(Writer):
    """Standard error: a bar on a terminal, lines elsewhere, a line an epoch, and how it ended."""

    def __init__(self, plan: Plan, state: TrainState, history: History):
        self._plan, self._history = plan, history
        self._batch_size = plan.config.batch_size
        # Of the epoch so far, of which an earlier start may have done a part.
        self._steps = len(history.losses)
        self._sums = np.array([sum(history.losses), sum(history.accuracies)], np.float64)
        total, done = plan.total_steps, int(state.step)
        self._progress = Progress(
            plan.num_epochs, total * self._batch_size, done * self._batch_size
        )

    def steps(self, history: History, metrics: Mapping[str, np.ndarray]) -> None:
        loss, accuracy = metrics["loss"], metrics["accuracy"]
        self._steps += len(loss)
        self._sums += [loss.sum(dtype=np.float64), accuracy.sum(dtype=np.float64)]
        epoch, images = len(history.records) + 1, len(loss) * self._batch_size
        self._progress.step(epoch, images, *(self._sums / self._steps))

    def evaluating(self, epoch: int) -> None:
        self._progress.evaluating(epoch)

    def epoch(self, record: Record, state: TrainState) -> None:
        splits = [
            f"{split} loss {record[f'{split}_loss']:.4f} accuracy {record[f'{split}_accuracy']:.2%}"
            for split in ("train", "test")
            if record[f"{split}_loss"] is not None
        ]
        if record["test_loss"] is not None:
            self._progress.evaluated()
        self._steps, self._sums = 0, np.zeros(2)
        epoch = f"epoch {record['epoch']}/{self._plan.num_epochs}"
        speed = f"{record['images_per_second']:.0f} images/s"
        say("  ".join([epoch, *splits, speed, f"{self._progress.time_left()} left"]))

    def close(self) -> None:
        self._progress.close()
        records, error = self._history.records, sys.exc_info()[1]
        # Not of a run whose end could not be written.
        if len(records) == self._plan.num_epochs and not isinstance(error, Exception):
            say(ending(records))
            say(f"TensorBoard: tensorboard --logdir {self._plan.workdir}")


def ending(records: Sequence[Record]) -> str:
    """How a run has ended: its time, and its last and its best test accuracy."""
    line = f"done in {duration(sum(record['seconds'] for record in records))}"
    last, best = records[-1], best_of(records)
    if best is None or last["test_accuracy"] is None:
        return line
    line += f": test accuracy {last['test_accuracy']:.2%} after epoch {last['epoch']}"
    if best["test_accuracy"] == last["test_accuracy"]:
        return f"{line}, the best"
    return f"{line}, the best {best['test_accuracy']:.2%} after epoch {best['epoch']}"
