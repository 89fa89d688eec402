"""The variables of a stage's equal blocks on top of each other, for `scan_blocks`."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp


def stack_blocks(tree: Any) -> Any:
    """Puts the arrays of a stage's blocks but the first on top of each other, for `scan_blocks`.

    layer1_1, layer1_2, ... become layer1_rest, whose arrays have one more axis, the first:
    a model with `scan_blocks=True` takes such variables as well, and then neither compiles
    nor runs an operation for every block.

    Args:
      tree: variables of a `ResNet`, or any tree with such dictionaries in it, as the state
        of an optimizer.
    """

    def stack(node):
        if not _has_blocks(node):
            return node
        stages: dict[str, list[Any]] = {}
        out = {}
        for name, value in node.items():
            stage, _, block = name.partition("_")
            if stage.startswith("layer") and block not in ("0", "rest"):
                stages.setdefault(f"{stage}_rest", []).append((int(block), value))
            else:
                out[name] = value
        for rest, blocks in stages.items():
            out[rest] = stack_trees([value for _, value in sorted(blocks, key=itemgetter(0))])
        return out

    return jax.tree.map(stack, tree, is_leaf=_has_blocks)


def is_stacked(path: Sequence[str]) -> bool:
    """Whether the array of this path is one of many blocks."""
    return any(name.startswith("layer") and name.endswith("_rest") for name in path)


def unstack_blocks(tree: Any) -> Any:
    """Undoes `stack_blocks`.

    Raises:
      ValueError: if nothing in the tree tells how many blocks a stage has.
    """
    nodes = filter(_has_blocks, jax.tree.leaves(tree, is_leaf=_has_blocks))
    stages = [stage for node in nodes for stage in node.items() if is_stacked(stage[:1])]
    # For the parts without arrays, as an optimizer's state may have them.
    lengths = {name: len(arrays[0]) for name, value in stages if (arrays := jax.tree.leaves(value))}

    def unstack(node):
        if not _has_blocks(node):
            return node
        out = {}
        for name, value in node.items():
            if not is_stacked([name]):
                out[name] = value
                continue
            stage = name.removesuffix("_rest")
            arrays = jax.tree.leaves(value)
            if not arrays and name not in lengths:
                raise ValueError(f"nothing tells how many blocks {name} stands for")
            for i in range(len(arrays[0]) if arrays else lengths[name]):
                out[f"{stage}_{i + 1}"] = jax.tree.map(itemgetter(i), value)
        return out

    return jax.tree.map(unstack, tree, is_leaf=_has_blocks)


def _has_blocks(node: Any) -> bool:
    return isinstance(node, dict) and "layer1_0" in node


def stack_trees(trees: Sequence[Any]) -> Any:
    """One tree of the same structure, whose arrays have one more axis, the first."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)
