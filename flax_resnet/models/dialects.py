"""PyTorch's names of our variables, and those that popular code gives the same modules.

Ours are those of torchvision and of timm's resnet.py. A dialect is told by its names alone, and
is here only where its nets compute what ours do: a net with other padding, or with biases that
ours lack, would load and give other numbers.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# What wrappers put before every name: DataParallel, torch.compile, Lightning and people.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.")
# What torch.optim.swa_utils.AveragedModel counts, outside of the prefix.
_COUNTERS = ("n_averaged",)


class Dialect(NamedTuple):
    """How some code names its modules.

    Attributes:
      marker: a whole part of a name that no other dialect has; "" where the rules harm no other.
      ours: our name by theirs. Both are whole parts of dotted names; "^" is the beginning.
    """

    marker: str
    ours: dict[str, str]


_DIALECTS = (
    # OpenMMLab (mmpretrain): the backbone is torchvision's, the rest stands beside it.
    Dialect("^backbone.layer1", {"^backbone": ""}),
    # transformers: ResNetForImageClassification, ResNetModel.
    Dialect(
        "embedder.embedder",
        {
            "^resnet": "",
            "embedder.embedder.convolution": "conv1",
            "embedder.embedder.normalization": "bn1",
            "encoder.stages.0.layers": "layer1",
            "encoder.stages.1.layers": "layer2",
            "encoder.stages.2.layers": "layer3",
            "encoder.stages.3.layers": "layer4",
            "layer.0.convolution": "conv1",
            "layer.0.normalization": "bn1",
            "layer.1.convolution": "conv2",
            "layer.1.normalization": "bn2",
            "layer.2.convolution": "conv3",
            "layer.2.normalization": "bn3",
            "shortcut.convolution": "downsample.0",
            "shortcut.normalization": "downsample.1",
        },
    ),
    # weiaicunzai/pytorch-cifar100: resnet18 and its like are our cifar_resnet18 and its like.
    Dialect(
        "residual_function",
        {
            "^conv1.0": "conv1",
            "^conv1.1": "bn1",
            "conv2_x": "layer1",
            "conv3_x": "layer2",
            "conv4_x": "layer3",
            "conv5_x": "layer4",
            "residual_function.0": "conv1",
            "residual_function.1": "bn1",
            "residual_function.3": "conv2",
            "residual_function.4": "bn2",
            "residual_function.6": "conv3",
            "residual_function.7": "bn3",
        },
    ),
    # xternalz/WideResNet-pytorch, and the robustness literature after it: our cifar_wrn*.
    Dialect(
        "^block1.layer.0",
        {
            "^bn1": "bn",
            "block1.layer": "layer1",
            "block2.layer": "layer2",
            "block3.layer": "layer3",
            "convShortcut": "downsample.0",
        },
    ),
    # timm's resnetv2.py: with three convolutions in the stem the shortcut averages, ...
    Dialect(
        "stem.conv3",
        {
            "stem.conv1": "conv1.0",
            "stem.norm1": "conv1.1",
            "stem.conv2": "conv1.3",
            "stem.norm2": "conv1.4",
            "stem.conv3": "conv1.6",
            "downsample.conv": "downsample.1",
        },
    ),
    # ... with one it does not.
    Dialect("stem.conv", {"stem.conv": "conv1", "downsample.conv": "downsample.0"}),
    Dialect(
        "stages.0.blocks",
        {
            "^norm": "bn",
            "stages.0.blocks": "layer1",
            "stages.1.blocks": "layer2",
            "stages.2.blocks": "layer3",
            "stages.3.blocks": "layer4",
            "norm1": "bn1",
            "norm2": "bn2",
            "norm3": "bn3",
        },
    ),
    # kuangliu/pytorch-cifar, akamaster/pytorch_resnet_cifar10: shortcut, linear; the heads of
    # Cadene's pretrained-models, of transformers, and of timm's newer nets.
    Dialect(
        "",
        {
            "shortcut.0": "downsample.0",
            "shortcut.1": "downsample.1",
            "^linear": "fc",
            "^last_linear": "fc",
            "^classifier.1": "fc",
            "^head.fc": "fc",
        },
    ),
)


def torch_name(path: tuple[str, ...]) -> str:
    """PyTorch's name of a variable, given by its path, such as ("params", "fc", "kernel")."""
    _, *modules, leaf = path
    name = ".".join([*modules, _LEAVES.get(leaf, leaf)])
    name = name.replace("downsample_conv.", "downsample.0.")
    name = name.replace("downsample_bn.", "downsample.1.")
    return re.sub(r"_(\d+)\.", r".\1.", name)


def in_our_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state_dict under our names, as far as its own are known.

    Prefixes that all entries share are taken off, and counters are left out.
    """
    named = without_counters(state_dict)
    while prefix := next((p for p in _PREFIXES if _all_start_with(named, p)), ""):
        named = {name.removeprefix(prefix): value for name, value in named.items()}
    for marker, ours in _DIALECTS:
        is_there = re.compile(_part(marker)).search
        if not marker or any(map(is_there, named)):
            rules = [(re.compile(_part(theirs)), our) for theirs, our in ours.items()]
            named = _renamed(named, partial(_translate, rules=rules))
    return named


def without_counters(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state_dict but those that count batches or averages."""
    return {
        name: value
        for name, value in state_dict.items()
        if name not in _COUNTERS and not name.endswith("num_batches_tracked")
    }


def _renamed(named: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """The entries under new names; those that would share one keep theirs, and none is lost."""
    new = {name: rename(name) for name in named}
    count = Counter(new.values())
    return {new[name] if count[new[name]] == 1 else name: named[name] for name in named}


def _all_start_with(named: Mapping[str, Any], prefix: str) -> bool:
    return bool(named) and all(name.startswith(prefix) for name in named)


def _part(name: str) -> str:
    """A pattern for whole parts of a dotted name, which "^" ties to its beginning."""
    start = "^" if name.startswith("^") else r"(?:^|(?<=\.))"
    return start + re.escape(name.removeprefix("^")) + r"(?:\.|$)"


def _translate(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, our in rules:
        name = pattern.sub(f"{our}." if our else "", name)
    return name
