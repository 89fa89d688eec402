"""Orbax checkpoints of all that a run is, and the way back to the newest sound one.

`checkpoints/STEP` holds the state, as Orbax writes arrays; `run`, a JSON file with the rest;
and `manifest.json`, the SHA-256 of every file. Orbax renames the folder to its place when all
of it is written. TensorStore does not notice a flipped bit, so the manifest is compared
before anything is read.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from flax_resnet.errors import InputError, short_reason
from flax_resnet.training import hosts
from flax_resnet.training.config import Config
from flax_resnet.training.hardware import describe_hardware
from flax_resnet.training.steps import TrainState

Record = dict[str, Any]

_CALLS_TO_AGREE = 32
_REPLACED = "replaced"
_MANIFEST = "manifest.json"
# Orbax writes these when the rest is done, and does without them.
_NOT_IN_MANIFEST = (_MANIFEST, "commit_success.txt", "_CHECKPOINT_METADATA")


@dataclass
class History:
    """What a run has been through so far; with its `TrainState`, all that it goes on from.

    Attributes:
      records: a line of metrics.jsonl for every epoch that is done.
      losses, accuracies, gradient_norms: of the steps of the epoch that is not done.
      seconds: that these took.
      rollbacks: how often the run went back because loss or gradient was not finite; each
        time the examples come in another order, with other augmentation.
    """

    records: list[Record] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rollbacks: int = 0

    @property
    def best(self) -> Record | None:
        """The first record with the highest test accuracy."""
        return max(self.records, key=lambda record: record["test_accuracy"], default=None)

    def add_steps(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Adds what steps of the epoch gave, see `train_step`; each [steps]."""
        self.losses += metrics["loss"].tolist()
        self.accuracies += metrics["accuracy"].tolist()
        self.gradient_norms += metrics["gradient_norm"].tolist()

    def means(self) -> Record:
        """What a record says of the epoch's steps."""
        return {
            "train_loss": statistics.fmean(self.losses),
            "train_accuracy": statistics.fmean(self.accuracies),
            "gradient_norm": statistics.fmean(self.gradient_norms),
        }

    def end_epoch(self, record: Record) -> None:
        """Adds the record of the epoch, and begins the next."""
        self.records.append(record)
        self.losses, self.accuracies, self.gradient_norms, self.seconds = [], [], [], 0.0


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

        self._config = config
        self._folder = workdir.absolute() / "checkpoints"
        self._environment = {"versions": _versions(), "hardware": describe_hardware()}
        self._being_written = 0
        self._saved, self._asked = time.monotonic(), 0
        self._manager = _Manager(
            self._folder,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=_one_writer()),
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
        step = int(state.step)
        run = (
            dataclasses.asdict(history)
            | {
                "epoch": len(history.records),
                "seed": self._config.seed,
                "best": history.best,
                "config": dataclasses.asdict(self._config),
            }
            | self._environment
        )
        metrics = {}
        if history.records and history.records[-1]["step"] == step:
            metrics["test_accuracy"] = history.records[-1]["test_accuracy"]
        try:
            self._manager.wait_until_finished()
            place, aside = (self._folder / str(step), self._folder.parent / _REPLACED / str(step))
            replaces = step in self._manager.all_steps()  # the epoch's end, before its evaluation
            if replaces:
                hosts.on_first_host(partial(_move, place, aside))
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
                hosts.on_first_host(partial(shutil.rmtree, aside.parent, ignore_errors=True))
        except Exception as error:  # of Orbax, TensorStore and the disk
            if jax.process_index() == 0:
                with contextlib.suppress(OSError):  # then at the next start
                    put_back_replaced(self._folder.parent)
            raise self._cannot_be_written(error) from error

    def restore(self, like: TrainState) -> tuple[TrainState, History]:
        """The newest state and history, on the devices and with the sharding of `like`.

        There has to be a checkpoint: see `newest`.

        Raises:
          InputError: if it is of another model, or cannot be read.
        """
        step = self._manager.latest_step()
        assert step is not None
        self._check_shapes(step, like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        placed = ocp.checkpoint_utils.construct_restore_args(abstract)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(abstract, placed), run=ocp.args.JsonRestore()
                ),
            )
            names = [field.name for field in dataclasses.fields(History)]
            return restored["state"], History(**{name: restored["run"][name] for name in names})
        except Exception as error:  # Orbax and TensorStore have many, and no base for them
            raise InputError(
                f"checkpoint {self._folder / str(step)} cannot be read: {short_reason(error)}"
            ) from error

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
            (folder / _MANIFEST).write_text(json.dumps(dict(_digests(folder)), indent=1))

    def _check_shapes(self, step: int, like: TrainState) -> None:
        metadata: Any = self._manager.item_metadata(step)
        theirs = _shapes(metadata["state"])
        ours = _shapes(like)
        different = [
            f"{name} {theirs.get(name, 'missing')}, expected {ours.get(name, 'none')}"
            for name in sorted({*theirs, *ours})
            if theirs.get(name) != ours.get(name)
        ]
        if different:
            more = f", and {len(different) - 3} more" if len(different) > 3 else ""
            raise InputError(
                f"checkpoint {self._folder / str(step)} is of another model: "
                f"{'; '.join(different[:3])}{more}"
            )

    def _cannot_be_written(self, error: Exception) -> InputError:
        steps = steps_in(self._folder.parent)
        last = f"the last one is {self._folder / str(steps[-1])}" if steps else "there is none"
        return InputError(
            f"a checkpoint cannot be written to {self._folder}: {short_reason(error)}; {last}"
        )


def steps_in(workdir: Path) -> list[int]:
    """The steps that a run's folder has checkpoints of, the newest last."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def choose_checkpoint(workdir: Path, which: str | int) -> Path:
    """The folder of a checkpoint; nothing in a run's folder is changed for it.

    Args:
      workdir: folder of the run.
      which: "best", the one with the highest test accuracy of those that are kept (the
        earliest of several); "newest"; or the step of one.

    Raises:
      InputError: if there is no such checkpoint.
    """
    folder = workdir / "checkpoints"
    steps = steps_in(workdir)
    if not steps:
        raise InputError(f"{workdir} holds no checkpoint of a run")

    def quality(step: int) -> float:
        try:
            accuracy = accuracy_at(read_history(folder / str(step)), step)
        except InputError:
            return -1.0  # the run has just deleted it, or it is damaged
        return -1.0 if accuracy is None else accuracy

    if which == "newest":
        return folder / str(steps[-1])
    if which == "best":
        return folder / str(max(steps, key=quality))
    if str(which) in map(str, steps):
        return folder / str(which)
    raise InputError(
        f"no checkpoint {which!r} in {folder}: "
        f"use best, newest or one of {', '.join(map(str, steps))}"
    )


def read_history(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint has beside the state, as it was written.

    Raises:
      InputError: if it cannot be read.
    """
    try:
        content = json.loads((checkpoint / "run" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"checkpoint {checkpoint} cannot be read: {short_reason(error)}"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise InputError(f"checkpoint {checkpoint} is damaged: it does not say how it came about")
    return content


def accuracy_at(history: Mapping[str, Any], step: int) -> float | None:
    """Test accuracy at a checkpoint, of its `read_history`; None inside an epoch."""
    match history["records"]:
        case [*_, {"step": int(last), "test_accuracy": float(accuracy)}] if last == step:
            return accuracy
    return None


def read_variables(checkpoint: Path) -> dict[str, Any]:
    """The model's variables of a sound checkpoint; the optimizer's state stays on disk.

    Every host reads by itself.

    Returns:
      {"params", "batch_stats"}, or {"params"}, NumPy arrays.

    Raises:
      InputError: if it is damaged.
    """
    if found := damage_of(checkpoint):
        raise InputError(f"checkpoint {checkpoint} is damaged: {found}")
    host = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix=f"read_{host}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    state = checkpoint.absolute() / "state"
    try:
        # Not a checkpointer's metadata, which warns of a file that Orbax can do without.
        stored: Any = handler.metadata(epath.Path(state)).tree
        like = {kind: stored[kind] for kind in ("params", "batch_stats") if stored.get(kind)}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        arguments = ocp.args.PyTreeRestore(like, as_numpy, partial_restore=True)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            return checkpointer.restore(state, args=arguments)
    except Exception as error:  # Orbax and TensorStore have many, and no base for them
        raise InputError(
            f"checkpoint {checkpoint} cannot be read: {short_reason(error)}"
        ) from error


def put_back_replaced(workdir: Path) -> None:
    """Puts a checkpoint back whose replacement has not come to be, or is damaged."""
    for aside in (workdir / _REPLACED).glob("*"):
        place = workdir / "checkpoints" / aside.name
        if place.exists() and damage_of(place):
            _move_to_damaged(workdir, place)
        if not place.exists():
            aside.rename(place)
    shutil.rmtree(workdir / _REPLACED, ignore_errors=True)


def set_damaged_aside(workdir: Path) -> list[str]:
    """Moves every checkpoint that is not as it was written to `workdir`/damaged.

    Returns:
      What to say of each.

    Raises:
      InputError: if no other is left, or one cannot be read; then none is moved.
    """
    folder = workdir / "checkpoints"
    steps = steps_in(workdir)
    damage = {step: found for step in steps if (found := damage_of(folder / str(step)))}
    newest_sound = max(set(steps) - set(damage), default=None)
    if damage and newest_sound is None:
        every = ", ".join(f"{step} ({found})" for step, found in damage.items())
        raise InputError(f"no checkpoint in {folder} can be used: {every}")
    said = []
    for step, found in damage.items():
        aside = _move_to_damaged(workdir, folder / str(step))
        said.append(
            f"checkpoint {step} is damaged ({found}) and now in {aside}; "
            f"the newest sound one is {newest_sound}"
        )
    return said


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, if anything is.

    Raises:
      InputError: if there is no permission to read them.
    """
    try:
        expected = dict(json.loads((checkpoint / _MANIFEST).read_text()))
        actual = dict(_digests(checkpoint))
    except PermissionError as error:
        raise InputError(f"checkpoint {checkpoint} cannot be read: {error}") from error
    except (OSError, ValueError, TypeError) as error:
        return short_reason(error)
    for name in sorted({*expected, *actual}):
        if name not in actual:
            return f"{name} is missing"
        if expected.get(name) != actual[name]:
            return f"{name} is not as it was written"
    return None


def _move_to_damaged(workdir: Path, checkpoint: Path) -> Path:
    """Where it is then."""
    step = checkpoint.name
    names = itertools.chain([step], (f"{step}-{i}" for i in itertools.count(2)))
    aside = next(p for name in names if not (p := workdir / "damaged" / name).exists())
    _move(checkpoint, aside)
    return aside


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    source.rename(target)


def _digests(checkpoint: Path) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of every file."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name not in _NOT_IN_MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield str(path.relative_to(checkpoint)), digest


def _one_writer() -> Any:
    """How Orbax writes arrays: whole, on one device of those that have the same.

    By default each device writes a part, for which Orbax compiles a program a kind of array
    and device: seconds before the first checkpoint.
    """
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    return ocp.type_handlers.create_type_handler_registry((jax.Array, handler))


def _shapes(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _versions() -> dict[str, str]:
    names = ("flax_resnet", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}
