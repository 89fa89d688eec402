"""A run from its config to its last checkpoint."""

import contextlib
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tensorboard.summary.writer.record_writer import RecordWriter

from flax_resnet.errors import InputError, memory_errors, short_reason
from flax_resnet.models import ResNet, native, stack_blocks, unstack_blocks
from flax_resnet.models.registry import Model
from flax_resnet.models.shapes import variable_shapes
from flax_resnet.progress import Progress, say, warn
from flax_resnet.training import files, hosts, programs, tensorboard
from flax_resnet.training.checkpoint import (
    Checkpoints,
    History,
    Record,
    put_back_replaced,
    set_damaged_aside,
)
from flax_resnet.training.compilation import keep_compiled_programs
from flax_resnet.training.config import Config, check_config
from flax_resnet.training.feeds import Data, Feed, open_data, open_feed
from flax_resnet.training.initial import Weights, fit_initial, read_initial, start_from
from flax_resnet.training.optimizer import learning_rate_schedule, sgd
from flax_resnet.training.signals import Signals
from flax_resnet.training.steps import Metrics, TrainState, create_state, split_layers

# A run that diverges again after so many returns needs another config.
_MAX_ROLLBACKS = 10
_SECONDS_OF_A_SLOW_CALL = 1.0
_IMAGES_SHOWN = 64
_LESS_MEMORY = (
    "less is taken with data_feed=stream, and in another workdir with a smaller batch_size or "
    "accumulation_steps=2"
)


def train(config: Mapping[str, Any] | ConfigDict, workdir: str | Path) -> TrainState:
    """Trains a model on all devices, or goes on with the run that `workdir` holds.

    Writes config.json, dataset.json, checkpoints/ (the newest few and the best),
    metrics.jsonl (a line an epoch), TensorBoard's event files and curves.png.
    Progress goes to standard error: a bar on a terminal, plain lines elsewhere. Of
    several hosts the first writes and speaks; `workdir` is a folder that all of them see.

    SIGTERM and the first SIGINT let the step at hand end, and write a checkpoint.

    A script calls it under `if __name__ == "__main__":`, since data that is streamed is read by
    processes that import the script.

    Args:
      config: keys of `Config`, e.g. from `default_config`; those that it lacks have
        their defaults.
      workdir: folder of the run, made if need be.

    Returns:
      The state after the last step.

    Raises:
      InputError: if the config, the data or the folder cannot be used, or the memory is not
        enough.
      FloatingPointError: if the loss or its gradient becomes infinite or not a number.
      KeyboardInterrupt: after SIGINT.
      SystemExit: with code 143 after SIGTERM.
    """
    checked = check_config(config)
    workdir = Path(workdir)
    files.check_workdir(workdir, checked)
    state_dict = read_initial(checked, workdir)
    mesh = programs.make_mesh(checked.batch_size, checked.accumulation_steps)
    if jax.process_count() == 1:
        # Of several the first alone would write, and find at the next start what the others
        # compile anew. On GPUs they would then wait for what it finds out while it compiles.
        keep_compiled_programs()
    if mesh.size == 1 and mesh.devices.flat[0].platform == "cpu":
        # Its convolutions are compiled while the data is opened.
        threading.Thread(target=native.load, daemon=True).start()
    data = hosts.first_host_first("data", partial(open_data, checked, mesh))
    run = _plan(checked, workdir, mesh, data, state_dict)
    try:
        with memory_errors(_LESS_MEMORY), contextlib.ExitStack() as stack:
            hosts.on_first_host(partial(_claim, run, stack))
            checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, checked)))
            return _train(run, checkpoints)
    except OSError as error:
        raise InputError(f"cannot write workdir {workdir}: {error}") from error


@dataclass(frozen=True)
class _Run:
    """What stays the same from the first step of a run to the last.

    Attributes:
      initial: weights to start from, where they are not random.
      learning_rate: by the number of the step.
    """

    config: Config
    workdir: Path
    mesh: Mesh
    data: Data
    model: Model
    initial: Weights
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    steps_per_epoch: int
    total_steps: int

    @property
    def num_epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)

    @property
    def scans_blocks(self) -> bool:
        return isinstance(self.model, ResNet) and self.model.scan_blocks

    def learning_rate_of(self, step: int) -> float:
        return float(jnp.asarray(self.learning_rate(step)))


def _plan(
    config: Config, workdir: Path, mesh: Mesh, data: Data, state_dict: Mapping[str, Any] | None
) -> _Run:
    steps_per_epoch = len(data.train) // config.batch_size
    if not steps_per_epoch:
        raise InputError(f"batch_size={config.batch_size} of only {len(data.train)} examples")
    pixels = max(data.train.image_shape[:2])
    for key in ("crop_padding", "cutout"):
        if getattr(config, key) > pixels:
            raise InputError(
                f"{key}={getattr(config, key)} of images with only {pixels} pixels a side"
            )
    if not all(data.statistics[1]):
        raise InputError(f"a channel of {config.dataset} is the same in all training images")
    total_steps = config.num_steps or config.num_epochs * steps_per_epoch
    learning_rate = learning_rate_schedule(
        config, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    model = programs.build_model(config, len(data.train.class_names), mesh)
    try:
        variable_shapes(model, data.train.image_shape)
    except ValueError as error:
        raise InputError(f"{config.model} cannot be trained so: {short_reason(error)}") from error
    initial = {}
    if state_dict is not None:
        initial = fit_initial(config, model, state_dict, data.train.image_shape)
    return _Run(
        config,
        workdir,
        mesh,
        data,
        model,
        initial,
        sgd(config, learning_rate),
        learning_rate,
        steps_per_epoch,
        total_steps,
    )


def _claim(run: _Run, stack: contextlib.ExitStack) -> None:
    """Makes the folder this run's own, and fit to go on from."""
    stack.enter_context(files.locked(run.workdir))
    files.check_workdir(run.workdir, run.config)  # another run may have begun since
    files.write_description(
        run.workdir, run.config, run.data.train, run.data.test, run.data.statistics
    )
    put_back_replaced(run.workdir)
    for line in set_damaged_aside(run.workdir):
        warn(line)


def _train(run: _Run, checkpoints: Checkpoints) -> TrainState:
    """The state after the last step, from the newest checkpoint on; goes back if it may."""
    rollbacks, signals = 0, Signals()
    while True:
        has_checkpoint = checkpoints.newest is not None
        state, history = _newest(run, checkpoints)
        history.rollbacks = max(history.rollbacks, rollbacks)
        begin = partial(files.begin_metrics, run.workdir, history.records, has_checkpoint)
        hosts.on_first_host(begin)
        try:
            return _train_on(run, checkpoints, state, history, signals)
        except FloatingPointError as error:
            checkpoints.finish()
            good = f"the last good checkpoint is {checkpoints.newest}"
            if checkpoints.newest is None:
                good = "there is no checkpoint before it"
            if run.config.on_nan == "stop" or history.rollbacks == _MAX_ROLLBACKS:
                raise FloatingPointError(f"{error}; {good}") from error
            if signals.ask():
                warn(f"{error}; {good}; {signals.name}: stopped")
                signals.stop()
            warn(f"{error}; {good}: going back, and on with other batches")
            rollbacks = history.rollbacks + 1


def _newest(run: _Run, checkpoints: Checkpoints) -> tuple[TrainState, History]:
    """What the newest checkpoint holds, or what every run begins with."""
    everywhere = programs.replicated(run.mesh)
    create = partial(create_state, run.model, run.optimizer, image_shape=run.data.train.image_shape)
    init_key, *_ = programs.random_keys(run.config.seed)
    if checkpoints.newest is not None:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            jax.eval_shape(create, init_key),
        )
        return checkpoints.restore(shapes)
    if run.scans_blocks:  # many blocks, each of which would be compiled
        state = jax.device_put(create(init_key), everywhere)
        return start_from(run.initial, state), History()
    # It runs once: seconds of optimisation would not pay.
    options = {"xla_backend_optimization_level": "0"}
    program = jax.jit(create, out_shardings=everywhere, compiler_options=options)
    return start_from(run.initial, program(init_key)), History()


def _train_on(
    run: _Run, checkpoints: Checkpoints, state: TrainState, history: History, signals: Signals
) -> TrainState:
    """Trains from a state on to the last step."""
    done_epochs, done_steps = len(history.records), int(state.step)
    devices = f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    if jax.process_count() > 1:
        devices += f" on {jax.process_count()} hosts"
    say(
        f"{run.config.model} on {devices}, "
        f"{len(run.data.train)} training and {len(run.data.test)} test images, "
        f"{run.num_epochs} epochs, {done_epochs} of them done: {run.workdir}"
    )
    first_host = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if first_host:
            stack.callback(_plot_curves, run, history)
        if done_epochs == run.num_epochs:
            return state

        say("compiling ...")
        started = time.perf_counter()
        if run.scans_blocks:
            state = stack_blocks(state)
        feed = stack.enter_context(_open_feed(run, state, done_steps, history.rollbacks))
        say(f"compiled in {time.perf_counter() - started:.1f} s")
        writer = None
        if first_host:
            writer = tensorboard.open_writer(run.workdir, history.records)
            stack.enter_context(contextlib.closing(writer))
            if not history.records:
                inputs = _first_inputs(run, history.rollbacks)
                tensorboard.write_images(writer, inputs)
        size = run.config.batch_size
        progress = Progress(run.num_epochs, run.total_steps * size, done_steps * size)
        stack.enter_context(progress)
        stack.enter_context(signals)
        while len(history.records) < run.num_epochs:
            state, norms = _run_epoch(run, feed, checkpoints, state, history, progress, signals)
            record = history.records[-1]
            if writer is not None:
                files.append_metrics(run.workdir, record)
                tensorboard.write_scalars(writer, record)
                _write_histograms(run, writer, state, norms)
            _save(run, checkpoints, state, history)
            say(_summary(record, run.num_epochs, progress.time_left()))
        checkpoints.finish()
        if signals.ask():
            warn(f"{signals.name}: the run was done")
            signals.stop()
    return unstack_blocks(state)


def _plot_curves(run: _Run, history: History) -> None:
    try:
        files.plot_curves(history.records, run.workdir / "curves.png")
    except OSError as error:  # which is not to stand in the way of how the run has ended
        warn(f"there is no curves.png: {error}")


def _write_histograms(
    run: _Run, writer: RecordWriter, state: TrainState, norms: list[np.ndarray]
) -> None:
    params = flatten_dict(state.params)
    scales = {path: value for path, value in params.items() if path[-1] == "scale"}
    scales = unflatten_dict(jax.device_get(scales))
    gradients = {}
    if norms:  # else an earlier start of the run did all steps of this epoch
        gradients = split_layers(np.concatenate(norms), state.params, run.config.freeze)
    tensorboard.write_histograms(writer, int(state.step), scales, gradients)


def _first_inputs(run: _Run, rollbacks: int) -> np.ndarray:
    """The first training images as the model sees them in its first epoch."""
    train, index = run.data.train, np.arange(min(_IMAGES_SHOWN, len(run.data.train)))
    images, _ = train.read(index)
    augment = programs.make_augment(run.config, run.data.statistics, rollbacks)
    return np.asarray(jax.jit(augment)(images, index, 0))


def _open_feed(
    run: _Run, state: TrainState, done_steps: int, rollbacks: int
) -> contextlib.AbstractContextManager[Feed]:
    step = programs.make_train_step(
        run.config,
        run.model,
        run.optimizer,
        statistics=run.data.statistics,
        steps_per_epoch=run.steps_per_epoch,
        rollbacks=rollbacks,
    )
    eval_step = programs.make_eval_step(run.model, statistics=run.data.statistics)
    to_do = range(done_steps, run.total_steps)
    return open_feed(run.config, run.mesh, run.data, step, eval_step, state, to_do, rollbacks)


def _run_epoch(
    run: _Run,
    feed: Feed,
    checkpoints: Checkpoints,
    state: TrainState,
    history: History,
    progress: Progress,
    signals: Signals,
) -> tuple[TrainState, list[np.ndarray]]:
    """Trains to the end of an epoch, evaluates, and adds the epoch to the history.

    Returns:
      The state, and layer_gradient_norms [steps, L] of the calls of `feed.advance` for it.
    """
    epoch = len(history.records)
    first = epoch * run.steps_per_epoch
    last = min(first + run.steps_per_epoch, run.total_steps)
    step = first + len(history.losses)
    started = time.perf_counter() - history.seconds
    seconds_a_call = 0.0
    running: list[Metrics] = []
    layer_norms: list[np.ndarray] = []

    def fetch() -> None:
        metrics = jax.device_get(running.pop(0))
        if metrics["loss"].ndim == 0:
            metrics = {name: value[np.newaxis] for name, value in metrics.items()}
        _check_finite(run, metrics, first + len(history.losses))
        history.add_steps(metrics)
        layer_norms.append(metrics["layer_gradient_norms"])
        loss, accuracy = metrics["loss"], metrics["accuracy"]
        progress.step(epoch + 1, len(loss) * run.config.batch_size, loss, accuracy)

    def settle() -> None:
        while running:
            fetch()
        history.seconds = time.perf_counter() - started

    def stop() -> NoReturn:
        if step < last:  # else it has settled before the evaluation
            settle()
        if history.losses:  # else nothing is new since the last checkpoint
            _save(run, checkpoints, state, history)
        checkpoints.finish()
        warn(
            f"{signals.name}: stopped after step {step}; "
            f"the same command with --workdir={run.workdir} goes on from there"
        )
        signals.stop()

    while step < last:
        if signals.ask():
            stop()
        called = time.perf_counter()
        count = feed.steps_a_call if last - step >= feed.steps_a_call else 1
        state, metrics = feed.advance(state, step, count)
        step += count
        running.append(metrics)
        # A call late, so that the device always has the next one to go on with; but a
        # signal should not have to wait for two slow ones.
        allowed = 1 if seconds_a_call < _SECONDS_OF_A_SLOW_CALL else 0
        while len(running) > allowed:
            fetch()
        seconds_a_call = time.perf_counter() - called
        if step < last and checkpoints.is_due():
            settle()
            _save(run, checkpoints, state, history)
    settle()
    with progress.evaluating(epoch + 1):
        test = feed.evaluate(state, signals.ask)
    if test is None:
        stop()
    if not math.isfinite(test["loss"]):
        raise _not_finite(run, f"test loss is {test['loss']}", last - 1)
    history.end_epoch(
        {
            "epoch": epoch + 1,
            "step": last,
            **history.means(),
            "test_loss": test["loss"],
            "test_accuracy": test["accuracy"],
            "learning_rate": run.learning_rate_of(last - 1),
            "images_per_second": len(history.losses) * run.config.batch_size / history.seconds,
            "seconds": time.perf_counter() - started,
        }
    )
    return state, layer_norms


def _check_finite(run: _Run, metrics: Metrics, first_step: int) -> None:
    loss, norm = metrics["loss"], metrics["gradient_norm"]
    finite = np.isfinite(loss + norm)
    if not finite.all():
        at = int(finite.argmin())
        what = f"gradient norm is {norm[at]}" if np.isfinite(loss[at]) else f"loss is {loss[at]}"
        raise _not_finite(run, what, first_step + at)


def _save(run: _Run, checkpoints: Checkpoints, state: TrainState, history: History) -> None:
    """Writes a checkpoint, if it is a good one to go back to."""
    if not programs.is_finite(state):
        raise _not_finite(run, "state is not finite", int(state.step) - 1)
    checkpoints.save(unstack_blocks(state), history)


def _not_finite(run: _Run, what: str, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"the {what} after step {step + 1}, in epoch {step // run.steps_per_epoch + 1}, with a "
        f"learning rate of {run.learning_rate_of(step):.3g}"
    )


def _summary(record: Record, num_epochs: int, time_left: str) -> str:
    return (
        f"epoch {record['epoch']}/{num_epochs}  "
        f"train loss {record['train_loss']:.4f} accuracy {record['train_accuracy']:.2%}  "
        f"test loss {record['test_loss']:.4f} accuracy {record['test_accuracy']:.2%}  "
        f"{record['images_per_second']:.0f} images/s  {time_left} left"
    )
