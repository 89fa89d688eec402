"""Sizes of a model's layers, and what they cost.

`nn.tabulate` shows more, but its FLOPs come from the compiler, who sees nothing of the
convolutions in convolution.cc.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from flax_resnet.models.checks import check_model
from flax_resnet.models.shapes import variable_shapes


class Layer(NamedTuple):
    """A module with parameters of its own, as one image goes through it.

    Attributes:
      name: where its parameters are: "layer1_0/conv1".
      output_shape: (height, width, channels) or (channels,).
      parameters: how many there are.
      multiply_adds: of its convolution or matrix product; 0 for other layers.
    """

    name: str
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Summary:
    """The layers of a model in the order in which an image meets them; a table when shown."""

    layers: tuple[Layer, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one image: half its FLOPs, and what papers call FLOPs."""
        return sum(layer.multiply_adds for layer in self.layers)

    def __str__(self) -> str:
        rows = [
            ("layer", "output", "parameters", "multiply-adds"),
            *(
                (name, " x ".join(map(str, shape)), f"{parameters:,}", f"{multiply_adds:,}")
                for name, shape, parameters, multiply_adds in self.layers
            ),
            ("total", "", f"{self.parameters:,}", f"{self.multiply_adds:,}"),
        ]
        layer, output, parameters, multiply_adds = (
            max(map(len, column)) for column in zip(*rows, strict=True)
        )
        return "\n".join(
            f"{a:{layer}}  {b:{output}}  {c:>{parameters}}  {d:>{multiply_adds}}"
            for a, b, c, d in rows
        )

    __repr__ = __str__


def summary(model: nn.Module, image_size: int | tuple[int, int], channels: int = 3) -> Summary:
    """Layers of a model with their output shapes, parameters and multiply-adds.

    A layer with a kernel takes kernel.size multiply-adds for each position of its output,
    whether it is a convolution, a grouped one or a matrix product; a transposed convolution for
    each of its input. A layer that is called twice has its parameters once. Nothing is
    computed: the model is only traced.

    Args:
      model: takes images [N, H, W, C] and `train`.
      image_size: height and width of an image, or one number for both.
      channels: of an image.

    Raises:
      TypeError: if `model` is not a Flax module.
      ValueError: if the size is neither, or too small for the model.
    """
    check_model(model, "fr.summary(model, 224)")
    height, width = _both_sides(image_size)
    layers: list[Layer] = []
    counted: set[tuple[str, ...]] = set()

    def record(next_call, args, kwargs, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        place = len(layers)  # a module's own parameters come before those of its parts
        output = next_call(*args, **kwargs)
        variables = context.module.variables.get("params", {})
        own = {name: v for name, v in variables.items() if hasattr(v, "shape")}
        if own:
            kernel, path = own.get("kernel"), context.module.path
            shape = getattr(output, "shape", ())  # one's own module may give several arrays
            is_new = path not in counted
            counted.add(path)
            layer = Layer(
                name="/".join(path),
                output_shape=shape[1:],
                parameters=sum(v.size for v in own.values()) if is_new else 0,
                multiply_adds=0
                if kernel is None
                else kernel.size * _positions(context.module, shape, args),
            )
            layers.insert(place, layer)
        return output

    with nn.intercept_methods(record):
        # init, and not apply, since `scan_blocks` runs one block for all there.
        variable_shapes(model, (height, width, channels))
    return Summary(tuple(layers))


def _positions(layer: nn.Module, output_shape: tuple[int, ...], args: Sequence[Any]) -> int:
    """How often a layer uses its kernel."""
    if isinstance(layer, nn.ConvTranspose):
        return math.prod(args[0].shape[:-1])
    features = layer.features if isinstance(layer, nn.DenseGeneral) else 1
    axes = len(features) if isinstance(features, Sequence) else 1
    return math.prod(output_shape[:-axes])


def _both_sides(size: Any) -> tuple[int, int]:
    try:
        height, width = (size, size) if np.ndim(size) == 0 else size
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise ValueError(
            f"image_size is a number of pixels or (height, width), not {size!r}: write "
            "fr.summary(model, (224, 224), channels=3)"
        ) from None
