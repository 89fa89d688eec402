"""What a run does, from its newest checkpoint to its last step."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import jax
import numpy as np

from flax_resnet.errors import InputError
from flax_resnet.progress import warn
from flax_resnet.training import programs
from flax_resnet.training.checkpoint import Checkpoints
from flax_resnet.training.feeds import Feed
from flax_resnet.training.history import History, Record
from flax_resnet.training.plan import Plan
from flax_resnet.training.profiler import Profiler
from flax_resnet.training.signals import Signals
from flax_resnet.training.steps import Metrics, TrainState
from flax_resnet.training.writers import Writer

_SECONDS_OF_A_SLOW_CALL = 1.0


@dataclass
class Loop:
    """A run at work.

    Attributes:
      state: after the last step that was begun.
      history: of the steps whose metrics have come; those of the last may be on their way.
    """

    plan: Plan
    feed: Feed
    checkpoints: Checkpoints
    signals: Signals
    profiler: Profiler
    writers: list[Writer]
    state: TrainState
    history: History

    _step: int = 0  # steps begun
    _end_of_epoch: int = 0
    _began: float = 0.0  # by time.perf_counter, with what earlier starts took of the epoch
    _running: list[Metrics] = field(default_factory=list)  # of calls that have not come back
    _seconds_a_call: float = 0.0

    def run(self) -> TrainState:
        """Trains to the last step.

        Raises:
          FloatingPointError: if the loss, its gradient or the state is not finite.
          KeyboardInterrupt, SystemExit: after a signal, when the state is written.
        """
        self._step = int(self.state.step)
        while len(self.history.records) < self.plan.num_epochs:
            self._begin_epoch()
            while self._step < self._end_of_epoch:
                if self.signals.ask():
                    self._stop()
                self._advance()
                if self._step < self._end_of_epoch and self.checkpoints.is_due():
                    self._fetch_all()
                    self._save()
            self._fetch_all()
            self._end_epoch(self._evaluate())
            self._save()
        self.checkpoints.finish()
        if self.signals.ask():
            warn(f"{self.signals.name}: the run was done")
            self.signals.stop()
        return self.state

    def _begin_epoch(self) -> None:
        first = len(self.history.records) * self.plan.steps_per_epoch
        self._end_of_epoch = min(first + self.plan.steps_per_epoch, self.plan.total_steps)
        self._began = time.perf_counter() - self.history.seconds

    def _stop(self) -> NoReturn:
        """Ends the run in order, after a signal."""
        self._keep()
        warn(
            f"{self.signals.name}: stopped after step {self._step}; "
            f"the same command with --workdir={self.plan.workdir} goes on from there"
        )
        self.signals.stop()

    def _keep(self) -> None:
        """Writes what is done, before the run ends."""
        self._fetch_all()
        if self.history.losses:  # else nothing is new since the last checkpoint
            self._save()
        self.checkpoints.finish()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Writes what is done where something cannot be read within, a file that is gone, say."""
        try:
            yield
        except InputError:
            if jax.process_count() == 1:  # other hosts know nothing, and Orbax would wait for them
                self._keep()
            raise

    def _advance(self) -> None:
        """Takes the next step, or the next few in one call."""
        called, left = time.perf_counter(), self._end_of_epoch - self._step
        count = self.feed.steps_a_call if left >= self.feed.steps_a_call else 1
        self.profiler.before(self._step, count)
        with self._reading():
            self.state, metrics = self.feed.advance(self.state, self._step, count)
        self._step += count
        self.profiler.after(self._step, self.state)
        self._running.append(metrics)
        # A call late, so that the device always has the next one to go on with; but a
        # signal should not have to wait for two slow ones. Hosts, whose clocks differ, do alike.
        is_slow = self._seconds_a_call >= _SECONDS_OF_A_SLOW_CALL and jax.process_count() == 1
        allowed = 0 if is_slow else 1
        while len(self._running) > allowed:
            self._fetch()
        self._seconds_a_call = time.perf_counter() - called

    def _fetch_all(self) -> None:
        while self._running:
            self._fetch()

    def _fetch(self) -> None:
        """Waits for the metrics of a call, and tells the writers of them."""
        metrics = jax.device_get(self._running.pop(0))
        self.history.seconds = time.perf_counter() - self._began
        if metrics["loss"].ndim == 0:
            metrics = {name: value[np.newaxis] for name, value in metrics.items()}
        first, count = self._steps_fetched, len(metrics["loss"])
        self._check_finite(metrics, first)
        self.history.add_steps(metrics)
        for writer in self.writers:
            writer.steps(self.history, metrics)
        for step in range(first + 1, first + count + 1):
            if step % self.plan.config.log_every == 0:
                record = self._record_of_steps(step)
                for writer in self.writers:
                    writer.log(record)

    @property
    def _steps_fetched(self) -> int:
        return len(self.history.records) * self.plan.steps_per_epoch + len(self.history.losses)

    def _record_of_steps(self, step: int) -> Record:
        """Means over the last `log_every` steps, or those of its epoch where these are fewer.

        A resumed run gives the same.
        """
        done = len(self.history.losses) - (self._steps_fetched - step)
        means = self.history.means(max(0, done - self.plan.config.log_every), done)
        # Of all steps of the epoch that are done, as the seconds: a call may have done more.
        images = len(self.history.losses) * self.plan.config.batch_size
        return {
            "step": step,
            "epoch": len(self.history.records) + 1,
            "loss": means["train_loss"],
            "accuracy": means["train_accuracy"],
            "gradient_norm": means["gradient_norm"],
            "learning_rate": self.plan.learning_rate_of(step - 1),
            "images_per_second": images / self.history.seconds,  # of the epoch so far
        }

    def _evaluate(self) -> dict[str, float | None]:
        """Loss and accuracy on the test split, of an epoch that is to have them."""
        epoch = len(self.history.records) + 1
        if epoch % self.plan.config.eval_every and epoch < self.plan.num_epochs:
            return {"test_loss": None, "test_accuracy": None}
        for writer in self.writers:
            writer.evaluating(epoch)
        with self._reading():
            test = self.feed.evaluate(self.state, self.signals.ask)
        if test is None:
            self._stop()
        if not math.isfinite(test["loss"]):
            raise self._not_finite(f"test loss is {test['loss']}", self._step)
        return {"test_loss": test["loss"], "test_accuracy": test["accuracy"]}

    def _end_epoch(self, test: dict[str, float | None]) -> None:
        images = len(self.history.losses) * self.plan.config.batch_size
        record: Record = {
            "epoch": len(self.history.records) + 1,
            "step": self._step,
            **self.history.means(),
            **test,
            "learning_rate": self.plan.learning_rate_of(self._step - 1),
            "images_per_second": images / self.history.seconds,
            "seconds": time.perf_counter() - self._began,
        }
        self.history.end_epoch(record)
        for writer in self.writers:
            writer.epoch(record, self.state)

    def _save(self) -> None:
        """Writes a checkpoint, if it is a good one to go back to."""
        if not programs.is_finite(self.state):
            raise self._not_finite("state is not finite", self._step)
        self.checkpoints.save(self.plan.unstacked(self.state), self.history)

    def _check_finite(self, metrics: Metrics, first: int) -> None:
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        finite = np.isfinite(loss + norm)
        if not finite.all():
            i = int(finite.argmin())
            bad = f"gradient norm is {norm[i]}" if np.isfinite(loss[i]) else f"loss is {loss[i]}"
            raise self._not_finite(bad, first + i + 1)

    def _not_finite(self, what: str, step: int) -> FloatingPointError:
        """The error of a step, counted from 1."""
        rate = self.plan.learning_rate_of(step - 1)
        rate = "" if rate is None else f", with a learning rate of {rate:.3g}"
        epoch = (step - 1) // self.plan.steps_per_epoch + 1
        return FloatingPointError(f"the {what} after step {step}, in epoch {epoch}{rate}")
