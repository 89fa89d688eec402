"""A run from its config to its last checkpoint."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import jax
import jax.numpy as jnp
import tensorboard.summary
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flax_resnet.data import Dataset, channel_statistics, load_dataset
from flax_resnet.errors import InputError
from flax_resnet.training import programs
from flax_resnet.training import workdir as files
from flax_resnet.training.checkpoint import open_checkpoints, restore_newest, save
from flax_resnet.training.config import Config, check_config
from flax_resnet.training.optimizer import learning_rate_schedule, sgd
from flax_resnet.training.progress import Progress, say
from flax_resnet.training.steps import Batch, TrainState, create_state


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains a model on all devices, or goes on with the run that `workdir` holds.

    Writes config.json, dataset.json, checkpoints/ (the newest and the best state),
    metrics.jsonl (a line an epoch), TensorBoard's event files and curves.png.
    Progress goes to standard error: a bar on a terminal, plain lines elsewhere.

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
    mesh = programs.make_mesh(checked.batch_size)
    train_set = load_dataset(checked.dataset, checked.train_split, checked.data_dir)
    test_set = load_dataset(checked.dataset, checked.eval_split, checked.data_dir)
    run = _set_up(checked, mesh, train_set, test_set)
    files.write_description(workdir, checked, train_set, run.statistics)
    records = files.read_metrics(workdir)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(open_checkpoints(workdir)))
        writer = stack.enter_context(contextlib.closing(tensorboard.summary.Writer(str(workdir))))
        stack.callback(files.plot_curves, records, workdir / "curves.png")

        state = restore_newest(checkpoints, run.initial_state)
        done_steps = int(state.step)
        done_epochs = math.ceil(done_steps / run.steps_per_epoch)
        say(
            f"{checked.model} on {mesh.size} x {mesh.devices.flat[0].device_kind}, "
            f"{len(train_set)} training and {len(test_set)} test images, "
            f"{run.num_epochs} epochs, {done_epochs} of them done: {workdir}"
        )
        if done_epochs == run.num_epochs:
            return state
        train_step, evaluate = _compile(run, state)
        images = [steps * checked.batch_size for steps in (run.total_steps, done_steps)]
        progress = stack.enter_context(Progress(run.num_epochs, *images))
        for epoch in range(done_epochs, run.num_epochs):
            state, record = _run_epoch(run, train_step, evaluate, state, epoch, progress)
            # The line may be there already, of a start that was cut off before the checkpoint.
            if epoch >= len(records):
                records.append(record)
                files.append_metrics(workdir, record)
                files.write_scalars(writer, record)
            save(checkpoints, state, record["test_accuracy"])
            say(_summary(record, run.num_epochs, progress.time_left()))
    return state


@dataclass(frozen=True)
class _Run:
    """What stays the same from the first step of a run to its last."""

    config: Config
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    steps_per_epoch: int
    total_steps: int
    learning_rate: Callable[[int], float]
    train_data: Batch
    test_data: Batch
    initial_state: TrainState
    order: Callable[[int], jax.Array]
    train_program: jax.stages.Wrapped
    eval_program: jax.stages.Wrapped
    eval_batch_size: int

    @property
    def num_epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)


def _set_up(config: Config, mesh: Mesh, train_set: Dataset, test_set: Dataset) -> _Run:
    """Puts the data on the devices, and builds the model, its state and the programs."""
    steps_per_epoch = len(train_set) // config.batch_size
    if not steps_per_epoch:
        raise InputError(f"batch_size={config.batch_size} of only {len(train_set)} examples")
    total_steps = config.num_steps or config.num_epochs * steps_per_epoch
    learning_rate = learning_rate_schedule(
        config, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    platform = mesh.devices.flat[0].platform
    model = programs.build_model(config, len(train_set.class_names), platform)
    optimizer = sgd(config, learning_rate)
    statistics = channel_statistics(train_set.images)

    train_data, test_data = (programs.put_dataset(d, mesh) for d in (train_set, test_set))
    replicated = programs.replicated(mesh)
    init_key, order_key, _ = programs.random_keys(config.seed)
    create = partial(create_state, model, optimizer, image_shape=train_set.images.shape[1:])
    order = partial(programs.epoch_order, order_key, num_examples=len(train_set))
    eval_batch_size = math.ceil(config.eval_batch_size / mesh.size) * mesh.size
    return _Run(
        config=config,
        statistics=statistics,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        learning_rate=lambda step: float(jnp.asarray(learning_rate(step))),
        train_data=train_data,
        test_data=test_data,
        initial_state=jax.jit(create, out_shardings=replicated)(init_key),
        order=jax.jit(order, out_shardings=replicated),
        train_program=programs.make_train_program(
            config,
            model,
            optimizer,
            mesh,
            statistics=statistics,
            steps_per_epoch=steps_per_epoch,
        ),
        eval_program=programs.make_eval_program(
            model, mesh, batch_size=eval_batch_size, statistics=statistics
        ),
        eval_batch_size=eval_batch_size,
    )


def _compile(
    run: _Run, state: TrainState
) -> tuple[jax.stages.Compiled, Callable[[TrainState], dict[str, float]]]:
    """Compiles training step and evaluation ahead, so that no epoch's time has it in."""
    started = time.perf_counter()
    train_step = run.train_program.lower(state, run.train_data, run.order(0)).compile()
    eval_step = run.eval_program.lower(state, run.test_data, jnp.int32(0)).compile()
    say(f"compiled in {time.perf_counter() - started:.1f} s")
    evaluate = partial(
        programs.evaluate, eval_step, data=run.test_data, batch_size=run.eval_batch_size
    )
    return train_step, evaluate


def _run_epoch(
    run: _Run,
    train_step: jax.stages.Compiled,
    evaluate: Callable[[TrainState], dict[str, float]],
    state: TrainState,
    epoch: int,
    progress: Progress,
) -> tuple[TrainState, files.Record]:
    """Trains for an epoch, counted from 0, and evaluates; returns its line of metrics too."""
    first = epoch * run.steps_per_epoch
    steps = min(run.steps_per_epoch, run.total_steps - first)
    order = run.order(epoch)
    started = time.perf_counter()
    losses, accuracies = [], []
    loss_sum = accuracy_sum = 0.0  # for the bar: the sum of the lists grows with the epoch

    def fetch(metrics: dict[str, jax.Array]) -> None:
        nonlocal loss_sum, accuracy_sum
        loss, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
        step = first + len(losses)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {step + 1}, in epoch {epoch + 1}, with a learning "
                f"rate of {run.learning_rate(step):.3g}"
            )
        losses.append(loss)
        accuracies.append(accuracy)
        loss_sum, accuracy_sum, count = loss_sum + loss, accuracy_sum + accuracy, len(losses)
        progress.step(epoch + 1, run.config.batch_size, loss_sum / count, accuracy_sum / count)

    # Fetched a step late, so that the device always has the next one to go on with.
    running = None
    for _ in range(steps):
        state, metrics = train_step(state, run.train_data, order)
        if running is not None:
            fetch(running)
        running = metrics
    assert running is not None  # an epoch has a step
    fetch(running)
    trained = time.perf_counter()
    test = evaluate(state)
    return state, {
        "epoch": epoch + 1,
        "step": first + steps,
        "train_loss": fmean(losses),
        "train_accuracy": fmean(accuracies),
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "learning_rate": run.learning_rate(first + steps - 1),
        "images_per_second": steps * run.config.batch_size / (trained - started),
        "seconds": time.perf_counter() - started,
    }


def _summary(record: files.Record, num_epochs: int, time_left: str) -> str:
    return (
        f"epoch {record['epoch']}/{num_epochs}  "
        f"train loss {record['train_loss']:.4f} accuracy {record['train_accuracy']:.2%}  "
        f"test loss {record['test_loss']:.4f} accuracy {record['test_accuracy']:.2%}  "
        f"{record['images_per_second']:.0f} images/s  {time_left} left"
    )
