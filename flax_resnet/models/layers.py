"""The layers that residual blocks and their kin are made of, with PyTorch's defaults.

One number differs from PyTorch. Both normalise a training batch by its biased
variance, but PyTorch moves its running variance towards the unbiased one, which
is n / (n - 1) times larger for n = N * H * W values a channel; Flax moves it
towards the biased one.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_resnet.models.convolution import convolution
from flax_resnet.models.pooling import max_pool2d

Dtype = Any
Initializer = Callable[..., jax.Array]
Norm = Callable[..., nn.Module]

# torch.nn.init.kaiming_normal_(mode="fan_out", nonlinearity="relu")
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def uniform(limit: float) -> Initializer:
    """Initialiser on [-limit, limit): torch.nn.Linear's, with limit = fan_in ** -0.5."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class Conv(nn.Module):
    """Convolution of odd size, padded by dilation times half of it on every side.

    Attributes:
      planes: channels of the output.
      kernel_size: height and width of the kernel.
      stride: in both directions.
      dilation: pixels from one entry of the kernel to the next.
      groups: equal parts of the input's channels; the i-th part of the output's is made of
        the i-th alone, as in torch.nn.Conv2d.
      standardize: convolve with the kernel less its mean, over its deviation, of each output
        channel (weight standardization: Qiao et al., arXiv:1903.10520), as timm's BiT nets.
      bias_init: initial value of the bias; None for no bias.
      dtype: of the computation.
    """

    planes: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    standardize: bool = False
    bias_init: Initializer | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n oh ow {self.planes}"]:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.planes)
        kernel = self.param("kernel", kaiming_normal, shape, jnp.float32)
        if self.standardize:
            mean, var = (f(kernel, axis=(0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
            kernel = (kernel - mean) * jax.lax.rsqrt(var + 1e-8)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        padding = self.dilation * (self.kernel_size // 2)
        if self.dilation != 1:
            x = jax.lax.conv_general_dilated(
                x,
                kernel,
                window_strides=(self.stride, self.stride),
                padding=[(padding, padding)] * 2,
                rhs_dilation=(self.dilation, self.dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        else:
            x = convolution(x, kernel, stride=self.stride, padding=padding, groups=self.groups)
        if self.bias_init is not None:
            bias = self.param("bias", self.bias_init, (self.planes,), jnp.float32)
            x += bias.astype(self.dtype)[None, None, None]
        return x


def conv3x3(planes: int, stride: int = 1, **kwargs) -> Conv:
    """3x3 convolution, padded by its dilation, 1 unless it is given."""
    return Conv(planes, 3, stride, **kwargs)


def conv1x1(planes: int, stride: int = 1, **kwargs) -> Conv:
    """1x1 convolution."""
    return Conv(planes, 1, stride, **kwargs)


class BatchNorm(nn.Module):
    """BatchNorm over N, H and W (Ioffe and Szegedy, arXiv:1502.03167).

    Statistics are float32, and the biased variance is the mean of the squares less the
    square of the mean, so that both come from one pass over x.

    Attributes:
      train: normalise by the batch's statistics and move the running ones towards them,
        not by the running ones.
      momentum: share of the running statistics that a step keeps: 1 minus PyTorch's momentum.
      epsilon: added to the variance.
      splits: equal parts of the batch, each normalised by its own statistics; the running
        ones move towards their mean. With one part a device these alone cross devices.
      frozen: whether the BatchNorm of that path keeps its running statistics, and
        normalises by them in training too: what `eval()` is to a module of PyTorch's.
      zero_init: start the scale at zero instead of one.
      dtype: type of the output.
    """

    train: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    splits: int = 1
    frozen: Callable[[tuple[str, ...]], bool] | None = None
    zero_init: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        channels = (x.shape[-1],)
        scale_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        scale = self.param("scale", scale_init, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)

        shape = x.shape
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        if self.train and not (self.frozen and self.frozen(self.path)):
            if self.splits != 1 and (self.splits < 1 or len(x) % self.splits):
                raise ValueError(f"bn_splits={self.splits} does not divide a batch of {len(x)}")
            x = x.reshape(self.splits, -1, *shape[1:])
            mean = x.mean((1, 2, 3))
            var = jnp.maximum(0, jnp.square(x).mean((1, 2, 3)) - jnp.square(mean))
            if not self.is_initializing():
                new = 1 - self.momentum
                for running, of_batch in ((running_mean, mean), (running_var, var)):
                    moved = self.momentum * running.value + new * of_batch.mean(0)
                    running.value = moved.astype(running.value.dtype)
        else:
            x, mean, var = x[None], running_mean.value[None], running_var.value[None]

        # One factor and one summand a channel: the gradient then needs no more of x than
        # x itself, where x - mean would be another array of its size to keep.
        factor = scale[None] * jax.lax.rsqrt(var + self.epsilon)
        summand = bias[None] - mean * factor
        x = x * factor[:, None, None, None] + summand[:, None, None, None]
        return x.reshape(shape).astype(self.dtype)


class GroupNorm(nn.Module):
    """GroupNorm (Wu and He, arXiv:1803.08494), as torch.nn.GroupNorm.

    Its statistics are those of one image, so it is the same in training and evaluation.
    32 groups, as in the paper, or the most below that divide the channels: up to 32 channels that
    is one each, which is instance normalisation.

    Attributes:
      train: of no effect; it stands where `BatchNorm` has it.
      groups: the most that there are.
      epsilon, zero_init, dtype: as in `BatchNorm`.
    """

    train: bool = False
    groups: int = 32
    epsilon: float = 1e-5
    zero_init: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        channels = x.shape[-1]
        scale_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        scale = self.param("scale", scale_init, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)

        shape = x.shape
        groups = max(n for n in range(1, self.groups + 1) if channels % n == 0)
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        x = x.reshape(*shape[:3], groups, channels // groups)
        mean = x.mean((1, 2, 4), keepdims=True)
        var = jnp.maximum(0, jnp.square(x).mean((1, 2, 4), keepdims=True) - jnp.square(mean))
        # As in BatchNorm, but one factor an image and a channel.
        factor = scale.reshape(1, 1, 1, groups, -1) * jax.lax.rsqrt(var + self.epsilon)
        summand = bias.reshape(1, 1, 1, groups, -1) - mean * factor
        return (x * factor + summand).reshape(shape).astype(self.dtype)


@jax.custom_jvp
def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """max(x, 0), for the output of a normalisation: its gradient computes x again, from what that
    keeps for its own.
    """
    # jnp.maximum loses NaN where XLA:CPU fuses it with a mean.
    return jnp.where(x < 0, 0, x)


@relu.defjvp
def _relu_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    # In bfloat16 XLA:GPU would write the gradient to memory in between.
    wide = tangent.astype(jnp.promote_types(tangent.dtype, jnp.float32))
    return relu(x), jnp.where(x > 0, wide, 0).astype(tangent.dtype)


@jax.custom_jvp
def relu_from_output(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`relu` for what nothing else keeps, such as a sum: its gradient is taken from the output,
    which the next layer keeps.
    """
    return relu(x)


@relu_from_output.defjvp
def _relu_from_output_jvp(primals, tangents):
    out = relu_from_output(*primals)
    return out, jnp.where(out > 0, tangents[0], 0)


class SqueezeExcite(nn.Module):
    """Scales every channel by a factor that the means of all channels decide.

    Hu et al., arXiv:1709.01507, as timm's SEModule. Maps [N, H, W, C] to the same shape.

    Attributes:
      ratio: channels in between, as a share of C, rounded to a multiple of 8.
      dtype: of the computation.
    """

    ratio: float = 1 / 16
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        planes = x.shape[-1]
        reduced = max(8, int(planes * self.ratio + 4) // 8 * 8)
        means = x.astype(jnp.promote_types(self.dtype, jnp.float32)).mean((1, 2), keepdims=True)
        # torch.nn.Conv2d's initial bias.
        biases = [uniform(fan_in**-0.5) for fan_in in (planes, reduced)]
        out = conv1x1(reduced, bias_init=biases[0], dtype=self.dtype, name="fc1")(means)
        out = relu_from_output(out)
        out = conv1x1(planes, bias_init=biases[1], dtype=self.dtype, name="fc2")(out)
        return x * nn.sigmoid(out)


class EfficientChannelAttention(nn.Module):
    """Scales every channel by a factor that the means of its neighbours decide.

    Wang et al., arXiv:1910.03151, as timm's EcaModule: one convolution along the channels,
    whose size grows with the logarithm of their number (their equation 12). Maps
    [N, H, W, C] to the same shape.

    Attributes:
      dtype: of the computation.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        size = int((math.log2(x.shape[-1]) + 1) / 2)
        size = max(3, size + 1 - size % 2)
        means = x.astype(jnp.promote_types(self.dtype, jnp.float32)).mean((1, 2))
        conv = nn.Conv(
            1,
            (size,),
            padding=size // 2,
            use_bias=False,
            kernel_init=kaiming_normal,
            dtype=self.dtype,
            name="conv",
        )
        factors = nn.sigmoid(conv(means[:, :, None])[:, None, None, :, 0])
        return x * factors


def avg_pool(
    x: Float[Array, "n h w c"], stride: int, *, keeps_rest: bool = False
) -> Float[Array, "n oh ow c"]:
    """Means of stride x stride pixels, as torch.nn.AvgPool2d.

    Args:
      x: [N, H, W, C].
      stride: pixels from one window to the next, and its size.
      keeps_rest: whether what is left at the end of a row or column counts, in windows of fewer
        pixels: ceil_mode=True and count_include_pad=False.

    Returns:
      [N, H / stride, W / stride, C], rounded up where keeps_rest, else down.
    """
    padding = [(0, -size % stride if keeps_rest else 0) for size in x.shape[1:3]]
    window = (stride, stride)
    # Flax takes what its annotation of padding does not allow.
    return nn.avg_pool(x, window, window, padding, count_include_pad=False)  # pyright: ignore[reportArgumentType]


def blur_pool(x: Float[Array, "n h w c"], stride: int) -> Float[Array, "n oh ow c"]:
    """Every stride-th pixel after a blur by (1, 2, 1) / 4 in both directions.

    Zhang, arXiv:1904.11486, as timm's BlurPool2d: images are reflected at their edges.
    """
    for axis in (1, 2):
        padding = [(int(i == axis), int(i == axis)) for i in range(4)]
        padded = jnp.pad(x, padding, mode="reflect")
        end = x.shape[axis]
        before, middle, after = (
            jax.lax.slice_in_dim(padded, i, i + end, stride, axis) for i in range(3)
        )
        x = middle / 2 + (before + after) / 4
    return x


def max_pool(
    x: Float[Array, "n h w c"], stride: int, *, zeros: bool = False
) -> Float[Array, "n oh ow c"]:
    """Maxima of 3x3 pixels, as torch.nn.MaxPool2d(3, stride, padding=1).

    Args:
      x: [N, H, W, C].
      stride: pixels from one window to the next.
      zeros: whether the pixels around the image are zeros that count, as in BiT.
    """
    if zeros:
        return max_pool2d(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, stride)
    return max_pool2d(x, 3, stride, padding=1)


ANTIALIASED: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "average": avg_pool,
    "blur": blur_pool,
}
