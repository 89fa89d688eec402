"""How a run's steps come by their examples: from the devices' memory, or from disk.

Both run the same step on the same batches. What fits lies on every device as uint8, and
there GPU and TPU take many steps a call; XLA:CPU is slow in loops, and takes them one by
one. What does not fit is read ahead by processes of Grain, each host its share.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flax_resnet.data import (
    Dataset,
    EvalBatches,
    Source,
    TrainBatches,
    channel_statistics,
    epoch_order,
    stream,
)
from flax_resnet.errors import InputError
from flax_resnet.training import programs
from flax_resnet.training.config import Config
from flax_resnet.training.hardware import host_memory
from flax_resnet.training.programs import EvalStep, Statistics, Step
from flax_resnet.training.steps import Batch, Metrics, TrainState

# Enough that the time between two calls does not count, few enough to stop within seconds.
_STEPS_A_CALL = 16
# The rest of the memory is for activations, gradients and the optimizer.
_SHARE_OF_MEMORY = 0.25


@dataclass(frozen=True)
class Feed:
    """Compiled training and evaluation on the examples of a run.

    Attributes:
      advance: (state, step, count) -> (state, metrics), for the steps from `step` on;
        count is 1, or `steps_a_call` if the epoch has so many left. Metrics are those of
        `train_step`, with one more axis, the first, of that length, if count is above 1.
      steps_a_call: see `advance`.
      evaluate: (state, stop) -> mean "loss" and "accuracy" over the test split, or None as
        soon as stop(), asked before every batch, says so.
    """

    advance: Callable[[TrainState, int, int], tuple[TrainState, Metrics]]
    steps_a_call: int
    evaluate: Callable[[TrainState, Callable[[], bool]], dict[str, float] | None]


@dataclass(frozen=True)
class Data:
    """The two splits of a run, of one kind both.

    Attributes:
      train, test: in memory, or on disk.
      statistics: mean and std of the training images' channels.
    """

    train: Dataset | Source
    test: Dataset | Source
    statistics: Statistics


def open_data(config: Config, mesh: Mesh) -> Data:
    """Loads the splits of a run, or only opens them where they do not fit.

    Raises:
      InputError: if they cannot be read, or are to be streamed and cannot.
    """
    train, test = (
        Source(config.dataset, split, config.data_dir)
        for split in (config.train_split, config.eval_split)
    )
    resident = config.data_feed == "resident"
    if config.data_feed == "auto":
        resident = (
            not train.can_be_streamed
            or train.nbytes + test.nbytes <= _SHARE_OF_MEMORY * _memory(mesh)
        )
    if resident:
        train, test = train.load(), test.load()
        chunks = np.array_split(train.images, max(1, len(train) // 1024))
        return Data(train, test, channel_statistics(chunks))
    if not train.can_be_streamed:
        raise InputError(
            f"{config.dataset} cannot be streamed from TFRecord files: prepare it with "
            "file_format='array_record', or set --config.data_feed=resident"
        )
    batches = EvalBatches(train, min(config.eval_batch_size, len(train)), slice(None))
    with contextlib.closing(stream(batches, config.stream_workers)) as read:
        return Data(train, test, channel_statistics(b["image"][b["mask"]] for b in read))


def _takes_many_steps(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform != "cpu"


def _memory(mesh: Mesh) -> int:
    """Bytes of a device's memory, or of the host's where that is what the device has."""
    stats = mesh.local_devices[0].memory_stats() or {}
    return stats.get("bytes_limit", host_memory())


def open_feed(
    config: Config,
    mesh: Mesh,
    data: Data,
    step: Step,
    eval_step: EvalStep,
    state: TrainState,
    steps: range,
    rollbacks: int = 0,
) -> contextlib.AbstractContextManager[Feed]:
    """Compiles the programs of a run and opens its data for the steps still to be done.

    Args:
      config, mesh, data: of the run.
      step, eval_step: as `programs` makes them.
      state: of which the shapes count.
      steps: those to be done.
      rollbacks: see `epoch_order`.
    """
    train, test = data.train, data.test
    if isinstance(train, Dataset) and isinstance(test, Dataset):
        return _resident(config, mesh, train, test, step, eval_step, state, rollbacks)
    assert isinstance(train, Source)
    assert isinstance(test, Source)
    return _streamed(config, mesh, train, test, step, eval_step, state, steps, rollbacks)


@contextlib.contextmanager
def _resident(
    config: Config,
    mesh: Mesh,
    train_set: Dataset,
    test_set: Dataset,
    step: Step,
    eval_step: EvalStep,
    state: TrainState,
    rollbacks: int,
) -> Iterator[Feed]:
    everywhere, divided = programs.replicated(mesh), programs.by_example(mesh)
    train, test = (
        {
            "image": _put_everywhere(split.images.reshape(len(split), -1), mesh),
            "label": _put_everywhere(split.labels, mesh),
        }
        for split in (train_set, test_set)
    )
    steps_per_epoch = len(train_set) // config.batch_size
    eval_batch_size = _eval_batch_size(config, len(test_set), mesh)
    zero = np.int32(0)

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> jax.Array:
        return _put_everywhere(epoch_order(config.seed, epoch, len(train_set), rollbacks), mesh)

    pick = programs.make_pick(mesh, config.batch_size, train_set.image_shape)
    pick_one = jax.jit(pick, out_shardings=divided).lower(train, order(0), zero).compile()
    pick_eval = programs.make_pick_eval(mesh, eval_batch_size, test_set.image_shape)
    pick_eval = jax.jit(pick_eval, out_shardings=divided).lower(test, zero).compile()
    one_step, eval_step = _compile(
        mesh, step, eval_step, state, pick_one(train, order(0), zero), pick_eval(test, zero)
    )

    def single(state: TrainState, order: jax.Array, position: int):
        return one_step(state, pick_one(train, order, np.int32(position)))

    calls = {1: single}
    if _takes_many_steps(mesh) and steps_per_epoch >= _STEPS_A_CALL:
        program = programs.make_train_steps(
            step, pick, steps_per_epoch=steps_per_epoch, steps=_STEPS_A_CALL
        )
        program = jax.jit(program, donate_argnums=0, out_shardings=everywhere)
        many_steps = program.lower(state, train, order(0)).compile()
        calls[_STEPS_A_CALL] = lambda state, order, position: many_steps(state, train, order)

    def advance(state: TrainState, step: int, count: int) -> tuple[TrainState, Metrics]:
        epoch, position = divmod(step, steps_per_epoch)
        return calls[count](state, order(epoch), position)

    def evaluate(state: TrainState, stop: Callable[[], bool]) -> dict[str, float] | None:
        starts = range(0, len(test_set), eval_batch_size)
        return _mean((eval_step(state, pick_eval(test, np.int32(at))) for at in starts), stop)

    yield Feed(advance, max(calls), evaluate)


@contextlib.contextmanager
def _streamed(
    config: Config,
    mesh: Mesh,
    train_set: Source,
    test_set: Source,
    step: Step,
    eval_step: EvalStep,
    state: TrainState,
    steps: range,
    rollbacks: int,
) -> Iterator[Feed]:
    eval_batch_size = _eval_batch_size(config, len(test_set), mesh)
    train = TrainBatches(
        train_set,
        config.seed,
        config.batch_size,
        _share(mesh, config.batch_size),
        steps.start,
        steps.stop,
        rollbacks,
    )
    epochs = math.ceil(steps.stop / (len(train_set) // config.batch_size))
    test = EvalBatches(test_set, eval_batch_size, _share(mesh, eval_batch_size), epochs)
    one_step, eval_step = _compile(
        mesh,
        step,
        eval_step,
        state,
        _shapes(train_set, config.batch_size, mesh, index=jnp.int32),
        _shapes(test_set, eval_batch_size, mesh, mask=jnp.bool_),
    )

    with (
        contextlib.closing(stream(train, config.stream_workers)) as batches,
        # Its processes are there from the first evaluation to the last.
        contextlib.closing(stream(test, config.stream_workers)) as test_batches,
    ):
        # The next batch is on its way to the device while a step runs. There is none for a run
        # that was stopped in its last evaluation.
        ahead = _put_share(next(batches), mesh) if steps else None
        next_step = steps.start

        def advance(state: TrainState, step: int, count: int) -> tuple[TrainState, Metrics]:
            nonlocal ahead, next_step
            assert (step, count) == (next_step, 1)
            state, metrics = one_step(state, ahead)
            next_step += 1
            if next_step < steps.stop:
                ahead = _put_share(next(batches), mesh)
            return state, metrics

        def evaluate(state: TrainState, stop: Callable[[], bool]) -> dict[str, float] | None:
            batches = itertools.islice(test_batches, test.batches_each_time)
            return _mean((eval_step(state, _put_share(b, mesh)) for b in batches), stop)

        yield Feed(advance, 1, evaluate)


def _compile(
    mesh: Mesh, step: Step, eval_step: EvalStep, state: TrainState, batch: Any, eval_batch: Any
) -> tuple[jax.stages.Compiled, ...]:
    everywhere = programs.replicated(mesh)
    train = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
    evaluate = jax.jit(eval_step, out_shardings=everywhere)
    lowered = [train.lower(state, batch), evaluate.lower(state, eval_batch)]
    # On a GPU XLA times its candidates, and two programs would disturb each other.
    at_once = 1 if mesh.devices.flat[0].platform == "gpu" else None
    threads = ThreadPoolExecutor(at_once)
    try:
        return tuple(threads.map(jax.stages.Lowered.compile, lowered))
    finally:
        threads.shutdown(wait=False)  # Ctrl-C does not wait for the compiler


def _mean(sums: Iterator[Metrics], stop: Callable[[], bool]) -> dict[str, float] | None:
    """Means over all examples that count, of the sums of every batch; None if stopped."""
    all_sums: list[Metrics] = []
    while not stop():
        batch = next(sums, None)
        if all_sums:  # a batch late, so that the device has the next one to go on with
            all_sums[-1] = jax.device_get(all_sums[-1])
        if batch is None:
            count = sum(int(s["count"]) for s in all_sums)
            return {
                "loss": sum(float(s["loss"]) for s in all_sums) / count,
                "accuracy": sum(int(s["correct"]) for s in all_sums) / count,
            }
        all_sums.append(batch)
    return None


def _eval_batch_size(config: Config, examples: int, mesh: Mesh) -> int:
    """The config's, rounded up to what the devices divide; no more than there are examples."""
    return math.ceil(min(config.eval_batch_size, examples) / mesh.size) * mesh.size


# Arrays over the devices of all hosts, from what this host has.


def _put_everywhere(array: np.ndarray, mesh: Mesh) -> jax.Array:
    sharding = programs.replicated(mesh)
    return jax.make_array_from_process_local_data(sharding, array, array.shape)


def _share(mesh: Mesh, batch_size: int) -> slice:
    """The examples of a batch that this host's devices take."""
    indices = programs.by_example(mesh).addressable_devices_indices_map((batch_size,)).values()
    ranges = [index[0].indices(batch_size) for index in indices if index is not None]
    return slice(min(start for start, _, _ in ranges), max(stop for _, stop, _ in ranges))


def _shapes(source: Source, batch_size: int, mesh: Mesh, **more: Any) -> dict[str, Any]:
    """A streamed batch of a split, before it is read, with further arrays of one axis."""

    def array(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=programs.by_example(mesh))

    return {
        "image": array(batch_size, *source.image_shape, dtype=jnp.uint8),
        "label": array(batch_size, dtype=jnp.int32),
    } | {name: array(batch_size, dtype=dtype) for name, dtype in more.items()}


def _put_share(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    return jax.make_array_from_process_local_data(programs.by_example(mesh), batch)
