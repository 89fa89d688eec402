"""`train`: from a config, and what a script brings, to the last step."""

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from flax_resnet.data import Dataset, Examples
from flax_resnet.errors import InputError, memory_errors
from flax_resnet.models import stack_blocks
from flax_resnet.progress import say, warn
from flax_resnet.training import checkpoint_files, files, hosts, programs, writers
from flax_resnet.training.checkpoint import Checkpoints
from flax_resnet.training.config import Config, check_config
from flax_resnet.training.feeds import open_feed
from flax_resnet.training.history import History
from flax_resnet.training.initial import start_from
from flax_resnet.training.jsonfiles import user_path
from flax_resnet.training.loop import Loop
from flax_resnet.training.mesh import describe_mesh, replicated
from flax_resnet.training.own import Augment, Own
from flax_resnet.training.plan import Plan, make_plan
from flax_resnet.training.profiler import Profiler
from flax_resnet.training.signals import Signals
from flax_resnet.training.steps import Loss, TrainState, create_state

# A run that diverges again after so many returns needs another config.
_MAX_ROLLBACKS = 10
_LESS_MEMORY = (
    "set data_feed=stream or, in another workdir, a smaller batch_size or accumulation_steps=2"
)


def train(
    config: Mapping[str, Any] | ConfigDict | Config,
    workdir: str | Path,
    *,
    model: nn.Module | None = None,
    data: tuple[Dataset | Examples, Dataset | Examples] | None = None,
    loss: Loss | None = None,
    optimizer: optax.GradientTransformation
    | Callable[[optax.Schedule], optax.GradientTransformation]
    | None = None,
    augment: Augment | None = None,
) -> TrainState:
    """Trains a model on all devices, or resumes the run that `workdir` holds.

    Writes config.json, dataset.json, checkpoints/ (the newest few and the best),
    metrics.jsonl (a line an epoch), steps.jsonl (a line every `log_every` steps), TensorBoard's
    event files and curves.png. Progress goes to standard error: a bar on a terminal, plain lines
    elsewhere. Of several hosts the first writes and speaks; `workdir` is a folder that all of
    them see.

    On SIGTERM or the first SIGINT the run finishes the current step and writes a checkpoint.

    A script calls it under `if __name__ == "__main__":`, since data that is streamed is read by
    processes that import the script. Of `model`, `data` and the others only the names are stored.
    To resume the run, pass them again.

    Args:
      config: keys of `Config`, e.g. from `default_config`; those that it lacks have
        their defaults. Or the `config` of an earlier run, see `load_run`.
      workdir: folder of the run, made if need be.
      model: called as model(x, train=...) with images, float32 [N, H, W, C], and giving logits
        [N, K]. What it keeps beside params are "batch_stats"; its random key is "dropout".
      data: (train, test), each a `Dataset` or anything with `class_names`, `len` and examples by
        number, see `Examples`.
      loss: of each example: logits, float32 [N, K], and labels, int32 [N], to float [N]; in
        training and in evaluation.
      optimizer: of all parameters, or a function that makes one of the learning rate by step.
      augment: on the device, images, uint8 [N, H, W, C], and a key for each, [N], to images of
        values from 0 to 255, of any dtype.

    Returns:
      The state after the last step.

    Raises:
      InputError: if the config, the data, the folder or what was brought cannot be used, or the
        memory is not enough.
      FloatingPointError: if the loss or its gradient becomes infinite or not a number.
      KeyboardInterrupt: after SIGINT.
      SystemExit: with code 143 after SIGTERM.
    """
    if jax.config.values["jax_disable_jit"]:
        raise InputError("a run is compiled ahead, which JAX_DISABLE_JIT forbids: unset it")
    plan = make_plan(
        check_config(config), user_path(workdir), Own(model, data, loss, optimizer, augment)
    )
    try:
        with memory_errors(_LESS_MEMORY), contextlib.ExitStack() as stack:
            hosts.on_first_host(_claim, plan, stack)
            hosts.check_shared(plan.workdir)
            checkpoints = stack.enter_context(
                contextlib.closing(Checkpoints(plan.workdir, plan.config))
            )
            return _train(plan, checkpoints)
    except OSError as error:
        raise InputError(f"cannot write workdir {workdir}: {error}") from error


def _claim(plan: Plan, stack: contextlib.ExitStack) -> None:
    """Makes the folder this run's own, and fit to go on from."""
    stack.enter_context(files.locked(plan.workdir))
    # Another run may have begun since.
    files.check_workdir(plan.workdir, plan.config, plan.brought)
    files.write_description(plan.workdir, plan.config, plan.data, plan.brought)
    checkpoint_files.put_back_replaced(plan.workdir)
    for line in checkpoint_files.set_damaged_aside(plan.workdir):
        warn(line)


def _train(plan: Plan, checkpoints: Checkpoints) -> TrainState:
    """The state after the last step, from the newest checkpoint on; goes back if it may."""
    rollbacks, signals = 0, Signals()
    while True:
        state, history = _newest(plan, checkpoints)
        history.rollbacks = max(history.rollbacks, rollbacks)
        hosts.on_first_host(
            writers.take_up_files,
            plan,
            history,
            int(state.step),
            has_checkpoint=checkpoints.newest is not None,
        )
        try:
            return _train_on(plan, checkpoints, signals, state, history)
        except FloatingPointError as error:
            checkpoints.finish()
            good = f"the last good checkpoint is {checkpoints.newest}"
            if checkpoints.newest is None:
                good = "there is no checkpoint before it"
            if plan.config.on_nan == "stop" or history.rollbacks == _MAX_ROLLBACKS:
                advice = "a smaller learning_rate in another workdir"
                if plan.config.on_nan == "stop":
                    advice += ", or on_nan=rollback in this one"
                raise FloatingPointError(f"{error}; {good}; try {advice}") from error
            if signals.ask():
                warn(f"{error}; {good}; {signals.name}: stopped")
                signals.stop()
            warn(f"{error}; {good}: going back to it, and continuing with other batches")
            rollbacks = history.rollbacks + 1


def _newest(plan: Plan, checkpoints: Checkpoints) -> tuple[TrainState, History]:
    """What the newest checkpoint holds, or what every run begins with."""
    everywhere = replicated(plan.mesh)
    create = partial(
        create_state,
        plan.model,
        plan.optimizer,
        image_shape=plan.data.train.image_shape,
        ema=plan.config.ema_decay > 0,
    )
    key = programs.random_keys(plan.config.seed).init
    if checkpoints.newest is not None:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            jax.eval_shape(create, key),
        )
        return checkpoints.restore(shapes)
    if plan.scans_blocks:  # many blocks, each of which would be compiled
        state = jax.device_put(create(key), everywhere)
        return start_from(plan.initial, state, plan.optimizer), History()
    # It runs once: seconds of optimisation would not pay.
    options = {"xla_backend_optimization_level": "0"}
    program = jax.jit(create, out_shardings=everywhere, compiler_options=options)
    return start_from(plan.initial, program(key), plan.optimizer), History()


def _train_on(
    plan: Plan,
    checkpoints: Checkpoints,
    signals: Signals,
    state: TrainState,
    history: History,
) -> TrainState:
    """Trains from a state on to the last step."""
    done = len(history.records)
    say(
        f"{plan.model_name} on {describe_mesh(plan.mesh)}, "
        f"{len(plan.data.train)} training and {len(plan.data.test)} test images, "
        f"{plan.num_epochs} epochs, {done} of them done: {plan.workdir}"
    )
    if done == plan.num_epochs:
        say("nothing is left to train")
        hosts.on_first_host(writers.write_curves, plan.workdir, history.records)
        return state
    with contextlib.ExitStack() as stack:
        if plan.scans_blocks:
            state = stack_blocks(state)
        say("compiling ...")
        started = time.perf_counter()
        feed = stack.enter_context(contextlib.closing(open_feed(plan, state, history.rollbacks)))
        say(f"compiled in {time.perf_counter() - started:.1f} s")
        profiler = stack.enter_context(contextlib.closing(Profiler(plan)))
        opened = stack.enter_context(writers.open_writers(plan, state, history))
        stack.enter_context(signals)
        state = programs.place(state, feed.formats)
        loop = Loop(plan, feed, checkpoints, signals, profiler, opened, state, history)
        return plan.unstacked(loop.run())
