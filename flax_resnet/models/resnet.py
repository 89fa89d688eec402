"""Residual networks in Flax linen, in the order and with the names of PyTorch's.

He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, as
PyTorch writes it: the same submodule names, explicit symmetric padding, Kaiming
initialisation, and the stride of a Bottleneck on its 3x3 convolution.

Images are float [N, H, W, C]. Parameters and BatchNorm statistics are float32;
`dtype` is the type of the compute.

One number differs from PyTorch. Both normalise a training batch by its biased
variance, but PyTorch moves its running variance towards the unbiased one, which
is n / (n - 1) times larger for n = N * H * W values a channel; Flax moves it
towards the biased one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_resnet.models.convolution import convolution, grouped_convolution
from flax_resnet.models.freezing import check_frozen, has_frozen_statistics

Dtype = Any
Initializer = Callable[..., jax.Array]

# torch.nn.init.kaiming_normal_(mode="fan_out", nonlinearity="relu")
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def uniform(limit: float) -> Initializer:
    """Initialiser on [-limit, limit): torch.nn.Linear's, with limit = fan_in ** -0.5."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class Conv(nn.Module):
    """Convolution of odd size, padded by half of it on every side.

    Attributes:
      planes: channels of the output.
      size: height and width of the kernel.
      stride: in both directions.
      groups: equal parts of the input's channels; the i-th part of the output's is made of
        the i-th alone, as in torch.nn.Conv2d.
      bias_init: initial value of the bias; None for no bias.
      dtype: type of the compute.
    """

    planes: int
    size: int
    stride: int = 1
    groups: int = 1
    bias_init: Initializer | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n oh ow {self.planes}"]:
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.planes)
        kernel = self.param("kernel", kaiming_normal, shape, jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        padding = self.size // 2
        if self.groups == 1:
            x = convolution(x, kernel, stride=self.stride, padding=padding)
        else:
            x = grouped_convolution(
                x, kernel, groups=self.groups, stride=self.stride, padding=padding
            )
        if self.bias_init is not None:
            bias = self.param("bias", self.bias_init, (self.planes,), jnp.float32)
            x += bias.astype(self.dtype)[None, None, None]
        return x


def conv3x3(planes: int, stride: int = 1, **kwargs) -> Conv:
    """3x3 convolution with padding 1."""
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
      momentum: share of the running statistics that a step keeps (PyTorch's 1 - 0.9).
      epsilon: added to the variance.
      splits: equal parts of the batch, each normalised by its own statistics; the running
        ones move towards their mean. With one part a device nothing crosses devices.
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
    32 groups, as in the paper, or the most below 32 that divide the channels.

    Attributes:
      train: of no effect; it stands where `BatchNorm` has it.
      epsilon, zero_init, dtype: as in `BatchNorm`.
    """

    train: bool = False
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
        groups = max(n for n in range(1, 33) if channels % n == 0)
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
    """max(x, 0), whose gradient is taken from its output, which the next layer keeps anyway."""
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
    out = relu(*primals)
    return out, jnp.where(out > 0, tangents[0], 0)


class SqueezeExcite(nn.Module):
    """Scales every channel by a factor that the means of all channels decide.

    Hu et al., arXiv:1709.01507, as timm's SEModule: a sixteenth of the channels in
    between, rounded to a multiple of 8. Maps [N, H, W, C] to the same shape.

    Attributes:
      dtype: type of the compute.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        planes = x.shape[-1]
        reduced = max(8, int(planes / 16 + 4) // 8 * 8)
        means = x.astype(jnp.promote_types(self.dtype, jnp.float32)).mean((1, 2), keepdims=True)
        # torch.nn.Conv2d's initial bias.
        biases = [uniform(fan_in**-0.5) for fan_in in (planes, reduced)]
        out = conv1x1(reduced, bias_init=biases[0], dtype=self.dtype, name="fc1")(means)
        out = relu(out)
        out = conv1x1(planes, bias_init=biases[1], dtype=self.dtype, name="fc2")(out)
        return x * nn.sigmoid(out)


Norm = Callable[..., nn.Module]


def shortcut_connection(
    x: Float[Array, "n h w c"],
    planes: int,
    stride: int,
    kind: str,
    *,
    train: bool,
    norm: Norm | None,
    dtype: Dtype,
) -> Float[Array, "n oh ow {planes}"] | None:
    """Brings a block's input to the shape of its output; x itself where that is its shape.

    Args:
      x: the block's input, [N, H, W, C].
      planes: channels of the block's output.
      stride: stride of the block.
      kind: "projection", a 1x1 convolution and BatchNorm (option B of He et al.
        section 4.1); "identity", every stride-th pixel with zero channels added
        on both sides (option A), which has no parameters; "average", a projection of
        the means of stride x stride pixels (ResNet-D of He et al., arXiv:1812.01187,
        section 4.2), so that it sees every pixel; or "none", no shortcut anywhere.
      train: whether BatchNorm uses the batch's statistics.
      norm: `BatchNorm`, with fields of its own set or not; None for a projection
        without it.
      dtype: type of the compute.

    Returns:
      None if there is no shortcut.

    Raises:
      ValueError: for another kind, or where "identity" would have to drop channels.
    """
    if kind not in ("projection", "identity", "average", "none"):
        raise ValueError(f"shortcut is 'projection', 'identity', 'average' or 'none', not {kind!r}")
    if kind == "none":
        return None
    if stride == 1 and x.shape[-1] == planes:
        return x
    if kind == "identity":
        missing = planes - x.shape[-1]
        if missing < 0:
            raise ValueError(
                f"an identity shortcut cannot go from {x.shape[-1]} to {planes} channels"
            )
        before = missing // 2
        x = x[:, ::stride, ::stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, missing - before)))
    names = ["downsample_conv", "downsample_bn"]
    if kind == "average":
        names = ["downsample_1", "downsample_2"]  # timm's; 0 is the pooling
        if stride > 1:
            padding = [(0, -size % stride) for size in x.shape[1:3]]
            window = (stride, stride)
            # Flax takes what its annotation of padding does not allow.
            x = nn.avg_pool(x, window, window, padding, count_include_pad=False)  # pyright: ignore[reportArgumentType]
            stride = 1
    x = conv1x1(planes, stride, dtype=dtype, name=names[0])(x)
    return x if norm is None else norm(train, dtype=dtype, name=names[1])(x)


class ResidualBlock(nn.Module):
    """What all blocks have: their fields, their shortcut, and how the two paths meet.

    Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), expansion * planes].

    Attributes:
      planes: channels of the block's 3x3 convolutions.
      stride: stride of the first of them.
      shortcut: see `shortcut_connection`.
      zero_init_residual: start the scale of the last BatchNorm at zero, so that the
        block starts as the identity (Goyal et al., arXiv:1706.02677, section 5.1).
      groups, width_per_group: of a bottleneck's 3x3 convolution, which has
        planes * width_per_group / 64 * groups channels in that many groups; torchvision's
        names for ResNeXt (Xie et al., arXiv:1611.05431) and wide ResNets.
      squeeze_excite: end the residual branch with `SqueezeExcite`.
      stochastic_depth: probability that training leaves the residual branch of an example
        out; what stays is scaled up to keep the mean. Needs the rng "dropout".
      norm: `BatchNorm` or `GroupNorm`, with fields of its own set or not.
      dtype: type of the compute.

    Raises (when called):
      ValueError: names the fields that do not go together.
    """

    planes: int
    stride: int = 1
    shortcut: str = "projection"
    zero_init_residual: bool = False
    groups: int = 1
    width_per_group: int = 64
    squeeze_excite: bool = False
    stochastic_depth: float | jax.Array = 0.0
    norm: Norm = BatchNorm
    dtype: Dtype = jnp.float32

    expansion: ClassVar[int] = 1
    preactivation: ClassVar[bool] = False

    def _width(self) -> int:
        """Channels of the first convolutions."""
        grouping = f"groups={self.groups} and width_per_group={self.width_per_group}"
        if self.expansion == 1 and (self.groups, self.width_per_group) != (1, 64):
            raise ValueError(f"{grouping} are for bottlenecks, not {type(self).__name__}")
        width = int(self.planes * self.width_per_group / 64) * self.groups
        if width < 1:
            raise ValueError(f"{grouping} leave no channels of planes={self.planes}")
        return width

    def _drops_branch(self) -> bool:
        # Under scan_blocks the rate is traced.
        return isinstance(self.stochastic_depth, jax.Array) or self.stochastic_depth > 0

    def _shortcut(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n oh ow co"] | None:
        if self.shortcut == "none" and self._drops_branch():
            raise ValueError("stochastic_depth needs a shortcut: shortcut='none' leaves nothing")
        if self.zero_init_residual and (self.preactivation or self.shortcut == "none"):
            raise ValueError(
                "zero_init_residual=True needs a shortcut, and a BatchNorm at the end of the "
                f"residual branch: not {type(self).__name__} with shortcut={self.shortcut!r}"
            )
        return shortcut_connection(
            x,
            self.planes * self.expansion,
            self.stride,
            self.shortcut,
            train=train,
            norm=None if self.preactivation else self.norm,
            dtype=self.dtype,
        )

    def _join(
        self,
        branch: Float[Array, "n h w c"],
        shortcut: Float[Array, "n h w c"] | None,
        train: bool,
    ) -> Float[Array, "n h w c"]:
        """Residual branch and shortcut as one."""
        if self.squeeze_excite:
            branch = SqueezeExcite(self.dtype, name="se")(branch)
        if train and self._drops_branch():
            survival = 1 - self.stochastic_depth
            examples = (branch.shape[0], 1, 1, 1)
            keep = jax.random.bernoulli(self.make_rng("dropout"), survival, examples)
            branch = jnp.where(keep, branch / survival, 0).astype(self.dtype)
        return branch if shortcut is None else branch + shortcut


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and 34.

    See `ResidualBlock` for its fields.
    """

    expansion: ClassVar[int] = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n oh ow {self.planes}"]:
        dtype = self.dtype
        norm = partial(self.norm, train, dtype=dtype)
        identity = self._shortcut(x, train)

        out = conv3x3(self._width(), self.stride, dtype=dtype, name="conv1")(x)
        out = norm(name="bn1")(out)
        out = relu(out)

        out = conv3x3(self.planes, dtype=dtype, name="conv2")(out)
        out = norm(name="bn2", zero_init=self.zero_init_residual)(out)

        return relu(self._join(out, identity, train))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: the block of ResNet-50 and deeper.

    The stride sits on the 3x3 convolution, as in torchvision ("v1.5"). The output has
    4 * planes channels. See `ResidualBlock` for its fields.
    """

    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n oh ow {4*self.planes}"]:
        width, dtype = self._width(), self.dtype
        norm = partial(self.norm, train, dtype=dtype)
        identity = self._shortcut(x, train)

        out = conv1x1(width, dtype=dtype, name="conv1")(x)
        out = norm(name="bn1")(out)
        out = relu(out)

        out = conv3x3(width, self.stride, groups=self.groups, dtype=dtype, name="conv2")(out)
        out = norm(name="bn2")(out)
        out = relu(out)

        out = conv1x1(self.planes * self.expansion, dtype=dtype, name="conv3")(out)
        out = norm(name="bn3", zero_init=self.zero_init_residual)(out)

        return relu(self._join(out, identity, train))


class PreActBasicBlock(ResidualBlock):
    """`BasicBlock` with BatchNorm and ReLU before each convolution, and none after the sum.

    He et al., "Identity Mappings in Deep Residual Networks", arXiv:1603.05027. The
    shortcut is a path without any operation; where the shape changes it is a 1x1
    convolution of what the residual branch starts from, as in the authors' code.

    Attributes:
      dropout: share of the values that training sets to zero before the second
        convolution (Zagoruyko and Komodakis, arXiv:1605.07146, section 2.4). Needs the rng
        "dropout".
      and those of `ResidualBlock`.
    """

    dropout: float = 0.0

    preactivation: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n oh ow {self.planes}"]:
        dtype = self.dtype
        norm = partial(self.norm, train, dtype=dtype)

        out = relu(norm(name="bn1")(x))
        changes = self.stride != 1 or x.shape[-1] != self.planes
        identity = self._shortcut(out if changes else x, train)
        out = conv3x3(self._width(), self.stride, dtype=dtype, name="conv1")(out)

        out = relu(norm(name="bn2")(out))
        out = nn.Dropout(self.dropout, deterministic=not train)(out)
        out = conv3x3(self.planes, dtype=dtype, name="conv2")(out)

        return self._join(out, identity, train)


class PreActBottleneck(ResidualBlock):
    """`Bottleneck` in the order of `PreActBasicBlock`."""

    expansion: ClassVar[int] = 4
    preactivation: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n oh ow {4*self.planes}"]:
        width, dtype = self._width(), self.dtype
        out_planes = self.planes * self.expansion
        norm = partial(self.norm, train, dtype=dtype)

        out = relu(norm(name="bn1")(x))
        changes = self.stride != 1 or x.shape[-1] != out_planes
        identity = self._shortcut(out if changes else x, train)
        out = conv1x1(width, dtype=dtype, name="conv1")(out)

        out = relu(norm(name="bn2")(out))
        out = conv3x3(width, self.stride, groups=self.groups, dtype=dtype, name="conv2")(out)

        out = relu(norm(name="bn3")(out))
        out = conv1x1(out_planes, dtype=dtype, name="conv3")(out)

        return self._join(out, identity, train)


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pooling and a linear classifier.

    `model.init(key, x, train=False)` gives {"params", "batch_stats"}, or {"params"} for a
    net without BatchNorm; `model.apply(variables, x, train=False)` gives float32 logits
    [N, num_classes]; with `train=True` BatchNorm uses the batch's statistics, and
    `mutable=["batch_stats"]` returns the moved running ones beside the logits. Training
    with dropout or stochastic depth also takes `rngs={"dropout": key}`. Images may have
    any number of channels; the variables are made for that of `init`.

    With `features=True` what comes back is a dict of all that lies on the way, by name:
    "stem", [N, H, W, C] as the first block takes it; "layer1", "layer2", ..., what each
    stage gives; "pooled", float32 [N, C]; and "logits", if there is a classifier.

    Attributes:
      block: `BasicBlock`, `Bottleneck`, `PreActBasicBlock` or `PreActBottleneck`.
      layers: number of blocks of each stage.
      num_classes: number of logits; 0 for no classifier, and the pooled features instead.
      zero_init_residual: see `ResidualBlock`.
      widths: `planes` of each stage.
      strides: stride of the first block of each stage.
      cifar_stem: a 3x3 convolution with stride 1 for small images, in place of the
        7x7 convolution with stride 2 and the 3x3 max-pool with stride 2.
      shortcut: "projection", "identity", "average" or "none" (a plain net); see
        `shortcut_connection`.
      deep_stem: three 3x3 convolutions in place of the 7x7 one, the first two with half of
        the stem's channels (ResNet-C of He et al., arXiv:1812.01187, section 4.2).
      stem_width: channels of the stem's output; None for those of the first stage.
      groups, width_per_group, squeeze_excite: see `ResidualBlock`.
      norm: "batch" or "group", `BatchNorm` or `GroupNorm`; the names of the modules stay.
      dropout: see `PreActBasicBlock`; no other block has it.
      stochastic_depth: that of the last block; the l-th of L blocks has l / L of it
        (Huang et al., arXiv:1603.09382, equation 4).
      scan_blocks: run the blocks of a stage but the first under `lax.scan`, so that the
        time to compile does not grow with their number. The variables have the same
        names and values either way; see also `stack_blocks`. What Flax captures of modules
        inside is not there for these. For GPU and TPU: XLA:CPU is slow in loops.
      bn_splits: see `BatchNorm`.
      frozen: names, as PyTorch has them, of modules whose BatchNorms keep their running
        statistics and normalise by them in training too, such as ("bn1", "layer1");
        `*`, `?` and `[]` as in file names. Their parameters are the optimizer's to freeze.
      dtype: type of the compute, e.g. jnp.bfloat16 on GPU and TPU.

    Raises (when called):
      ValueError: if x is not 4-dimensional, or names the fields that do not go together.
    """

    block: type[ResidualBlock]
    layers: Sequence[int]
    num_classes: int = 1000
    zero_init_residual: bool = False
    widths: Sequence[int] = (64, 128, 256, 512)
    strides: Sequence[int] = (1, 2, 2, 2)
    cifar_stem: bool = False
    shortcut: str = "projection"
    deep_stem: bool = False
    stem_width: int | None = None
    groups: int = 1
    width_per_group: int = 64
    squeeze_excite: bool = False
    norm: str = "batch"
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    scan_blocks: bool = False
    bn_splits: int = 1
    frozen: Sequence[str] = ()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool, *, features: bool = False
    ) -> Float[Array, "n k"] | dict[str, Float[Array, "n ..."]]:
        self._check(x)
        frozen = partial(has_frozen_statistics, model=self.path, patterns=self.frozen)
        batch_norm = partial(BatchNorm, splits=self.bn_splits, frozen=frozen)
        norm = {"batch": batch_norm, "group": GroupNorm}[self.norm]
        bn = partial(norm, train, dtype=self.dtype)
        outputs = {}

        planes = self.stem_width or self.widths[0]
        if self.cifar_stem:
            x = conv3x3(planes, dtype=self.dtype, name="conv1")(x)
        elif self.deep_stem:
            # torch.nn.Sequential's numbers; 2 and 5 are ReLU.
            x = conv3x3(planes // 2, 2, dtype=self.dtype, name="conv1_0")(x)
            x = relu(bn(name="conv1_1")(x))
            x = conv3x3(planes // 2, dtype=self.dtype, name="conv1_3")(x)
            x = relu(bn(name="conv1_4")(x))
            x = conv3x3(planes, dtype=self.dtype, name="conv1_6")(x)
        else:
            x = Conv(planes, 7, stride=2, dtype=self.dtype, name="conv1")(x)
        if not self.block.preactivation:
            x = bn(name="bn1")(x)
            x = relu(x)
        if not self.cifar_stem:
            # Flax takes what its annotation of padding does not allow.
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        outputs["stem"] = x

        fields: dict[str, Any] = {"dropout": self.dropout} if self.dropout else {}
        block = partial(
            self.block,
            shortcut=self.shortcut,
            zero_init_residual=self.zero_init_residual,
            groups=self.groups,
            width_per_group=self.width_per_group,
            squeeze_excite=self.squeeze_excite,
            norm=norm,
            dtype=self.dtype,
            **fields,
        )
        rise = self.stochastic_depth / sum(self.layers)
        done = 0
        stages = zip(self.layers, self.widths, self.strides, strict=True)
        for stage, (blocks, planes, stride) in enumerate(stages, start=1):
            names = [f"layer{stage}_{i}" for i in range(blocks)]
            rates = [rise * (done + i) for i in range(1, blocks + 1)]
            done += blocks
            x = block(planes, stride, stochastic_depth=rates[0], name=names[0])(x, train)
            if self.scan_blocks and blocks > 1 and not self.is_initializing():
                x = self._scan(block(planes, parent=None), stage, rates[1:], x, train)
            else:
                for name, rate in zip(names[1:], rates[1:], strict=True):
                    x = block(planes, stochastic_depth=rate, name=name)(x, train)
            outputs[f"layer{stage}"] = x
        if self.block.preactivation:
            x = relu(bn(name="bn")(x))

        # Pooling and the classifier cost next to nothing: never in half precision.
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32)).mean(axis=(1, 2))
        outputs["pooled"] = x
        if self.num_classes:
            x = nn.Dense(
                self.num_classes,
                kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
                bias_init=uniform(x.shape[-1] ** -0.5),
                dtype=x.dtype,
                name="fc",
            )(x)
            outputs["logits"] = x
        return outputs if features else x

    def _check(self, x: jax.Array) -> None:
        """Raises ValueError where x or the fields make no sense; blocks check their own."""
        if x.ndim != 4:
            raise ValueError(f"images are [N, H, W, C], not of shape {x.shape}")
        if not len(self.layers) == len(self.widths) == len(self.strides):
            raise ValueError(
                "layers, widths and strides have one entry a stage, not "
                f"{len(self.layers)}, {len(self.widths)} and {len(self.strides)}"
            )
        for name in ("layers", "widths", "strides"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} are at least 1, not {tuple(getattr(self, name))}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes is 0 for no classifier, or more: not {self.num_classes}")
        if self.cifar_stem and self.deep_stem:
            raise ValueError("cifar_stem and deep_stem are two stems: set one of them")
        if self.stem_width is not None and self.stem_width < 1 + self.deep_stem:
            raise ValueError(f"stem_width={self.stem_width} is too small for a stem")
        if self.norm not in ("batch", "group"):
            raise ValueError(f"norm is 'batch' or 'group', not {self.norm!r}")
        if self.norm == "group" and self.bn_splits != 1:
            raise ValueError(f"bn_splits={self.bn_splits} is for norm='batch'")
        check_frozen(self.frozen)
        if self.frozen and self.scan_blocks:
            raise ValueError(
                "scan_blocks=True runs blocks as one: it cannot have some of them frozen"
            )
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is from 0 to below 1, not {getattr(self, name)}")
        if self.dropout and not issubclass(self.block, PreActBasicBlock):
            raise ValueError(f"dropout is for PreActBasicBlock, not {self.block.__name__}")

    def _scan(
        self,
        block: ResidualBlock,
        stage: int,
        rates: Sequence[float],
        x: Float[Array, "n h w c"],
        train: bool,
    ) -> Float[Array, "n h w c"]:
        """Runs the blocks of a stage but the first in a `lax.scan` over their variables.

        These are stacked for it, unless they come as `stack_blocks` leaves them.
        """
        rest = f"layer{stage}_rest"
        names = [f"layer{stage}_{i}" for i in range(1, len(rates) + 1)]
        is_stacked = rest in self.variables["params"]

        def of_each(kind):
            variables = self.variables[kind]
            return variables[rest] if is_stacked else _stack([variables[name] for name in names])

        def run(x, of_one):
            variables, key, rate = of_one
            one = block if rate is None else block.clone(stochastic_depth=rate)
            rngs = None if key is None else {"dropout": key}
            x, updates = one.apply(variables, x, train, mutable=["batch_stats"], rngs=rngs)
            return x, updates.get("batch_stats")

        kinds = [kind for kind in ("params", "batch_stats") if kind in self.variables]
        keys = scanned_rates = None
        if train and (self.dropout or self.stochastic_depth):
            keys = jax.random.split(self.make_rng("dropout"), len(names))
        if self.stochastic_depth:
            scanned_rates = jnp.array(rates)
        variables = {kind: of_each(kind) for kind in kinds}
        x, batch_stats = jax.lax.scan(run, x, (variables, keys, scanned_rates))
        if train and batch_stats and is_stacked:
            self.put_variable("batch_stats", rest, batch_stats)
        elif train and batch_stats:
            for i, name in enumerate(names):
                self.put_variable("batch_stats", name, jax.tree.map(itemgetter(i), batch_stats))
        return x


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
            if stage.startswith("layer") and block != "0":
                stages.setdefault(f"{stage}_rest", []).append((int(block), value))
            else:
                out[name] = value
        for rest, blocks in stages.items():
            out[rest] = _stack([value for _, value in sorted(blocks, key=itemgetter(0))])
        return out

    return jax.tree.map(stack, tree, is_leaf=_has_blocks)


def unstack_blocks(tree: Any) -> Any:
    """Undoes `stack_blocks`."""

    def unstack(node):
        if not _has_blocks(node):
            return node
        out = {}
        for name, value in node.items():
            stage, _, block = name.partition("_")
            if block != "rest":
                out[name] = value
                continue
            for i in range(len(jax.tree.leaves(value)[0])):
                out[f"{stage}_{i + 1}"] = jax.tree.map(itemgetter(i), value)
        return out

    return jax.tree.map(unstack, tree, is_leaf=_has_blocks)


def _has_blocks(node: Any) -> bool:
    return isinstance(node, dict) and "layer1_0" in node


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


# He et al. table 1: 224x224 images, 1000 classes.
resnet18 = partial(ResNet, BasicBlock, layers=(2, 2, 2, 2))
resnet34 = partial(ResNet, BasicBlock, layers=(3, 4, 6, 3))
resnet50 = partial(ResNet, Bottleneck, layers=(3, 4, 6, 3))
resnet101 = partial(ResNet, Bottleneck, layers=(3, 4, 23, 3))
resnet152 = partial(ResNet, Bottleneck, layers=(3, 8, 36, 3))

# Zagoruyko and Komodakis, arXiv:1605.07146, table 8: twice as wide inside of the blocks.
wide_resnet50_2 = partial(resnet50, width_per_group=128)
wide_resnet101_2 = partial(resnet101, width_per_group=128)

# Xie et al., arXiv:1611.05431, table 1 and section 5.1.
resnext50_32x4d = partial(resnet50, groups=32, width_per_group=4)
resnext101_32x8d = partial(resnet101, groups=32, width_per_group=8)
resnext101_64x4d = partial(resnet101, groups=64, width_per_group=4)

# He et al., "Bag of Tricks", arXiv:1812.01187, section 4.2, as in timm.
resnet18d = partial(resnet18, deep_stem=True, shortcut="average")
resnet34d = partial(resnet34, deep_stem=True, shortcut="average")
resnet50d = partial(resnet50, deep_stem=True, shortcut="average")
resnet101d = partial(resnet101, deep_stem=True, shortcut="average")
resnet152d = partial(resnet152, deep_stem=True, shortcut="average")

# Hu et al., arXiv:1709.01507, table 2, as in timm.
seresnet50 = partial(resnet50, squeeze_excite=True)
seresnet101 = partial(resnet101, squeeze_excite=True)
seresnet152 = partial(resnet152, squeeze_excite=True)

# He et al. figure 3 and table 2: the same layers without shortcuts.
plain18 = partial(resnet18, shortcut="none")
plain34 = partial(resnet34, shortcut="none")

# The first five for 32x32 images and 10 classes.
cifar_resnet18 = partial(resnet18, num_classes=10, cifar_stem=True)
cifar_resnet34 = partial(resnet34, num_classes=10, cifar_stem=True)
cifar_resnet50 = partial(resnet50, num_classes=10, cifar_stem=True)
cifar_resnet101 = partial(resnet101, num_classes=10, cifar_stem=True)
cifar_resnet152 = partial(resnet152, num_classes=10, cifar_stem=True)

# Three stages, which papers on CIFAR have.
_three_stages = partial(
    ResNet, num_classes=10, widths=(16, 32, 64), strides=(1, 2, 2), cifar_stem=True
)

# He et al. section 4.2: 6n + 2 layers, shortcuts without parameters.
_he_cifar = partial(_three_stages, BasicBlock, shortcut="identity")
cifar_resnet8 = partial(_he_cifar, layers=(1, 1, 1))
cifar_resnet20 = partial(_he_cifar, layers=(3, 3, 3))
cifar_resnet32 = partial(_he_cifar, layers=(5, 5, 5))
cifar_resnet44 = partial(_he_cifar, layers=(7, 7, 7))
cifar_resnet56 = partial(_he_cifar, layers=(9, 9, 9))
cifar_resnet110 = partial(_he_cifar, layers=(18, 18, 18))
cifar_resnet1202 = partial(_he_cifar, layers=(200, 200, 200))
cifar_plain20 = partial(cifar_resnet20, shortcut="none")
cifar_plain32 = partial(cifar_resnet32, shortcut="none")
cifar_plain44 = partial(cifar_resnet44, shortcut="none")
cifar_plain56 = partial(cifar_resnet56, shortcut="none")

# He et al., arXiv:1603.05027: 9n + 2 layers (section 5), and the 18 layers from above, whose
# first block keeps the shape: its shortcut is the stem's output, not activated.
cifar_preact_resnet18 = partial(
    ResNet, PreActBasicBlock, layers=(2, 2, 2, 2), num_classes=10, cifar_stem=True
)
cifar_preact_resnet164 = partial(_three_stages, PreActBottleneck, layers=(18, 18, 18))
cifar_preact_resnet1001 = partial(_three_stages, PreActBottleneck, layers=(111, 111, 111))

# Zagoruyko and Komodakis, arXiv:1605.07146, table 1: 6n + 4 layers, widened from 16/32/64.
_wide_cifar = partial(_three_stages, PreActBasicBlock, stem_width=16)
cifar_wrn16_8 = partial(_wide_cifar, layers=(2, 2, 2), widths=(128, 256, 512))
cifar_wrn28_10 = partial(_wide_cifar, layers=(4, 4, 4), widths=(160, 320, 640))

# The CIFAR-10 net of the lesson "Lab10-6: ResNet" (Deep Learning Zero To All, season 2).
lab10_resnet50 = partial(
    ResNet,
    Bottleneck,
    layers=(3, 4, 6, 3),
    num_classes=10,
    widths=(16, 32, 64, 128),
    strides=(1, 1, 2, 2),
    cifar_stem=True,
)
