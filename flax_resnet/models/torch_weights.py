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

import os
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.models.shapes import variable_shapes
from flax_resnet.models.weight_files import read_state_dict, without_prefixes

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_FIRST_CONVOLUTIONS = ("conv1.weight", "conv1.0.weight", "features.0.weight")


def from_torch(
    model: nn.Module, state_dict: Mapping[str, Any] | str | os.PathLike[str]
) -> dict[str, Any]:
    """The variables of `model` with a PyTorch model's weights.

    Args:
      model: a `ResNet`, `ResNet9`, `VGG` or a block.
      state_dict: what `state_dict()` of its PyTorch twin returns, of any number of input
        channels; values are tensors or arrays. num_batches_tracked is left out, and so is
        "module." or "_orig_mod." before a name. Or the path or Hub id of one, see
        `read_state_dict`.

    Returns:
      {"params": ..., "batch_stats": ...}, float32 copies; without BatchNorm only "params".

    Raises:
      ValueError: lists every entry that is missing, left over or of another shape, or
        says why the file cannot be read.
      ImportError: see `read_state_dict`.
    """
    what = "the state_dict"
    if isinstance(state_dict, str | os.PathLike):
        what, state_dict = os.fspath(state_dict), read_state_dict(state_dict)
    arrays = {
        name: _to_numpy(value)
        for name, value in without_prefixes(state_dict).items()
        if not name.endswith("num_batches_tracked")
    }
    firsts = [arrays[name] for name in _FIRST_CONVOLUTIONS if name in arrays]
    channels = firsts[0].shape[1] if firsts and firsts[0].ndim == 4 else 3
    shapes: dict[tuple[str, ...], Any] = flatten_dict(variable_shapes(model, (64, 64, channels)))
    expected = {torch_name(path): path for path in shapes}

    problems = [f"left over {name}" for name in arrays if name not in expected]
    for name, path in expected.items():
        shape = _to_layout(np.empty(shapes[path].shape)).shape
        if name not in arrays:
            problems.append(f"missing {name}")
        elif arrays[name].shape != shape:
            problems.append(f"{name} has shape {arrays[name].shape}, expected {shape}")
    if problems:
        raise ValueError(f"{what} does not fit the model: {'; '.join(problems)}")
    # Copies: on CPU JAX may otherwise share memory that PyTorch goes on writing to.
    return unflatten_dict(
        {
            path: jnp.array(_from_layout(arrays[name]), jnp.float32)
            for name, path in expected.items()
        }
    )


def to_torch(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict of tensors for the PyTorch twin of `model`; needs PyTorch.

    Flax counts no batches, so every num_batches_tracked is 0; PyTorch reads it only
    where a BatchNorm has momentum=None.

    Args:
      model: a `ResNet`, `ResNet9`, `VGG` or a block.
      variables: its {"params": ..., "batch_stats": ...}; other collections are left out.

    Raises:
      ValueError: if they are stacked: see `unstack_blocks`.
    """
    import torch

    del model  # the names tell all; the argument mirrors `from_torch`
    return {name: torch.from_numpy(array) for name, array in to_arrays(variables).items()}


def to_arrays(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The same as `to_torch`, in NumPy arrays and without PyTorch."""
    flat = flatten_dict({k: variables[k] for k in ("params", "batch_stats") if k in variables})
    if any(module.endswith("_rest") for path in flat for module in path):
        raise ValueError("the blocks are stacked, as PyTorch has none: unstack_blocks(variables)")
    state_dict = {}
    for path, array in flat.items():
        name = torch_name(path)
        state_dict[name] = np.array(_to_layout(np.asarray(array)), order="C")
        if name.endswith("running_var"):
            state_dict[name.replace("running_var", "num_batches_tracked")] = np.array(0)
    return state_dict


def torch_name(path: tuple[str, ...]) -> str:
    """PyTorch's name of a variable, given by its path, such as ("params", "fc", "kernel")."""
    _, *modules, leaf = path
    name = ".".join([*modules, _LEAVES.get(leaf, leaf)])
    name = name.replace("downsample_conv.", "downsample.0.")
    name = name.replace("downsample_bn.", "downsample.1.")
    return re.sub(r"_(\d+)\.", r".\1.", name)


def _to_layout(array: np.ndarray) -> np.ndarray:
    """[H, W, I, O] to [O, I, H, W], and [I, O] to [O, I]."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_layout(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_numpy(value: Any) -> np.ndarray:
    # .float(): NumPy has no bfloat16.
    return value.detach().cpu().float().numpy() if hasattr(value, "detach") else np.asarray(value)
