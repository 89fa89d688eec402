"""Which variables of a model stay as they are, by their names in PyTorch."""

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from flax_resnet.models.dialects import torch_name


def names_of(path: tuple[str, ...]) -> list[str]:
    """PyTorch's names of a variable and of the modules that it is in, the outermost first.

    For ("params", "layer1_0", "conv1", "kernel") these are layer1, layer1.0, layer1.0.conv1
    and layer1.0.conv1.weight.
    """
    words = torch_name(path).split(".")
    return [".".join(words[:end]) for end in range(1, len(words) + 1)]


def is_frozen(path: tuple[str, ...], patterns: Sequence[str]) -> bool:
    """Whether a pattern matches any of `names_of(path)`; `*`, `?` and `[]` as in file names."""
    return any(
        fnmatch.fnmatchcase(name, pattern) for name in names_of(path) for pattern in patterns
    )


def unmatched(
    patterns: Sequence[str], paths: Iterable[tuple[str, ...]]
) -> Iterator[tuple[str, str]]:
    """Every pattern that matches none of these variables, and which names to try instead."""
    names = list(dict.fromkeys(name for path in paths for name in names_of(path)))
    outermost = [name for name in names if "." not in name]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=2)
            yield (
                pattern,
                f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(outermost)}",
            )


def has_frozen_statistics(
    path: tuple[str, ...], *, model_path: tuple[str, ...], patterns: Sequence[str]
) -> bool:
    """Whether the running statistics of a BatchNorm are frozen.

    Args:
      path: of the BatchNorm.
      model_path: of the model that has it, from which the patterns count: it may itself be
        a part of something.
      patterns: see `is_frozen`.
    """
    names = path[len(model_path) :]
    return any(is_frozen(("batch_stats", *names, leaf), patterns) for leaf in ("mean", "var"))
