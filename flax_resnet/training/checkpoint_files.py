"""A run's checkpoints as they lie on disk: chosen, judged and read, without Orbax's manager.

`checkpoints/STEP` holds the state, as Orbax writes arrays; `run`, a JSON file with the rest;
and `manifest.json`, the SHA-256 of every file. TensorStore does not notice a flipped bit, so the
manifest is compared before anything is read.
"""

import contextlib
import hashlib
import itertools
import json
import math
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from flax_resnet.errors import InputError, short_reason
from flax_resnet.training.hardware import host_memory
from flax_resnet.training.jsonfiles import read_json

_REPLACED = "replaced"
_SMALL = 2**26  # bytes
_MANIFEST = "manifest.json"
# Orbax writes these when the rest is done, and does without them.
_NOT_IN_MANIFEST = (_MANIFEST, "commit_success.txt", "_CHECKPOINT_METADATA")


def steps_in(workdir: Path) -> list[int]:
    """The steps that a run's folder has checkpoints of, the newest last."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def choose_checkpoint(workdir: Path, which: str | int) -> Path:
    """The folder of a checkpoint; nothing in a run's folder is changed for it.

    Args:
      workdir: folder of the run.
      which: "best", the one with the highest test accuracy of those that are kept (the
        earliest of several, and the newest if none was evaluated); "newest"; or the step of one.

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
        qualities = {step: quality(step) for step in steps}
        best = max(steps, key=qualities.__getitem__)
        return folder / str(best if qualities[best] >= 0 else steps[-1])
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
    return read_json(checkpoint / "run" / "metadata", {"records": lambda v: isinstance(v, list)})


def accuracy_at(history: Mapping[str, Any], step: int) -> float | None:
    """Test accuracy at a checkpoint, of its `read_history`; None inside an epoch."""
    match history["records"]:
        case [*_, {"step": int(last), "test_accuracy": float(accuracy)}] if last == step:
            return accuracy
    return None


def read_variables(checkpoint: Path, expected: Any = None) -> dict[str, Any]:
    """The variables of a sound checkpoint that its evaluation took; the rest stays on disk.

    They are the moving average where the run keeps one. Every host reads by itself.

    Args:
      checkpoint: its folder.
      expected: what has the shapes and dtypes of the variables, where these are known.

    Returns:
      {"params", "batch_stats"}, or {"params"}, NumPy arrays.

    Raises:
      InputError: if it is damaged, or of another model.
    """
    if found := damage_of(checkpoint):
        raise InputError(
            f"checkpoint {checkpoint} is damaged: {found}; the command of the run, given again, "
            "sets it aside"
        )
    silence_closed_event_loops()
    host = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix=f"read_{host}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    state = checkpoint.absolute() / "state"
    with reading(checkpoint):
        # Not a checkpointer's metadata, which warns of a file that Orbax can do without.
        stored: Any = handler.metadata(epath.Path(state)).tree
        averaged = bool(stored.get("ema"))
        variables = stored["ema"] if averaged else stored
        like = {kind: variables[kind] for kind in ("params", "batch_stats") if variables.get(kind)}
        check_arrays(checkpoint, like, expected)
        like = {"ema": like} if averaged else like
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        arguments = ocp.args.PyTreeRestore(like, as_numpy, partial_restore=True)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            restored = checkpointer.restore(state, args=arguments)
        return restored["ema"] if averaged else restored


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Raises an InputError where a checkpoint cannot be read within."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Orbax and TensorStore have many, and no base for them
        raise InputError(
            f"checkpoint {checkpoint} cannot be read: {short_reason(error)}"
        ) from error


def check_arrays(checkpoint: Path, stored: Any, expected: Any = None) -> None:
    """Refuses arrays by what Orbax tells of them, before there is memory for any.

    Args:
      checkpoint: that they are in.
      stored: a tree of Orbax's metadata.
      expected: what has the shapes and dtypes that they should have; None where nobody knows.

    Raises:
      InputError: if they are others, or more than the memory holds.
    """
    leaves = jax.tree.leaves(stored)
    if any(_chunk(leaf) > max(1, math.prod(leaf.shape)) for leaf in leaves):
        raise InputError(f"checkpoint {checkpoint} is damaged: an array is smaller than its parts")
    if expected is None:
        size = sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in leaves)
        if size > host_memory():
            raise InputError(f"checkpoint {checkpoint} does not fit into memory: {size:,} bytes")
        return
    theirs, ours = _shapes(stored), _shapes(expected)
    different = [
        f"{name} {theirs.get(name, 'missing')}, expected {ours.get(name, 'none')}"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if different:
        more = f", and {len(different) - 3} more" if len(different) > 3 else ""
        raise InputError(
            f"checkpoint {checkpoint} is of another model: {'; '.join(different[:3])}{more}"
        )


def _chunk(leaf: Any) -> int:
    """Values of a part of an array that TensorStore decodes at once."""
    return math.prod(leaf.storage.chunk_shape or ()) if leaf.storage else 1


def _shapes(tree: Any) -> dict[str, str]:
    named = jax.tree_util.tree_leaves_with_path(jax.tree.map(_as_stored, tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in named
    }


def _as_stored(leaf: Any) -> Any:
    """Of a random key its numbers, as Orbax writes them."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


def write_manifest(checkpoint: Path) -> None:
    """Completes a checkpoint's folder, of which everything else is written."""
    (checkpoint / _MANIFEST).write_text(json.dumps(dict(_digests(checkpoint)), indent=1))


def set_replaced_aside(workdir: Path, step: int) -> None:
    """Moves a checkpoint out of the way of the one that is to replace it."""
    _move(workdir / "checkpoints" / str(step), workdir / _REPLACED / str(step))


def drop_replaced(workdir: Path) -> None:
    """Lets go of what was set aside: its replacement is written."""
    shutil.rmtree(workdir / _REPLACED, ignore_errors=True)


def put_back_replaced(workdir: Path) -> None:
    """Puts a checkpoint back whose replacement has not come to be, or is damaged."""
    for aside in (workdir / _REPLACED).glob("*"):
        place = workdir / "checkpoints" / aside.name
        if place.exists() and damage_of(place):
            _move_to_damaged(workdir, place)
        if not place.exists():
            aside.rename(place)
    drop_replaced(workdir)


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
        expected = read_json(checkpoint / _MANIFEST)
        actual = dict(_digests(checkpoint))
    except (InputError, OSError) as error:
        if isinstance(error.__cause__ or error, PermissionError):
            raise InputError(f"checkpoint {checkpoint} cannot be read: {error}") from error
        return short_reason(error)
    # What else lies there, as file managers and network disks leave it, does no harm.
    for name in sorted(expected):
        if name not in actual:
            return f"{name} is missing"
        if expected[name] != actual[name]:
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
    """Name and SHA-256 of every file.

    Raises:
      OSError: if one cannot be read, is a pipe, say, which would never end, or has holes, which
        would take long.
    """
    for path in sorted(checkpoint.rglob("*")):
        if path.is_dir() or not path.exists():  # the latter of a link that leads nowhere
            continue
        name, status = str(path.relative_to(checkpoint)), path.stat()
        if not path.is_file():
            raise OSError(f"{name} is not a file")
        if status.st_size > _SMALL and 512 * status.st_blocks < status.st_size / 4:
            raise OSError(f"{name} has {status.st_size:,} bytes, mostly holes")
        if path.name not in _NOT_IN_MANIFEST:
            with path.open("rb") as file:
                yield name, hashlib.file_digest(file, "sha256").hexdigest()


@cache
def silence_closed_event_loops() -> None:
    """Keeps TensorStore's threads from writing tracebacks of an event loop that is closed.

    Where an array cannot be read or written, Orbax raises, which is told in a line, and closes
    its loop before the threads of the other arrays have come back to it.
    """
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook

    def is_late(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    def excepthook(kind, error, traceback):
        if not is_late(error):
            hooks[0](kind, error, traceback)

    def unraisablehook(unraisable):
        if not is_late(unraisable.exc_value):
            hooks[1](unraisable)

    def threads_excepthook(arguments):
        if not is_late(arguments.exc_value):
            hooks[2](arguments)

    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook
    threading.excepthook = threads_excepthook
