"""The folder of a run, finished or at work, opened for use; nothing in it is changed."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_resnet.data import normalize
from flax_resnet.errors import InputError
from flax_resnet.models.registry import Model
from flax_resnet.models.shapes import variable_shapes
from flax_resnet.training import files, programs
from flax_resnet.training.checkpoint import (
    Record,
    accuracy_at,
    choose_checkpoint,
    read_history,
    read_variables,
)
from flax_resnet.training.config import Config, check_config

# What a line of metrics.jsonl has at least.
_METRICS = (
    "epoch",
    "step",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "learning_rate",
    "images_per_second",
    "seconds",
)
_ATTEMPTS = 3
_SECONDS_TO_DELETE = 1.0


@dataclass(frozen=True, eq=False)
class Run:
    """A run and one of its checkpoints.

    Attributes:
      workdir: folder of the run.
      config: of the run.
      class_names: one name a class.
      image_shape: (H, W, C) of the images that it trains on.
      mean, std: of each channel of its training images, in units of full white.
      model: for this process's first device.
      variables: {"params", "batch_stats"} of the checkpoint, or {"params"} without BatchNorm,
        float32, on that device.
      step: training steps done at the checkpoint.
      test_accuracy: at the checkpoint; None if it was written inside an epoch.
      records: lines of metrics.jsonl, also of epochs after the checkpoint.
      versions: of Python packages, by name, when the checkpoint was written.
      hardware: see `describe_hardware`; empty where the checkpoint does not tell.
    """

    workdir: Path
    config: Config
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model: Model
    variables: dict[str, Any]
    step: int
    test_accuracy: float | None
    records: tuple[Record, ...]
    versions: dict[str, str]
    hardware: dict[str, str]


def load_run(workdir: str | Path, checkpoint: str | int = "best") -> Run:
    """Opens a run's folder, also while the run is at work in it.

    It takes no lock, writes nothing, and compares the checkpoint's files with their
    SHA-256 before it reads them.

    Args:
      workdir: folder of the run.
      checkpoint: "best", the one with the highest test accuracy of those that are kept (the
        earliest of several); "newest"; or the step of one.

    Raises:
      InputError: if it is not the folder of a run, or has no such checkpoint, or one that
        is damaged or does not fit the config.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    if not os.path.isfile(path):  # False too where one may not look
        raise InputError(f"{workdir} is not the folder of a run: it has no config.json")
    try:
        config = check_config(files.read_json(path))
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from error
    description = _description(workdir / "dataset.json")
    mesh = programs.make_mesh(1, devices=programs.find_devices(local=True)[:1])
    model = programs.build_model(config, len(description["class_names"]), mesh)
    folder, variables, written = _read_patiently(
        workdir, checkpoint, model, description["image_shape"]
    )
    return Run(
        workdir=workdir,
        config=config,
        model=model,
        variables=variables,
        step=int(folder.name),
        test_accuracy=accuracy_at(written, int(folder.name)),
        records=tuple(_read_records(workdir / "metrics.jsonl")),
        versions=_words(written.get("versions")),
        hardware=_words(written.get("hardware")),
        **description,
    )


def make_classifier(
    run: Run, batch_size: int, *, flip: bool = False
) -> Callable[[np.ndarray], np.ndarray]:
    """The compiled way from pixels to logits.

    Args:
      run: whose model and variables it uses.
      batch_size: the most images that it will take at once.
      flip: return the mean of an image's logits and its mirror image's.

    Returns:
      images, uint8 [n, H, W, C] with n <= batch_size -> logits, float32 [n, K].
    """

    @jax.jit
    def program(variables, images):
        def logits(images):
            images = normalize(images, run.mean, run.std)
            return jnp.asarray(run.model.apply(variables, images, train=False))

        if flip:
            return (logits(images) + logits(images[:, :, ::-1])) / 2
        return logits(images)

    device = jax.local_devices()[0]

    def classify(images: np.ndarray) -> np.ndarray:
        # Always the same shape, which is compiled once.
        padded = np.zeros((batch_size, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        return np.asarray(program(run.variables, jax.device_put(padded, device)))[: len(images)]

    return classify


def _description(path: Path) -> dict[str, Any]:
    """What `Run` has from dataset.json."""
    content = files.read_json(path)
    keys = ("class_names", "image_shape", "mean", "std")
    names, shape, mean, std = (content.get(key, ()) for key in keys)
    if not (
        _is_list_of(str, names)
        and _is_list_of(int, shape)
        and len(shape) == 3
        and all(_is_list_of(float, numbers) for numbers in (mean, std))
        and len(mean) == len(std) == shape[2]
    ):
        raise InputError(
            f"{path} is damaged: it does not hold class_names, image_shape, mean and std"
        )
    return {
        "class_names": tuple(names),
        "image_shape": tuple(shape),
        "mean": tuple(mean),
        "std": tuple(std),
    }


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(v) is kind for v in value)


def _read_patiently(
    workdir: Path, checkpoint: str | int, model: nn.Module, image_shape: tuple[int, ...]
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The checkpoint that is asked for, its variables, and what stands beside them."""
    attempts = 0
    while True:
        chosen = choose_checkpoint(workdir, checkpoint)
        try:
            variables, history = read_variables(chosen), read_history(chosen)
            break
        except InputError:
            attempts += 1
            # A run at work deletes checkpoints, and this may have been one.
            time.sleep(_SECONDS_TO_DELETE)
            if chosen.exists() or attempts == _ATTEMPTS:
                raise
    if _shapes(variables) != _shapes(variable_shapes(model, image_shape)):
        raise InputError(f"checkpoint {chosen} is of another model than config.json tells")
    return chosen, jax.device_put(variables, jax.local_devices()[0]), history


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


def _read_records(path: Path) -> Iterator[Record]:
    """The lines of metrics.jsonl; one that a run is just writing is left out."""
    try:
        lines = path.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return  # of a run in its first epoch
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            return
        try:
            record = json.loads(line)
            yield record | {name: _number(record[name]) for name in _METRICS}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged in line {number}: {error!r}") from error


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return value


def _words(content: Any) -> dict[str, str]:
    return {str(k): str(v) for k, v in content.items()} if isinstance(content, dict) else {}
