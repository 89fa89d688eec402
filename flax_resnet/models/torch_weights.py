"""PyTorch state_dicts to our variables and back, by one mechanical rule.

The names of the modules are PyTorch's but for two spellings: a number that PyTorch's name
has after a dot stands after an underscore, as in `layer1_0` for `layer1.0`, `conv1_3` or
`features_0`; and `downsample.0` and `.1` are `downsample_conv` and `downsample_bn`.
So `layer1.0.conv1.weight` [O, I, H, W] is `params/layer1_0/conv1/kernel`
[H, W, I, O]. BatchNorm's and GroupNorm's weight and bias are scale and bias in `params`;
BatchNorm's running_mean and running_var are mean and var in `batch_stats`, unchanged.

The names are those of torchvision (resnet, wide_resnet, resnext, vgg) and timm (resnet*d,
seresnet50), whose published weights fit. With norm="group" the modules are called bn1, ...
all the same, as they are where PyTorch's code is given another norm_layer. Pre-activation
nets have bn1, conv1, bn2, ... in their blocks, `downsample.0`, a convolution alone, where
the shape changes, and `bn` before the pooling.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.models.checks import check_model, check_variables, some
from flax_resnet.models.dialects import in_our_names, torch_name, without_counters
from flax_resnet.models.shapes import ENOUGH, variable_shapes
from flax_resnet.models.stacking import is_stacked
from flax_resnet.models.weight_files import inner_state_dict, read_as_written

_FIRST_CONVOLUTIONS = ("conv1.weight", "conv1.0.weight", "features.0.weight")


def from_torch(
    model: nn.Module, state_dict: Mapping[str, Any] | str | os.PathLike[str]
) -> dict[str, Any]:
    """The variables of `model` with a PyTorch model's weights.

    Args:
      model: a `ResNet`, `ResNet9`, `VGG` or a block.
      state_dict: what `state_dict()` of its PyTorch twin returns, of any number of input
        channels, or a larger dict in which it lies as `state_dict`, `model`, ...; values are
        tensors or arrays. num_batches_tracked is left out. Names that the model has not are
        brought to ours, as far as they are known: see `dialects.py`. Or the path or Hub id of
        one, see `read_state_dict`.

    Returns:
      {"params": ..., "batch_stats": ...}, float32 copies; without BatchNorm only "params".

    Raises:
      TypeError: for anything else, such as a torch.nn.Module, or if the model is none.
      ValueError: names five entries each that are missing, left over or of another shape, and
        counts the rest; names one whose values are not there or not real numbers; or
        says why the file cannot be read.
      ImportError: see `read_state_dict`.
    """
    check_model(model, "fr.from_torch(model, state_dict)")
    what = "the state_dict"
    if isinstance(state_dict, str | os.PathLike):
        what, state_dict = os.fspath(state_dict), read_as_written(state_dict)
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict)
        hint = ": write model.state_dict()" if hasattr(state_dict, "state_dict") else ""
        raise TypeError(
            "from_torch takes a state_dict, which is a dict of tensors, or the path of one, "
            f"not a {kind.__module__}.{kind.__qualname__}{hint}"
        )
    if "params" in state_dict:
        raise ValueError("these are the variables of a Flax model already, and no state_dict")
    inner = inner_state_dict(state_dict, what)
    try:
        arrays = {n: _to_numpy(n, value) for n, value in without_counters(inner).items()}
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    translated = in_our_names(arrays)
    channels = input_channels(translated) or 3
    shapes: dict[tuple[str, ...], Any] = flatten_dict(variable_shapes(model, (*ENOUGH, channels)))
    paths = sorted(shapes, key=lambda path: path[0], reverse=True)  # the parameters first
    expected = {torch_name(path): path for path in paths}
    if not expected.keys() <= arrays.keys():
        arrays = translated
    missing = [name for name in expected if name not in arrays]
    left_over = [name for name in arrays if name not in expected]
    if 2 * len(missing) > len(expected) and 2 * len(left_over) > len(arrays):
        raise ValueError(
            f"{what} has other names than the model: {some(left_over)}, where the model "
            f"has {some(missing)}"
        )
    flat, misshapen = {}, []
    for name, path in expected.items():
        if name not in arrays:
            continue
        array, shape = arrays[name], _to_layout(np.empty(shapes[path].shape)).shape
        if array.shape == (*shape, 1, 1):  # a classifier that is a 1x1 convolution
            array = array.reshape(shape)
        if array.shape != shape:
            misshapen.append(f"{name} has shape {array.shape}, expected {shape}")
        else:
            # Copies: on CPU JAX may otherwise share memory that PyTorch goes on writing to.
            flat[path] = jnp.array(_from_layout(array), jnp.float32)
    problems = {"missing ": missing, "left over ": left_over, "": misshapen}
    if any(problems.values()):
        listed = "; ".join(kind + some(entries) for kind, entries in problems.items() if entries)
        raise ValueError(f"{what} does not fit the model: {listed}")
    return unflatten_dict(flat)


def input_channels(state_dict: Mapping[str, Any]) -> int | None:
    """Channels of the images that a state_dict is for; None if no name tells."""
    firsts = [state_dict[name] for name in _FIRST_CONVOLUTIONS if name in state_dict]
    return firsts[0].shape[1] if firsts and len(firsts[0].shape) == 4 else None


def with_channels(state_dict: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """The same for images of another number of channels, as timm's adapt_input_conv.

    For one channel the first convolution's kernels are summed over the channels, so that gray
    pictures give what they gave when repeated, unless its kernels are standardized. For any other
    number they are repeated and scaled; equal channels then give what they gave where that is a
    multiple of the number before, and about as much elsewhere.
    """
    adapted = dict(state_dict)
    for name in _FIRST_CONVOLUTIONS:
        if name in adapted:
            kernel = _to_numpy(name, adapted[name]).astype(np.float32)
            had = kernel.shape[1]
            if channels == 1:
                kernel = kernel.sum(1, keepdims=True)
            else:
                repeated = np.tile(kernel, (1, -(-channels // had), 1, 1))
                kernel = repeated[:, :channels] * np.float32(had / channels)
            adapted[name] = kernel
    return adapted


def to_torch(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict of tensors for the PyTorch twin of `model`; needs PyTorch.

    Flax counts no batches, so every num_batches_tracked is 0; PyTorch reads it only
    where a BatchNorm has momentum=None.

    Args:
      model: a `ResNet`, `ResNet9`, `VGG` or a block.
      variables: its {"params": ..., "batch_stats": ...}; other collections are left out.

    Raises:
      TypeError: if `model` is not a Flax module.
      ValueError: if the variables are not that, or stacked: see `unstack_blocks`.
    """
    import torch

    arrays = to_checked_arrays(model, variables)
    # torch.from_numpy does not know ml_dtypes' bfloat16.
    exact = {n: a.astype(np.float32) if a.dtype == jnp.bfloat16 else a for n, a in arrays.items()}
    return {name: torch.from_numpy(array) for name, array in exact.items()}


def to_checked_arrays(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state_dict of NumPy arrays, of all variables of a model; needs no PyTorch."""
    check_model(model, "fr.to_torch(model, variables)")
    check_variables(variables)
    arrays = to_arrays(variables)
    shapes: Any = {}
    with contextlib.suppress(Exception):  # of one's own model, which wants other images
        shapes = variable_shapes(model, (*ENOUGH, input_channels(arrays) or 3))
    if "batch_stats" in shapes and not variables.get("batch_stats"):
        raise ValueError(
            'without "batch_stats" the statistics of BatchNorm are lost: write '
            '{"params": params, "batch_stats": batch_stats}'
        )
    if shapes:
        _check_axes(shapes, variables)
    return arrays


def _check_axes(shapes: Any, variables: Mapping[str, Any]) -> None:
    """Raises ValueError for variables of another model, or of several on top of each other."""
    kinds = [kind for kind in ("params", "batch_stats") if kind in shapes]
    expected: dict[tuple[str, ...], Any] = flatten_dict({kind: shapes[kind] for kind in kinds})
    found: dict[tuple[str, ...], Any] = flatten_dict({kind: variables[kind] for kind in kinds})
    if missing := [path for path in expected if path not in found]:
        raise ValueError(f"the variables lack what the model has: {some(map(torch_name, missing))}")
    more = {
        np.ndim(array) - expected[path].ndim for path, array in found.items() if path in expected
    }
    if more == {1}:
        raise ValueError(
            f"these are the variables of {len(next(iter(found.values())))} models: write "
            "jax.tree.map(lambda array: array[0], variables)"
        )


def to_arrays(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Variables as a state_dict of NumPy arrays; their names alone tell the layout."""
    flat = flatten_dict({k: variables[k] for k in ("params", "batch_stats") if k in variables})
    if any(map(is_stacked, flat)):
        raise ValueError("the blocks are stacked, as PyTorch has none: unstack_blocks(variables)")
    state_dict = {}
    for path, array in flat.items():
        name = torch_name(path)
        state_dict[name] = np.array(_to_layout(np.asarray(array)), order="C")
        if name.endswith("running_var"):
            state_dict[name.replace("running_var", "num_batches_tracked")] = np.array(0)
    return state_dict


def _to_layout(array: np.ndarray) -> np.ndarray:
    """[H, W, I, O] to [O, I, H, W], and [I, O] to [O, I]."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_layout(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_numpy(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        kinds = {
            "is a sparse tensor: give its to_dense()": str(value.layout) != "torch.strided",
            "is a quantized tensor: give its dequantize()": value.is_quantized,
            "is on the meta device, where it has no values": value.is_meta,
        }
        for kind, is_so in kinds.items():
            if is_so:
                raise ValueError(f"{name} {kind}")
        if not value.is_complex():
            # .float(): NumPy has no bfloat16.
            return value.detach().cpu().float().numpy()
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind in "cOUSmM":
        kind = type(value).__name__ if array.dtype.kind == "O" else array.dtype
        raise ValueError(f"{name} is not of real numbers, but {kind}")
    return array
