"""The folder of a run, finished or at work, opened for use; nothing in it is changed."""

import json
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
from flax_resnet.errors import InputError, short_reason
from flax_resnet.models.shapes import variable_shapes
from flax_resnet.training import files
from flax_resnet.training.checkpoint_files import (
    accuracy_at,
    choose_checkpoint,
    read_history,
    read_variables,
)
from flax_resnet.training.config import Config, check_config
from flax_resnet.training.history import Record, check_record
from flax_resnet.training.jsonfiles import read_json, read_text, user_path
from flax_resnet.training.mesh import find_devices, make_mesh
from flax_resnet.training.own import Own
from flax_resnet.training.plan import build_model

_ATTEMPTS = 3
_SECONDS_TO_DELETE = 1.0


@dataclass(frozen=True, eq=False)
class Run:
    """A run and one of its checkpoints.

    Attributes:
      workdir: folder of the run.
      config: of the run; keys that `brought` takes the place of have their defaults.
      brought: by name, what its script brought to `train`: model, data, ...
      class_names: one name a class.
      image_shape: (H, W, C) of the images that it trains on.
      mean, std: of each channel of its training images, of pixels from 0 to 1.
      model: for this process's first device. None in a report, where its script brought it.
      variables: {"params", "batch_stats"} of the checkpoint, or {"params"} without BatchNorm,
        float32, on that device; their moving average, where the run keeps one.
      step: training steps done at the checkpoint.
      test_accuracy: at the checkpoint; None if it was written inside an epoch.
      records: lines of metrics.jsonl, also of epochs after the checkpoint.
      versions: of Python packages, by name, when the checkpoint was written.
      hardware: see `describe_hardware`; empty where the checkpoint does not tell.
    """

    workdir: Path
    config: Config
    brought: dict[str, str]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model: Any
    variables: dict[str, Any]
    step: int
    test_accuracy: float | None
    records: tuple[Record, ...]
    versions: dict[str, str]
    hardware: dict[str, str]

    @property
    def model_name(self) -> str:
        """Of the model, also where a script brought it."""
        return self.brought.get("model", self.config.model)

    @property
    def data_name(self) -> str:
        """Of the data set, also where a script brought it."""
        return self.brought.get("data", self.config.dataset)

    def __repr__(self) -> str:
        tested = "" if self.test_accuracy is None else f", test accuracy {self.test_accuracy:.2%}"
        return f"<Run in {self.workdir}: {self.model_name} at step {self.step}{tested}>"


def load_run(
    workdir: str | Path, checkpoint: str | int = "best", *, model: nn.Module | None = None
) -> Run:
    """Opens a run's folder, also while the run is at work in it.

    It takes no lock, writes nothing, and compares the checkpoint's files with their
    SHA-256 before it reads them.

    Args:
      workdir: folder of the run.
      checkpoint: "best", the one with the highest test accuracy of those that are kept (the
        earliest of several); "newest"; or the step of one.
      model: of a run whose script brought its own; else the config tells.

    Raises:
      InputError: if it is not the folder of a run, or has no such checkpoint, or one that
        is damaged or does not fit the config or the model.
    """
    run = open_run(workdir, checkpoint, model)
    if run.model is None:
        raise InputError(
            f"the run in {workdir} has a model of its own, {run.brought['model']}: in Python "
            "fr.load_run(workdir, model=...) opens it"
        )
    return run


def open_run(workdir: str | Path, checkpoint: str | int, model: nn.Module | None = None) -> Run:
    """As `load_run`, but a run whose model is its own is opened without that too."""
    Own(model=model)  # raises if it is none
    workdir = user_path(workdir)
    path = workdir / "config.json"
    if not os.path.isfile(path):  # False too where one may not look
        raise InputError(f"{workdir} is not the folder of a run: it has no config.json")
    files.check_files(workdir)
    stored = read_json(path)
    brought = _words(stored.pop(files.BROUGHT, {}))
    try:
        config = check_config(stored)
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from error
    description = _description(workdir / "dataset.json")
    mesh = make_mesh(1, devices=find_devices(local=True)[:1])
    if "model" not in brought:
        if model is not None:
            raise InputError(f"the run in {workdir} has its model by name, {config.model}")
        model = build_model(config, len(description["class_names"]), mesh)
    expected = None if model is None else _expected(model, description["image_shape"])
    folder, variables, written = _read_patiently(workdir, checkpoint, expected)
    return Run(
        workdir=workdir,
        config=config,
        brought=brought,
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
    content = read_json(path, files.DESCRIPTION)
    if not len(content["mean"]) == len(content["std"]) == content["image_shape"][2]:
        raise InputError(f"{path} is damaged: it does not hold mean and std of each channel")
    return {key: tuple(content[key]) for key in files.DESCRIPTION}


def _expected(model: nn.Module, image_shape: tuple[int, ...]) -> Any:
    """Shapes and dtypes of its variables."""
    try:
        return variable_shapes(model, image_shape)
    except Exception as error:  # of a model of somebody's own
        raise InputError(
            f"no run has such a model: {type(error).__name__}: {short_reason(error)}"
        ) from error


def _read_patiently(
    workdir: Path, checkpoint: str | int, expected: Any
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The checkpoint that is asked for, its variables, and what stands beside them."""
    attempts = 0
    while True:
        chosen = choose_checkpoint(workdir, checkpoint)
        try:
            variables, history = read_variables(chosen, expected), read_history(chosen)
            return chosen, jax.device_put(variables, jax.local_devices()[0]), history
        except InputError:
            attempts += 1
            # A run at work deletes checkpoints, and this may have been one.
            time.sleep(_SECONDS_TO_DELETE)
            if chosen.exists() or attempts == _ATTEMPTS:
                raise


def _read_records(path: Path) -> Iterator[Record]:
    """The lines of metrics.jsonl; one that a run is just writing is left out."""
    try:
        lines = read_text(path).splitlines(keepends=True)
    except FileNotFoundError:
        return  # of a run in its first epoch
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            return
        try:
            record = json.loads(line)
            check_record(record)
            yield record
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(f"{path} is damaged in line {number}: {error!r}") from error


def _words(content: Any) -> dict[str, str]:
    return {str(k): str(v) for k, v in content.items()} if isinstance(content, dict) else {}
