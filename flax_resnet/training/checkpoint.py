"""Orbax checkpoints of all that a run is, written and restored.

What a checkpoint's folder holds stands in `checkpoint_files`. Orbax renames it to its place when
all of it is written.
"""

import contextlib
import dataclasses
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from flax_resnet.errors import InputError, short_reason
from flax_resnet.training import checkpoint_files, hosts
from flax_resnet.training.config import Config
from flax_resnet.training.hardware import describe_hardware
from flax_resnet.training.history import History, best_of
from flax_resnet.training.steps import TrainState

_CALLS_TO_AGREE = 32


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Orbax would ask JAX by the number of the step, where `Signals` counts its questions: of
        # two countings JAX makes one, and the signal comes late or never.
        return False


class Checkpoints:
    """The checkpoints of a run: the newest few, and the one with the best test accuracy.

    Of several hosts all make one, and call its methods in the same order.

    Args:
      workdir: folder of the run.
      config: of the run; its `keep_checkpoints` is how many of the newest are kept.
    """

    def __init__(self, workdir: Path, config: Config):
        def accuracy(metrics: dict[str, float]) -> float:
            return metrics.get("test_accuracy", -1.0)  # none inside an epoch

        checkpoint_files.silence_closed_event_loops()
        self._config = config
        self._folder = workdir.absolute() / "checkpoints"
        self._environment = {"versions": _versions(), "hardware": describe_hardware()}
        self._being_written = 0
        self._saved, self._asked = time.monotonic(), 0
        self._manager = _Manager(
            self._folder,
            item_handlers={
                # As on a CPU, where it is tested, and not by way of pinned memory.
                "state": ocp.PyTreeCheckpointHandler(
                    type_handler_registry=_one_writer(), enable_pinned_host_transfer=False
                ),
                "run": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                # Without best_fn the metrics of an earlier start would not be read.
                best_fn=accuracy,
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(config.keep_checkpoints),
                        policies.BestN(get_metric_fn=accuracy, n=1),
                    ]
                ),
                cleanup_tmp_directories=True,
                # Hosts may see a folder that they share at different times.
                single_host_load_and_broadcast=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    @property
    def newest(self) -> Path | None:
        """The newest one, if there is any."""
        step = self._manager.latest_step()
        return None if step is None else self._folder / str(step)

    def is_due(self) -> bool:
        """Whether the last one is `checkpoint_minutes` old; to be asked after every call."""
        self._asked += 1
        due = time.monotonic() - self._saved > 60 * self._config.checkpoint_minutes
        if jax.process_count() == 1:
            return due
        # Clocks differ, and to agree is to wait for each other.
        return self._asked % _CALLS_TO_AGREE == 0 and hosts.from_first_host(due)

    def save(self, state: TrainState, history: History) -> None:
        """Writes a checkpoint in the background, and lets go of those not to be kept.

        Raises:
          InputError: if this one, or the one before, cannot be written.
        """
        self._saved = time.monotonic()
        step, workdir = int(state.step), self._folder.parent
        run = (
            dataclasses.asdict(history)
            | {
                "epoch": len(history.records),
                "seed": self._config.seed,
                "best": best_of(history.records),
                "config": dataclasses.asdict(self._config),
            }
            | self._environment
        )
        accuracy = checkpoint_files.accuracy_at(run, step)
        metrics = {} if accuracy is None else {"test_accuracy": accuracy}
        try:
            self._manager.wait_until_finished()
            replaces = step in self._manager.all_steps()  # the epoch's end, before its evaluation
            if replaces:
                hosts.on_first_host(checkpoint_files.set_replaced_aside, workdir, step)
                self._manager.reload()
            self._being_written = step
            saves = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), run=ocp.args.JsonSave(run)
                ),
                metrics=metrics,
            )
            if not saves:
                raise RuntimeError(f"Orbax does not take step {step}")
            if replaces:
                self._manager.wait_until_finished()
                hosts.on_first_host(checkpoint_files.drop_replaced, workdir)
        except Exception as error:  # of Orbax, TensorStore and the disk
            if jax.process_index() == 0:
                with contextlib.suppress(OSError):  # then at the next start
                    checkpoint_files.put_back_replaced(workdir)
            raise self._cannot_be_written(error) from error

    def restore(self, like: TrainState) -> tuple[TrainState, History]:
        """The newest state and history, on the devices and with the sharding of `like`.

        There has to be a checkpoint: see `newest`.

        Raises:
          InputError: if it is of another model, or cannot be read.
        """
        step = self._manager.latest_step()
        assert step is not None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        placed = ocp.checkpoint_utils.construct_restore_args(abstract)
        folder = self._folder / str(step)
        with checkpoint_files.reading(folder):
            metadata: Any = self._manager.item_metadata(step)
            checkpoint_files.check_arrays(folder, metadata["state"], like)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    # Versions before the moving average have no place for one.
                    state=ocp.args.PyTreeRestore(abstract, placed, partial_restore=True),
                    run=ocp.args.JsonRestore(),
                ),
            )
            return restored["state"], History.from_json(restored["run"])

    def finish(self) -> None:
        """Returns when all is on disk.

        Raises:
          InputError: if it cannot be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._cannot_be_written(error) from error

    def close(self) -> None:
        """Lets go of the files, also where they could not be written."""
        try:
            self._manager.close()
        except Exception as error:
            raise self._cannot_be_written(error) from error

    def _write_manifest(self) -> None:
        """Completes the folder that Orbax is about to rename."""
        if jax.process_index() == 0:
            (folder,) = self._folder.glob(f"{self._being_written}.orbax-checkpoint-tmp*")
            checkpoint_files.write_manifest(folder)

    def _cannot_be_written(self, error: Exception) -> InputError:
        steps = checkpoint_files.steps_in(self._folder.parent)
        last = f"the last one is {self._folder / str(steps[-1])}" if steps else "there is none"
        return InputError(
            f"a checkpoint cannot be written to {self._folder}: {short_reason(error)}; {last}"
        )


def _one_writer() -> Any:
    """How Orbax writes arrays: whole, on one device of those that have the same.

    By default each device writes a part, for which Orbax compiles a program a kind of array
    and device: seconds before the first checkpoint.
    """
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    return ocp.type_handlers.create_type_handler_registry((jax.Array, handler))


def _versions() -> dict[str, str]:
    names = ("flax_resnet", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}
