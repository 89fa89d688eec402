"""A run from its config to its last checkpoint."""

import contextlib
import math
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorboard.summary
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flax_resnet.errors import InputError
from flax_resnet.models import native
from flax_resnet.training import programs
from flax_resnet.training import workdir as files
from flax_resnet.training.checkpoint import open_checkpoints, restore_newest, save
from flax_resnet.training.compilation import keep_compiled_programs
from flax_resnet.training.config import Config, check_config
from flax_resnet.training.feeds import Data, Feed, open_data, open_feed
from flax_resnet.training.hosts import first_host_first
from flax_resnet.training.optimizer import learning_rate_schedule, sgd
from flax_resnet.training.progress import Progress, say
from flax_resnet.training.steps import Metrics, TrainState, create_state


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains a model on all devices, or goes on with the run that `workdir` holds.

    Writes config.json, dataset.json, checkpoints/ (the newest and the best state),
    metrics.jsonl (a line an epoch), TensorBoard's event files and curves.png.
    Progress goes to standard error: a bar on a terminal, plain lines elsewhere. Of
    several hosts the first writes and speaks; `workdir` is a folder that all of them see.

    Args:
      config: keys of `Config`, e.g. from `default_config`; those that it lacks have
        their defaults.
      workdir: folder of the run, made if need be.

    Returns:
      The state after the last step.

    Raises:
      InputError: if the config, the data or the folder cannot be used.
      FloatingPointError: if the loss becomes infinite or not a number.
    """
    checked = check_config(config)
    workdir = Path(workdir)
    files.check_workdir(workdir, checked)
    keep_compiled_programs()
    mesh = programs.make_mesh(checked.batch_size, checked.accumulation_steps)
    if mesh.size == 1 and mesh.devices.flat[0].platform == "cpu":
        # Its convolutions are compiled while the data is opened.
        threading.Thread(target=native.lanes, daemon=True).start()
    data = first_host_first("data", partial(open_data, checked, mesh))
    run = _plan(checked, data)
    model = programs.build_model(checked, len(data.train.class_names), mesh)
    optimizer = sgd(checked, run.learning_rate)
    first_host = jax.process_index() == 0
    records = []
    if first_host:
        files.write_description(workdir, checked, data.train, data.statistics)
        records = files.read_metrics(workdir)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(open_checkpoints(workdir)))
        state = restore_newest(checkpoints, _initial_state(run, model, optimizer, data, mesh))
        done_steps = int(state.step)
        done_epochs = math.ceil(done_steps / run.steps_per_epoch)
        devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
        if jax.process_count() > 1:
            devices += f" on {jax.process_count()} hosts"
        say(
            f"{checked.model} on {devices}, "
            f"{len(data.train)} training and {len(data.test)} test images, "
            f"{run.num_epochs} epochs, {done_epochs} of them done: {workdir}"
        )
        if first_host:
            stack.callback(files.plot_curves, records, workdir / "curves.png")
        if done_epochs == run.num_epochs:
            return state

        started = time.perf_counter()
        step = programs.make_train_step(
            checked,
            model,
            optimizer,
            statistics=data.statistics,
            steps_per_epoch=run.steps_per_epoch,
        )
        eval_step = programs.make_eval_step(model, statistics=data.statistics)
        to_do = range(done_steps, run.total_steps)
        feed = stack.enter_context(open_feed(checked, mesh, data, step, eval_step, state, to_do))
        say(f"compiled in {time.perf_counter() - started:.1f} s")

        writer = None
        if first_host:
            writer = tensorboard.summary.Writer(str(workdir))
            stack.enter_context(contextlib.closing(writer))
        images = [steps * checked.batch_size for steps in (run.total_steps, done_steps)]
        progress = stack.enter_context(Progress(run.num_epochs, *images))
        for epoch in range(done_epochs, run.num_epochs):
            state, record = _run_epoch(run, feed, state, epoch, progress)
            # The line may be there already, of a start that was cut off before the checkpoint.
            if writer is not None and epoch >= len(records):
                records.append(record)
                files.append_metrics(workdir, record)
                files.write_scalars(writer, record)
            save(checkpoints, state, record["test_accuracy"])
            say(_summary(record, run.num_epochs, progress.time_left()))
    return state


@dataclass(frozen=True)
class _Run:
    """The length of a run, and its learning rate by step."""

    config: Config
    steps_per_epoch: int
    total_steps: int
    learning_rate: optax.Schedule

    @property
    def num_epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def learning_rate_of(self, step: int) -> float:
        return float(jnp.asarray(self.learning_rate(step)))


def _plan(config: Config, data: Data) -> _Run:
    steps_per_epoch = len(data.train) // config.batch_size
    if not steps_per_epoch:
        raise InputError(f"batch_size={config.batch_size} of only {len(data.train)} examples")
    total_steps = config.num_steps or config.num_epochs * steps_per_epoch
    learning_rate = learning_rate_schedule(
        config, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    return _Run(config, steps_per_epoch, total_steps, learning_rate)


def _initial_state(run: _Run, model, optimizer, data: Data, mesh: Mesh) -> TrainState:
    create = partial(create_state, model, optimizer, image_shape=data.train.image_shape)
    init_key, _ = programs.random_keys(run.config.seed)
    # It runs once: seconds of optimisation would not pay.
    options = {"xla_backend_optimization_level": "0"}
    program = jax.jit(create, out_shardings=programs.replicated(mesh), compiler_options=options)
    return program(init_key)


def _run_epoch(
    run: _Run, feed: Feed, state: TrainState, epoch: int, progress: Progress
) -> tuple[TrainState, files.Record]:
    """Trains for an epoch, counted from 0, and evaluates; returns its line of metrics too."""
    first = epoch * run.steps_per_epoch
    last = min(first + run.steps_per_epoch, run.total_steps)
    started = time.perf_counter()
    losses, accuracies = [], []

    def fetch(metrics: Metrics) -> None:
        loss, accuracy = (np.atleast_1d(metrics[name]) for name in ("loss", "accuracy"))
        finite = np.isfinite(loss)
        if not finite.all():
            at = int(finite.argmin())
            step = first + len(losses) + at
            raise FloatingPointError(
                f"the loss is {loss[at]} at step {step + 1}, in epoch {epoch + 1}, with a "
                f"learning rate of {run.learning_rate_of(step):.3g}"
            )
        losses.extend(loss.tolist())
        accuracies.extend(accuracy.tolist())
        progress.step(epoch + 1, len(loss) * run.config.batch_size, loss, accuracy)

    # Fetched a call late, so that the device always has the next one to go on with.
    running = None
    step = first
    while step < last:
        count = feed.steps_a_call if last - step >= feed.steps_a_call else 1
        state, metrics = feed.advance(state, step, count)
        step += count
        if running is not None:
            fetch(running)
        running = metrics
    assert running is not None  # an epoch has a step
    fetch(running)
    trained = time.perf_counter()
    test = feed.evaluate(state)
    return state, {
        "epoch": epoch + 1,
        "step": last,
        "train_loss": math.fsum(losses) / len(losses),
        "train_accuracy": math.fsum(accuracies) / len(accuracies),
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "learning_rate": run.learning_rate_of(last - 1),
        "images_per_second": len(losses) * run.config.batch_size / (trained - started),
        "seconds": time.perf_counter() - started,
    }


def _summary(record: files.Record, num_epochs: int, time_left: str) -> str:
    return (
        f"epoch {record['epoch']}/{num_epochs}  "
        f"train loss {record['train_loss']:.4f} accuracy {record['train_accuracy']:.2%}  "
        f"test loss {record['test_loss']:.4f} accuracy {record['test_accuracy']:.2%}  "
        f"{record['images_per_second']:.0f} images/s  {time_left} left"
    )
