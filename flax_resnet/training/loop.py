"""A run from its config to its last checkpoint."""

import contextlib
import math
import time
from collections.abc import Callable
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

from flax_resnet.data import Dataset, channel_statistics, load_dataset
from flax_resnet.errors import InputError
from flax_resnet.training import programs
from flax_resnet.training import workdir as files
from flax_resnet.training.checkpoint import open_checkpoints, restore_newest, save
from flax_resnet.training.config import check_config
from flax_resnet.training.optimizer import learning_rate_schedule, sgd
from flax_resnet.training.progress import Progress
from flax_resnet.training.steps import Batch, TrainState, create_state


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains a model, or goes on with the run that `workdir` holds.

    Writes config.json, dataset.json, checkpoints/ (the newest and the best state),
    metrics.jsonl (a line an epoch), TensorBoard's event files and curves.png.
    Progress goes to standard error: a bar on a terminal, plain lines elsewhere.

    Args:
      config: see `default_config`; missing keys have their defaults.
      workdir: folder of the run, made if need be.

    Returns:
      The state after the last step.

    Raises:
      InputError: if the config, the data or the folder cannot be used.
      FloatingPointError: if the loss becomes infinite or not a number.
    """
    config = check_config(config)
    workdir = Path(workdir)
    files.check_workdir(workdir, config)
    mesh = programs.make_mesh(config.batch_size)
    train_set = load_dataset(config.dataset, config.train_split, config.data_dir)
    test_set = load_dataset(config.dataset, config.eval_split, config.data_dir)

    run = _set_up(config, mesh, train_set, test_set)
    files.write_description(workdir, config, train_set, run.statistics)
    records = files.read_metrics(workdir)
    with (
        contextlib.closing(open_checkpoints(workdir)) as checkpoints,
        contextlib.closing(tensorboard.summary.Writer(str(workdir))) as writer,
    ):
        state = restore_newest(checkpoints, run.initial_state)
        done_epochs = math.ceil(int(state.step) / run.steps_per_epoch)
        images = config.batch_size * np.array([run.total_steps, int(state.step)])
        with Progress(run.num_epochs, *images.tolist()) as progress:
            progress.say(
                f"{config.model} on {mesh.size} x {mesh.devices.flat[0].device_kind}: "
                f"{len(train_set)} training and {len(test_set)} test images, "
                f"{run.num_epochs} epochs, {done_epochs} of them done, in {workdir}"
            )
            if done_epochs < run.num_epochs:
                train_step, evaluate = _compile(run, state, progress)
            for epoch in range(done_epochs, run.num_epochs):
                started = time.perf_counter()
                state, train_metrics = _train_epoch(run, train_step, state, epoch, progress)
                trained = time.perf_counter()
                test_metrics = evaluate(state)
                step = int(state.step)
                record = {
                    "epoch": epoch + 1,
                    "step": step,
                    **{f"train_{name}": value for name, value in train_metrics.items()},
                    **{f"test_{name}": value for name, value in test_metrics.items()},
                    "learning_rate": float(run.learning_rate(step - 1)),
                    "images_per_second": (
                        (step - epoch * run.steps_per_epoch)
                        * config.batch_size
                        / (trained - started)
                    ),
                    "seconds": time.perf_counter() - started,
                }
                if epoch >= len(records):  # else a run that was cut off before its checkpoint
                    records.append(record)
                    files.append_metrics(workdir, record)
                    files.write_scalars(writer, record)
                save(checkpoints, state, record["test_accuracy"])
                progress.say(_summary(record, run.num_epochs, progress.time_left()))
    files.plot_curves(records, workdir / "curves.png")
    return state


@dataclass(frozen=True)
class _Run:
    """What stays the same from the first step of a run to its last."""

    config: ConfigDict
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    steps_per_epoch: int
    total_steps: int
    learning_rate: optax.Schedule
    train_data: Batch
    test_data: Batch
    initial_state: TrainState
    train_program: programs.TrainProgram
    eval_program: programs.EvalProgram
    eval_batch_size: int
    order: Callable[[int], jax.Array]

    @property
    def num_epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)


def _set_up(config: ConfigDict, mesh: Mesh, train_set: Dataset, test_set: Dataset) -> _Run:
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
    eval_batch_size = math.ceil(config.eval_batch_size / mesh.size) * mesh.size
    train_data, test_data = (programs.put_dataset(d, mesh) for d in (train_set, test_set))
    replicated = train_data["label"].sharding
    init_key, order_key, _ = programs.random_keys(config.seed)
    create = partial(create_state, model, optimizer, image_shape=train_set.images.shape[1:])
    order = partial(programs.epoch_order, order_key, num_examples=len(train_set))
    return _Run(
        config=config,
        statistics=statistics,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        learning_rate=learning_rate,
        train_data=train_data,
        test_data=test_data,
        initial_state=jax.jit(create, out_shardings=replicated)(init_key),
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
        order=jax.jit(order, out_shardings=replicated),
    )


def _compile(run: _Run, state: TrainState, progress: Progress) -> tuple[Callable, Callable]:
    """Compiles both programs ahead, so that no epoch's time has it in."""
    progress.say("compiling ...")
    started = time.perf_counter()
    train_step = run.train_program.lower(state, run.train_data, run.order(0)).compile()
    eval_step = run.eval_program.lower(state, run.test_data, jnp.int32(0)).compile()
    progress.say(f"compiled in {time.perf_counter() - started:.1f} s")
    evaluate = partial(
        programs.evaluate, eval_step, data=run.test_data, batch_size=run.eval_batch_size
    )
    return train_step, evaluate


def _train_epoch(
    run: _Run, train_step: Callable, state: TrainState, epoch: int, progress: Progress
) -> tuple[TrainState, dict[str, float]]:
    """Runs the steps of an epoch; returns the mean of their metrics too."""
    order = run.order(epoch)
    steps = min(run.steps_per_epoch, run.total_steps - epoch * run.steps_per_epoch)
    history: list[dict[str, float]] = []
    means = {}

    def fetch(metrics):
        history.append({name: float(value) for name, value in metrics.items()})
        loss = history[-1]["loss"]
        if not math.isfinite(loss):
            step = epoch * run.steps_per_epoch + len(history)
            raise FloatingPointError(
                f"the loss is {loss} at step {step} (epoch {epoch + 1}) with a learning rate "
                f"of {float(run.learning_rate(step - 1)):.3g}"
            )
        means.update({n: float(np.mean([m[n] for m in history])) for n in history[-1]})
        progress.step(epoch + 1, run.config.batch_size, means["loss"], means["accuracy"])

    # One step behind the device, so that it always has the next one to go on with.
    running = None
    for _ in range(steps):
        state, metrics = train_step(state, run.train_data, order)
        if running is not None:
            fetch(running)
        running = metrics
    fetch(running)
    return state, means


def _summary(record: files.Record, num_epochs: int, time_left: str) -> str:
    return (
        f"epoch {record['epoch']}/{num_epochs}  "
        f"train loss {record['train_loss']:.4f} accuracy {record['train_accuracy']:.2%}  "
        f"test loss {record['test_loss']:.4f} accuracy {record['test_accuracy']:.2%}  "
        f"{record['images_per_second']:.0f} images/s  {time_left} left"
    )
