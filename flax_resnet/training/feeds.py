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
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnet.data import Dataset, EvalBatches, TrainBatches, epoch_order
from flax_resnet.errors import InputError
from flax_resnet.progress import slow_bar
from flax_resnet.training import programs
from flax_resnet.training.data import Split, read_ahead
from flax_resnet.training.mesh import (
    by_example,
    platform,
    put_everywhere,
    put_share,
    replicated,
    share_of_host,
)
from flax_resnet.training.plan import Plan
from flax_resnet.training.steps import Metrics, TrainState

# Enough that the time between two calls does not count, few enough to stop within seconds.
STEPS_A_CALL = 16


class Feed(Protocol):
    """Compiled training and evaluation on the examples of a run.

    Attributes:
      steps_a_call: how many steps `advance` can take at once.
      formats: how the arrays of a state have to lie on the devices.
    """

    steps_a_call: int
    formats: Any

    def advance(self, state: TrainState, step: int, count: int) -> tuple[TrainState, Metrics]:
        """The state after steps `step` to `step + count - 1`, and their metrics.

        Args:
          state: after step - 1, in `formats`; its arrays are used up.
          step: counted from 0.
          count: 1, or `steps_a_call` if the epoch has so many left.

        Returns:
          State and metrics as those of `train_step`, with one more axis, the first, of that
          length, if count is above 1.

        Raises:
          InputError: if the data cannot be read; the state is then left as it is.
        """
        ...

    def evaluate(self, state: TrainState, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Mean "loss" and "accuracy" over the test split, of a state in `formats`.

        None as soon as stop(), asked before every batch, says so.
        """
        ...

    def close(self) -> None:
        """Ends what reads ahead."""


def open_feed(plan: Plan, state: TrainState, rollbacks: int) -> Feed:
    """Compiles the programs of a run and opens its data for the steps still to be done.

    Args:
      plan: of the run.
      state: to go on from.
      rollbacks: see `epoch_order`.
    """
    kind = _Resident if plan.data.is_resident else _Streamed
    return kind(plan, state, rollbacks)


class _Resident:
    """Of splits that lie on every device."""

    steps_a_call = 1

    def __init__(self, plan: Plan, state: TrainState, rollbacks: int):
        self._plan, self._rollbacks = plan, rollbacks
        self._order = functools.lru_cache(maxsize=1)(self._put_order)
        mesh, size = plan.mesh, plan.config.batch_size
        train_set, test_set = plan.data.train, plan.data.test
        self._train, self._test = self._put(train_set), self._put(test_set)
        self._eval_batch_size = _eval_batch_size(plan)
        divided, zero = by_example(mesh), np.int32(0)
        pick = programs.make_pick(mesh, size, train_set.image_shape)
        self._pick = (
            jax.jit(pick, out_shardings=divided).lower(self._train, self._order(0), zero).compile()
        )
        pick_eval = programs.make_pick_eval(mesh, self._eval_batch_size, test_set.image_shape)
        self._pick_eval = (
            jax.jit(pick_eval, out_shardings=divided).lower(self._test, zero).compile()
        )
        step = programs.make_train_step(plan, rollbacks)
        training: list[Any] = [(step, self._batch(0))]
        if platform(mesh) != "cpu" and plan.steps_per_epoch >= STEPS_A_CALL:
            self.steps_a_call = STEPS_A_CALL
            many = programs.make_train_steps(
                step, pick, steps_per_epoch=plan.steps_per_epoch, steps=STEPS_A_CALL
            )
            training.insert(0, (many, self._train, self._order(0)))
        (*many_steps, self._step), self._eval_step, self.formats = _compile(
            plan, state, training, self._pick_eval(self._test, zero)
        )
        if many_steps:
            (self._many_steps,) = many_steps

    def advance(self, state: TrainState, step: int, count: int) -> tuple[TrainState, Metrics]:
        if count == 1:
            return self._step(state, self._batch(step))
        return self._many_steps(state, self._train, self._order(step // self._plan.steps_per_epoch))

    def evaluate(self, state: TrainState, stop: Callable[[], bool]) -> dict[str, float] | None:
        starts = range(0, len(self._plan.data.test), self._eval_batch_size)
        batches = (self._pick_eval(self._test, np.int32(start)) for start in starts)
        sums = (self._eval_step(state, batch) for batch in batches)
        return _mean(slow_bar(sums, len(starts), "evaluating", "batches"), stop)

    def close(self) -> None:
        # A run that goes back puts them on the device anew.
        self._order.cache_clear()
        self._train = self._test = {}

    def _put(self, split: Split) -> dict[str, jax.Array]:
        assert isinstance(split, Dataset)
        arrays = {"image": split.images.reshape(len(split), -1), "label": split.labels}
        return {name: put_everywhere(array, self._plan.mesh) for name, array in arrays.items()}

    def _batch(self, step: int) -> dict[str, jax.Array]:
        epoch, position = divmod(step, self._plan.steps_per_epoch)
        return self._pick(self._train, self._order(epoch), np.int32(position))

    def _put_order(self, epoch: int) -> jax.Array:
        plan = self._plan
        order = epoch_order(plan.config.seed, epoch, len(plan.data.train), self._rollbacks)
        return put_everywhere(order, plan.mesh)


class _Streamed:
    """Of splits that are read all the time, this host's share of them."""

    steps_a_call = 1

    def __init__(self, plan: Plan, state: TrainState, rollbacks: int):
        self._plan = plan
        mesh, config = plan.mesh, plan.config
        train_set, test_set = plan.data.train, plan.data.test
        size, eval_size = config.batch_size, _eval_batch_size(plan)
        self._next_step = first = int(state.step)
        train = TrainBatches(
            train_set,
            config.seed,
            size,
            share_of_host(mesh, size),
            first,
            plan.total_steps,
            rollbacks,
        )
        self._test = EvalBatches(
            test_set, eval_size, share_of_host(mesh, eval_size), plan.num_epochs
        )
        step = programs.make_train_step(plan, rollbacks)
        (self._step,), self._eval_step, self.formats = _compile(
            plan,
            state,
            [(step, self._shapes(train_set, size, index=jnp.int32))],
            self._shapes(test_set, eval_size, mask=jnp.bool_),
        )
        self._batches = read_ahead(train, config)
        # Its processes are there from the first evaluation to the last.
        self._test_batches = read_ahead(self._test, config)
        # The next batch is on its way to the device while a step runs. There is none for a run
        # that was stopped in its last evaluation.
        self._ahead = self._next_batch()

    def advance(self, state: TrainState, step: int, count: int) -> tuple[TrainState, Metrics]:
        assert (step, count) == (self._next_step, 1)
        if isinstance(self._ahead, InputError):
            raise self._ahead
        state, metrics = self._step(state, self._ahead)
        self._next_step += 1
        self._ahead = self._next_batch()
        return state, metrics

    def _next_batch(self) -> dict[str, jax.Array] | InputError | None:
        """The next batch; or why there is none, to be raised when the step before is kept."""
        if self._next_step == self._plan.total_steps:
            return None
        try:
            return put_share(next(self._batches), self._plan.mesh)
        except InputError as error:
            return error

    def evaluate(self, state: TrainState, stop: Callable[[], bool]) -> dict[str, float] | None:
        mesh, count = self._plan.mesh, self._test.batches_each_time
        batches = itertools.islice(self._test_batches, count)
        sums = (self._eval_step(state, put_share(batch, mesh)) for batch in batches)
        return _mean(slow_bar(sums, count, "evaluating", "batches"), stop)

    def close(self) -> None:
        with contextlib.closing(self._batches):
            self._test_batches.close()

    def _shapes(self, split: Split, batch_size: int, **more: Any) -> dict[str, Any]:
        """A batch of a split, before it is read, with further arrays of one axis."""

        def array(*shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=by_example(self._plan.mesh))

        return {
            "image": array(batch_size, *split.image_shape, dtype=jnp.uint8),
            "label": array(batch_size, dtype=jnp.int32),
        } | {name: array(batch_size, dtype=dtype) for name, dtype in more.items()}


def _compile(
    plan: Plan, state: TrainState, training: list[tuple[Any, ...]], eval_batch: Any
) -> tuple[list[jax.stages.Compiled], jax.stages.Compiled, Any]:
    """The programs of a run, and the formats of the state that goes from one to the other.

    Args:
      plan: of the run.
      state: its shapes count.
      training: functions of a state, each with its further inputs; first what is called most.
      eval_batch: to be evaluated.

    Returns:
      The training, the evaluation of a batch, and the formats.
    """
    mesh = plan.mesh
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    def lower(formats, program, *inputs):
        return programs.lower_training(program, state, formats, mesh, *inputs)

    compiled, formats = [], programs.state_formats(state, mesh)
    if platform(mesh) == "gpu":  # the first chooses them, and the others have to take them
        compiled = [lower(formats, *training.pop(0)).compile()]
        chosen = compiled[0].input_formats[0][0]
        formats = jax.tree.map(
            lambda leaf, format: format if leaf.ndim > 1 else format.sharding, state, chosen
        )
    evaluate = jax.jit(
        programs.make_eval_step(plan),
        in_shardings=(formats, None),
        out_shardings=replicated(mesh),
    )
    lowered = [lower(formats, *one) for one in training] + [evaluate.lower(state, eval_batch)]
    # Several at once; on a GPU XLA times its candidates, and two programs would disturb each other.
    threads = ThreadPoolExecutor(1 if platform(mesh) == "gpu" else None)
    try:
        *others, evaluate = threads.map(jax.stages.Lowered.compile, lowered)
    finally:
        threads.shutdown(wait=False)  # Ctrl-C does not wait for the compiler
    return [*compiled, *others], evaluate, formats


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


def _eval_batch_size(plan: Plan) -> int:
    """The config's, rounded up to what the devices divide; no more than there are examples."""
    size, devices = min(plan.config.eval_batch_size, len(plan.data.test)), plan.mesh.size
    return math.ceil(size / devices) * devices
