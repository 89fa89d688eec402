"""Max-pooling whose gradient is fast everywhere.

XLA's own takes over ten times as long on a CPU, and is a scatter on a GPU. Here it is a sum of
shifted arrays, from the places where the maxima were found. On one CPU device convolution.cc
finds them: XLA:CPU would find each again for every pixel of its window.
"""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.interpreters.xla import apply_primitive
from jaxtyping import Array, Float

from flax_resnet.models import native


def max_pool2d(
    x: Float[Array, "n h w c"], size: int, stride: int | None = None, padding: int = 0
) -> Float[Array, "n oh ow c"]:
    """Maxima over size x size pixels, as torch.nn.MaxPool2d(size, stride, padding).

    Args:
      x: [N, H, W, C].
      size: height and width of the window, up to 16.
      stride: pixels from one window to the next; None for `size`.
      padding: rows and columns on every side that never are the maximum, up to half of `size`.

    Returns:
      [N, (H + 2 * padding - size) // stride + 1, (W + 2 * padding - size) // stride + 1, C];
      NaN where the window has one. Of equal pixels the first takes the gradient.

    Raises:
      ValueError: for another size, stride or padding, or images smaller than the window.
    """
    stride = stride or size
    # convolution.cc reads memory as these say.
    if not (1 <= size <= 16 and stride >= 1 and 0 <= padding <= size / 2):
        raise ValueError(
            f"size={size} is from 1 to 16, stride={stride} at least 1, and padding={padding} at "
            "least 0 and at most half of size"
        )
    if x.ndim != 4 or min(x.shape[1:3]) + 2 * padding < size:
        raise ValueError(
            f"images [N, H, W, C] of shape {x.shape} have no {size}x{size} pixels with "
            f"padding={padding}"
        )
    return _primitive.bind(x, size=size, stride=stride, padding=padding)[0]


def _windows(x: jax.Array, size: int, stride: int, padding: int, beyond: float) -> list[jax.Array]:
    """The pixels [N, OH, OW, C] at each place of the windows, row by row."""
    n, height, width, c = x.shape
    _, oh, ow, _ = _output_shape(x.shape, size, stride, padding)
    steps = -(-size // stride)  # that a window reaches over
    h, w = oh - 1 + steps, ow - 1 + steps
    margins = [(padding, stride * to - side - padding, 0) for to, side in ((h, height), (w, width))]
    x = lax.pad(x, jnp.asarray(beyond, x.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
    # One axis at a time, for a mesh with explicit axes.
    x = x.reshape(n, h, stride, w * stride, c).reshape(n, h, stride, w, stride, c)
    # Split, whose transpose is one concatenation, in place of a slice for each.
    rows = [lax.split(row, (1,) * stride, 4) for row in lax.split(x, (1,) * stride, 2)]
    return [
        rows[i % stride][j % stride][
            :, i // stride : i // stride + oh, 0, j // stride : j // stride + ow, 0
        ]
        for i in range(size)
        for j in range(size)
    ]


def _output_shape(x: tuple[int, ...], size: int, stride: int, padding: int) -> tuple[int, ...]:
    return (x[0], *((side + 2 * padding - size) // stride + 1 for side in x[1:3]), x[3])


# Gives the maxima and the uint8 places of the first of them in their windows, row by row.
_primitive = Primitive("max_pool")
_primitive.multiple_results = True
_primitive.def_impl(partial(apply_primitive, _primitive))


@_primitive.def_abstract_eval
def _shapes(x, **window):
    maxima = x.update(shape=_output_shape(x.shape, **window), weak_type=False)
    return maxima, maxima.update(dtype=jnp.dtype(jnp.uint8))


def _jvp(primals, tangents, **window):
    maxima, places = _primitive.bind(*primals, **window)
    windows = enumerate(_windows(tangents[0], **window, beyond=0.0))
    tangent = sum(jnp.where(places == i, pixels, 0) for i, pixels in windows)
    return [maxima, places], [tangent, ad.Zero(jax.typeof(places).to_tangent_aval())]


ad.primitive_jvps[_primitive] = _jvp


def _xla_maxima(x: jax.Array, **window: int) -> list[jax.Array]:
    with jax.sharding.use_abstract_mesh(jax.typeof(x).sharding.mesh):
        windows = _windows(x, **window, beyond=-jnp.inf)
        maxima = reduce(jnp.maximum, windows)
        places = jnp.zeros_like(maxima, jnp.uint8)
        for i, pixels in reversed(list(enumerate(windows))):
            places = jnp.where(pixels == maxima, jnp.uint8(i), places)
        return [maxima, places]


def _our_maxima(x: jax.Array, **window: int) -> list[jax.Array]:
    shape = _output_shape(x.shape, **window)
    results = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (x.dtype, jnp.uint8)]
    call = jax.ffi.ffi_call("flax_resnet_max_pool", results)
    return list(call(x, **{name: np.int64(value) for name, value in window.items()}))


_lower_xla: Any = mlir.lower_fun(_xla_maxima, multiple_results=True)
_lower_ours: Any = mlir.lower_fun(_our_maxima, multiple_results=True)


def _lower_for_cpu(ctx, x, **window):
    applies = native.applies(ctx, ctx.avals_in[0].shape[-1])
    return (_lower_ours if applies else _lower_xla)(ctx, x, **window)


mlir.register_lowering(_primitive, _lower_xla)
mlir.register_lowering(_primitive, _lower_for_cpu, platform="cpu")


def _batched(operands, axes, **window):
    x = jnp.moveaxis(operands[0], axes[0], 0)
    results = _primitive.bind(x.reshape(-1, *x.shape[2:]), **window)
    return [a.reshape(*x.shape[:2], *a.shape[1:]) for a in results], [0, 0]


batching.primitive_batchers[_primitive] = _batched
