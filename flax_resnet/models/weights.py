"""Weights of whole models: saving them, and starting from somebody else's."""

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.models.caches import expanded
from flax_resnet.models.checks import check_model
from flax_resnet.models.dialects import torch_name
from flax_resnet.models.shapes import variable_shapes
from flax_resnet.models.torch_weights import (
    from_torch,
    input_channels,
    to_checked_arrays,
    with_channels,
)
from flax_resnet.models.weight_files import read_state_dict

_LOG = logging.getLogger(__name__)


def save_weights(
    model: nn.Module, variables: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Saves variables as `.safetensors`, with the names and the layout of PyTorch.

    `from_torch(model, path)` and `create_model(name, weights=path)` read the file here, and
    `load_state_dict(safetensors.torch.load_file(path))` reads it in PyTorch. It is written
    whole or not at all; one that is there is replaced.

    Args:
      model: the model.
      variables: its {"params": ..., "batch_stats": ...}.
      path: of the file, ends in `.safetensors`.

    Raises:
      TypeError: if `model` is not a Flax module.
      ValueError: if the path ends in something else, if the file cannot be written, or the
        variables are not that or stacked: see `unstack_blocks`.
    """
    check_model(model, "fr.save_weights(model, variables, path)")
    path = expanded(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are saved as .safetensors, not {path}")
    arrays = to_checked_arrays(model, variables)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".weights-") as scratch:
            written = Path(scratch) / path.name
            # Not its save_file, whose files nobody else may read. Some libraries refuse a
            # file that does not say whose layout it has.
            written.write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
            written.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}") from error


def pretrained(
    model: nn.Module, source: str | os.PathLike[str], channels: int | None = None
) -> dict[str, Any]:
    """What `from_torch` gives, but the classifier is new where the number of classes differs.

    A new one has the values that `model.init` gives it with `jax.random.key(0)`; a warning
    in the log tells of it. With num_classes=0 the classifier is left out, and weights
    without one have 0 classes.

    Args:
      model: a `ResNet`, `ResNet9` or `VGG`.
      source: see `read_state_dict`.
      channels: see `fit_weights`.

    Raises:
      ValueError: names entries, but those of the classifier, that are missing, left over
        or of another shape, or says why the source cannot be read.
      ImportError: see `read_state_dict`.
    """
    state_dict = read_state_dict(source)
    try:
        flat, classes = fit_weights(model, state_dict, channels)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if model.num_classes not in (0, classes):
        _LOG.warning(
            "%s has %d classes, not %d: the classifier starts anew",
            source,
            classes,
            model.num_classes,
        )

        @jax.jit
        def new_head():
            # Any size does: the shapes of the variables do not depend on it.
            images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
            initial = flatten_dict(model.lazy_init(jax.random.key(0), images, train=False))
            return {path: initial[path] for path in initial if path not in flat}

        flat |= new_head()
    return unflatten_dict(flat)


def fit_weights(
    model: nn.Module, state_dict: Mapping[str, Any], channels: int | None = None
) -> tuple[dict[tuple[str, ...], jax.Array], int]:
    """A model's variables by their paths, but the classifier where the classes are not as many.

    Args:
      model: a `ResNet`, `ResNet9` or `VGG`.
      state_dict: see `from_torch`.
      channels: of the images; None for as many as the weights are for. Where these are for
        another number, see `with_channels`, and a warning in the log tells of it.

    Returns:
      Variables, and the number of classes of the state_dict: 0 if it has no classifier.

    Raises:
      ValueError: see `pretrained`.
    """
    had = input_channels(state_dict)
    if channels and had and had != channels:
        state_dict = with_channels(state_dict, channels)
        how = "summed" if channels == 1 else "repeated and scaled"
        _LOG.warning(
            "the weights are for images of %d channels, not %d: the first kernels are %s",
            *(had, channels, how),
        )
    head = _head(model)
    shapes = [state_dict[name].shape for name in map(torch_name, head) if name in state_dict]
    classes = shapes[0][0] if shapes and shapes[0] else 0
    flat: dict[tuple[str, ...], Any] = flatten_dict(
        from_torch(model.clone(num_classes=classes), state_dict)
    )
    if classes != model.num_classes:
        flat = {path: value for path, value in flat.items() if path not in head}
    return flat, classes


def _head(model: nn.Module) -> list[tuple[str, ...]]:
    """Paths of the variables whose shapes depend on the number of classes."""

    def shapes(classes: int) -> dict[tuple[str, ...], Any]:
        return flatten_dict(variable_shapes(model.clone(num_classes=classes)))

    one, two = shapes(1), shapes(2)
    return [path for path in one if one[path].shape != two[path].shape]
