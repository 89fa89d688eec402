"""Convolution: XLA's on GPU and TPU, our own on a CPU, where XLA's is slow.

With the gradient g of its output for a third, sum(g * convolution(x, kernel)) is linear
in each of x, kernel and g. Its derivatives by them are the three operations of a training
step, and the derivatives of those are again among the three. So three JAX primitives,
each with the XLA program that means the same, have derivatives of every order, forward
and reverse. On one CPU device they run in convolution.cc where that applies (float32,
channels of the result a multiple of a vector register's, not in an exported program), in
XLA elsewhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.interpreters.xla import apply_primitive
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from flax_resnet.models import native

Shape = tuple[int, ...]

# Under `jax.vmap` on a CPU; more are one program of XLA's, which does not grow with their number.
_MOST_ONE_BY_ONE = 16

_config: Any = jax.config  # a type checker knows none of its names


class Geometry(NamedTuple):
    """What the operands' shapes do not tell of a convolution.

    Attributes:
      stride: pixels from one output to the next, in both directions.
      padding: rows and columns of zeros on every side of an image.
      size: height and width of the images.
      window: height and width of the kernel.
      groups: equal parts of the channels, which do not see each other.
      precision: `jax.default_matmul_precision`, as it was where the convolution stands.
    """

    stride: int
    padding: int
    size: tuple[int, int]
    window: tuple[int, int]
    groups: int
    precision: str | None


def convolution(
    x: Float[Array, "n h w ci"],
    kernel: Float[Array, "kh kw {x.shape[-1]//groups} co"],
    *,
    stride: int,
    padding: int,
    groups: int = 1,
) -> Float[Array, "n oh ow co"]:
    """Convolves images with a kernel, as torch.nn.functional.conv2d does.

    Args:
      x: [N, H, W, CI].
      kernel: [KH, KW, CI / groups, CO], of the same type.
      stride: pixels from one output to the next, in both directions.
      padding: rows and columns of zeros on every side of an image.
      groups: divides CI and CO; of the channels that come out, the i-th of so many equal parts
        is made of the i-th part of x's.

    Returns:
      [N, (H + 2 * padding - KH) // stride + 1, (W + 2 * padding - KW) // stride + 1, CO].

    Raises:
      ValueError: for shapes that do not go together.
    """
    _check(x, kernel, groups, stride, padding)
    x, kernel = _vary_alike(x, kernel)
    size, window = (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1])
    precision = _config.jax_default_matmul_precision
    geometry = Geometry(stride, padding, size, window, groups, precision)
    return forward.bind(x, kernel, geometry=geometry)


def _check(x: jax.Array, kernel: jax.Array, groups: int, stride: int, padding: int) -> None:
    # convolution.cc reads memory as these say.
    is_4d = x.ndim == kernel.ndim == 4
    divided = groups >= 1 and is_4d and kernel.shape[3] % groups == 0
    if not divided or x.shape[3] != groups * kernel.shape[2]:
        raise ValueError(
            f"images [N, H, W, C] of shape {x.shape} cannot be convolved with a kernel of "
            f"{kernel.shape}{f' in {groups} groups' if groups != 1 else ''}"
        )
    if stride < 1 or padding < 0:
        raise ValueError(f"stride={stride} and padding={padding} are at least 1 and 0")
    for size, window in zip(x.shape[1:3], kernel.shape[:2], strict=True):
        if isinstance(size, int) and size + 2 * padding < window:
            raise ValueError(
                f"a kernel of {kernel.shape[0]}x{kernel.shape[1]} does not fit images of "
                f"{x.shape[1]}x{x.shape[2]} with padding={padding}"
            )


def _vary_alike(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two, for `jax.shard_map`: one may be the same on all devices and the other not.

    The cast sums the gradients of what is the same on all of them.
    """
    of_x, of_kernel = (jax.typeof(array).mat.varying for array in (x, kernel))
    if more := of_kernel - of_x:
        x = lax.pcast(x, tuple(more), to="varying")
    if more := of_x - of_kernel:
        kernel = lax.pcast(kernel, tuple(more), to="varying")
    return x, kernel


# What each operation means, for XLA. Gradients are [N, OH, OW, CO].


def _xla_forward(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (geometry.stride, geometry.stride),
        [(geometry.padding, geometry.padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=geometry.groups,
        precision=geometry.precision,
    )


def _xla_input_gradient(gradient: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    # Of x the type alone counts: it is divided among devices as its gradient is.
    shape = _input_shape(gradient.shape, kernel.shape, geometry)
    x = jnp.broadcast_to(gradient.sum((1, 2, 3), keepdims=True), shape)
    x, kernel = _vary_alike(x, kernel)
    transpose = jax.linear_transpose(lambda x: _xla_forward(x, kernel, geometry), x)
    return transpose(gradient)[0]


def _xla_kernel_gradient(x: jax.Array, gradient: jax.Array, geometry: Geometry) -> jax.Array:
    shape = _kernel_shape(x.shape, gradient.shape, geometry)
    x, kernel = _vary_alike(x, jnp.zeros(shape, x.dtype))
    transpose = jax.linear_transpose(lambda kernel: _xla_forward(x, kernel, geometry), kernel)
    return transpose(gradient)[0]


def _dense_kernel_gradient(x: jax.Array, gradient: jax.Array, geometry: Geometry) -> jax.Array:
    # With groups XLA:CPU needs seconds for one layer of a ResNeXt; that between all channels, of
    # which those within a group are taken, is more arithmetic and a hundredth of the time.
    groups = geometry.groups
    dense = _xla_kernel_gradient(x, gradient, geometry._replace(groups=1))
    height, width, depth, planes = dense.shape
    parts = dense.reshape(height, width, groups, depth // groups, planes)
    parts = parts.reshape(*parts.shape[:4], groups, planes // groups)
    same = jnp.eye(groups, dtype=bool).reshape(1, 1, groups, 1, groups, 1)
    return jnp.where(same, parts, 0).sum(2).reshape(height, width, depth // groups, planes)


def _output_shape(x: Shape, kernel: Shape, geometry: Geometry) -> Shape:
    reach = [
        (size + 2 * geometry.padding - window) // geometry.stride + 1
        for size, window in zip(geometry.size, geometry.window, strict=True)
    ]
    return (x[0], *reach, kernel[3])


def _input_shape(gradient: Shape, kernel: Shape, geometry: Geometry) -> Shape:
    return (gradient[0], *geometry.size, kernel[2] * geometry.groups)


def _kernel_shape(x: Shape, gradient: Shape, geometry: Geometry) -> Shape:
    return (*geometry.window, x[3] // geometry.groups, gradient[3])


def _define(
    name: str,
    xla: Callable[[jax.Array, jax.Array, Geometry], jax.Array],
    result_shape: Callable[[Shape, Shape, Geometry], Shape],
    *,
    by_example: bool,
    xla_cpu: Callable[[jax.Array, jax.Array, Geometry], jax.Array] | None = None,
) -> Primitive:
    """The primitive (a, b, geometry) -> result, all but its derivatives.

    Args:
      name: of the function of convolution.cc.
      xla: the same operation in XLA.
      result_shape: shape of the result, from those of a and b.
      by_example: whether the result is divided among devices as a is, along the first axis.
      xla_cpu: the same as xla, faster on a CPU.
    """
    primitive = Primitive(name)
    primitive.def_impl(partial(apply_primitive, primitive))

    @primitive.def_abstract_eval
    def result(a, b, *, geometry):
        sharding = a.sharding if by_example else NamedSharding(a.sharding.mesh, P(*4 * [None]))
        shape = result_shape(a.shape, b.shape, geometry)
        return a.update(shape=shape, sharding=sharding, weak_type=False)

    def with_xla(xla, a, b, *, geometry):
        # Lowering has forgotten the mesh, to which what is made on the way belongs too.
        with jax.sharding.use_abstract_mesh(jax.typeof(a).sharding.mesh):
            return xla(a, b, geometry)

    def with_ours(a, b, *, geometry):
        result = jax.ShapeDtypeStruct(result_shape(a.shape, b.shape, geometry), a.dtype)
        return jax.ffi.ffi_call(f"flax_resnet_{name}", result)(
            a, b, stride=np.int64(geometry.stride), padding=np.int64(geometry.padding)
        )

    def lower(program) -> Callable[..., Any]:
        return mlir.lower_fun(program, multiple_results=False)

    lower_ours = lower(with_ours)
    lower_xla_cpu = lower(partial(with_xla, xla_cpu or xla))

    def lower_for_cpu(ctx, a, b, *, geometry):
        applies = native.applies(ctx, ctx.avals_out[0].shape[-1])
        return (lower_ours if applies else lower_xla_cpu)(ctx, a, b, geometry=geometry)

    mlir.register_lowering(primitive, lower(partial(with_xla, xla)))
    mlir.register_lowering(primitive, lower_for_cpu, platform="cpu")

    def batched(operands, axes, *, geometry):
        if by_example and axes[1] is None:  # more examples
            a = jnp.moveaxis(operands[0], axes[0], 0)
            out = primitive.bind(a.reshape(-1, *a.shape[2:]), operands[1], geometry=geometry)
            return out.reshape(*a.shape[:2], *out.shape[1:]), 0

        def one(n, operands):
            parts = (
                operand if axis is None else lax.index_in_dim(operand, n, axis, keepdims=False)
                for operand, axis in zip(operands, axes, strict=True)
            )
            return primitive.bind(*parts, geometry=geometry)

        # XLA makes one grouped convolution of kernels that differ, whose gradient is slow on a
        # CPU. Not in a loop, where its convolutions are slow too.
        def one_by_one(*operands):
            return jnp.stack([one(n, operands) for n in range(count)])

        at_once = jax.vmap(lambda a, b: xla(a, b, geometry), axes)
        count = next(o.shape[i] for o, i in zip(operands, axes, strict=True) if i is not None)
        if count > _MOST_ONE_BY_ONE:
            return at_once(*operands), 0
        return lax.platform_dependent(*operands, cpu=one_by_one, default=at_once), 0

    batching.primitive_batchers[primitive] = batched
    return primitive


forward = _define("forward", _xla_forward, _output_shape, by_example=True)
input_gradient = _define("input_gradient", _xla_input_gradient, _input_shape, by_example=True)
kernel_gradient = _define(
    "kernel_gradient",
    _xla_kernel_gradient,
    _kernel_shape,
    by_example=False,
    xla_cpu=_dense_kernel_gradient,
)

ad.defbilinear(
    forward,
    lambda g, x, kernel, *, geometry: input_gradient.bind(g, kernel, geometry=geometry),
    lambda g, x, kernel, *, geometry: kernel_gradient.bind(x, g, geometry=geometry),
)
ad.defbilinear(
    input_gradient,
    lambda x, g, kernel, *, geometry: forward.bind(x, kernel, geometry=geometry),
    lambda x, g, kernel, *, geometry: kernel_gradient.bind(x, g, geometry=geometry),
)
ad.defbilinear(
    kernel_gradient,
    lambda kernel, x, g, *, geometry: input_gradient.bind(g, kernel, geometry=geometry),
    lambda kernel, x, g, *, geometry: forward.bind(x, kernel, geometry=geometry),
)
