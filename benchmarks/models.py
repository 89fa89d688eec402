"""The table of docs/models.md: every model with its parameters and its multiply-adds.

    python benchmarks/models.py

Both are counted, not measured: parameters from the shapes of the variables, multiply-adds
from the convolutions and matrix products in the traced forward pass of one image, each as
often as it runs. BatchNorm, ReLU, pooling and biases are not counted, as in most papers.
"""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp

import flax_resnet as fr

HE = "He et al. 2015, [1512.03385](https://arxiv.org/abs/1512.03385)"
WIDE = "Zagoruyko and Komodakis, [1605.07146](https://arxiv.org/abs/1605.07146)"
# By the first pattern that fits a whole name: (source, whose weights fit).
ORIGINS = {
    r"resnet\d+": (HE, "torchvision, timm"),
    r"wide_resnet.*": (WIDE, "torchvision, timm"),
    r"resnext.*": (
        "Xie et al., [1611.05431](https://arxiv.org/abs/1611.05431)",
        "torchvision, timm",
    ),
    r"resnet\d+d": ("He et al. 2018, [1812.01187](https://arxiv.org/abs/1812.01187)", "timm"),
    r"seresnet.*": ("Hu et al., [1709.01507](https://arxiv.org/abs/1709.01507)", "timm"),
    r"vgg.*": (
        "Simonyan and Zisserman, [1409.1556](https://arxiv.org/abs/1409.1556)",
        "torchvision",
    ),
    r"cifar_preact.*": ("He et al. 2016, [1603.05027](https://arxiv.org/abs/1603.05027)", "none"),
    r"cifar_wrn.*": (WIDE, "none"),
    r"lab10.*": ("the lesson Lab10-6", "none"),
    r".*": (HE, "none"),
}


def multiply_adds(jaxpr) -> int:
    """Multiply-adds of the convolutions and matrix products of a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [
            getattr(value, "jaxpr", value)
            for parameter in equation.params.values()
            for value in (parameter if isinstance(parameter, tuple | list) else [parameter])
            if hasattr(getattr(value, "jaxpr", value), "eqns")
        ]
        name, operands = equation.primitive.name, [v.aval for v in equation.invars]
        if inner:
            counts = [multiply_adds(each) for each in inner]
            # Of the ways to convolve in groups, that without products by zero.
            total += min(counts) if name == "cond" else sum(counts)
        elif name in ("forward", "conv_general_dilated"):  # ours and XLA's
            total += equation.outvars[0].aval.size * math.prod(operands[1].shape[:3])
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(operands[0].shape[axis] for axis in contracted)
            total += equation.outvars[0].aval.size * depth
    return total


def row(name: str) -> str:
    """A line of the table."""
    model = fr.create_model(name)
    size = 32 if name.startswith(("cifar", "lab10")) else 224
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    jaxpr = jax.make_jaxpr(partial(model.apply, train=False))(variables, x)
    giga = multiply_adds(jaxpr.jaxpr) / 1e9
    source, weights = next(v for pattern, v in ORIGINS.items() if re.fullmatch(pattern, name))
    return f"| {name} | {parameters:,} | {giga:#.3g} | {size} | {source} | {weights} |"


if __name__ == "__main__":
    print("| model | parameters | GMACs | pixels | source | published weights that fit |")
    print("|---|---:|---:|---:|---|---|")
    for name in fr.list_models():
        print(row(name), flush=True)
