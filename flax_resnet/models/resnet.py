"""Residual networks in Flax linen, in the order and with the names of PyTorch's.

He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, as
PyTorch writes it: the same submodule names, explicit symmetric padding, Kaiming
initialisation, and the stride of a Bottleneck on its 3x3 convolution.

Images are float [N, H, W, C]. Parameters and BatchNorm statistics are float32;
`dtype` is that of the computation.
"""

import inspect
import math
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_resnet.models.checks import checked
from flax_resnet.models.freezing import has_frozen_statistics
from flax_resnet.models.layers import (
    ANTIALIASED,
    BatchNorm,
    Conv,
    Dtype,
    EfficientChannelAttention,
    GroupNorm,
    Norm,
    SqueezeExcite,
    avg_pool,
    blur_pool,
    conv1x1,
    conv3x3,
    max_pool,
    relu,
    relu_from_output,
    uniform,
)
from flax_resnet.models.stacking import stack_trees


class ResidualBlock(nn.Module):
    """What all blocks have: their fields, their shortcut, and how the two paths meet.

    Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), expansion * planes]; with
    antialias="average" H and W are multiples of the stride. A block of your own derives from
    this one or from one below, and calls `downsample` and `join`.

    Attributes:
      planes: channels of the block's 3x3 convolutions.
      stride: stride of the first of them.
      shortcut: how the input comes to the shape of the output, where it has another:
        "projection", a 1x1 convolution and BatchNorm (option B of He et al. section 4.1);
        "identity", every stride-th pixel with zero channels added on both sides (option A),
        which has no parameters; or "average", a projection of the means of stride x stride
        pixels (ResNet-D of He et al., arXiv:1812.01187, section 4.2), so that it sees every
        pixel. "none" is no shortcut anywhere.
      zero_init_residual: start the scale of the last BatchNorm at zero, so that the
        block starts as the identity (Goyal et al., arXiv:1706.02677, section 5.1).
      groups, width_per_group: of a bottleneck's 3x3 convolution, which has
        planes * width_per_group / 64 * groups channels in that many groups; torchvision's
        names for ResNeXt (Xie et al., arXiv:1611.05431) and wide ResNets.
      squeeze_excite, se_ratio: end the residual branch with `SqueezeExcite` of that ratio.
      eca: end it with `EfficientChannelAttention`.
      antialias: how the branch comes to fewer pixels: "none", by the stride of its 3x3
        convolution; or by "average" or "blur" after it, with stride 1 (Zhang, arXiv:1904.11486;
        see `blur_pool`), as in timm.
      dilation: of the 3x3 convolutions.
      first_dilation: that of the first of them; None for dilation.
      weight_standardization: see `Conv.standardize`.
      stochastic_depth: probability that training leaves the residual branch of an example
        out; what stays is scaled up to keep the mean. Needs the rng "dropout".
      norm_layer: `BatchNorm` or `GroupNorm`, or a `functools.partial` of one.
      dtype: of the computation.

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
    se_ratio: float = 1 / 16
    eca: bool = False
    antialias: str = "none"
    dilation: int = 1
    first_dilation: int | None = None
    weight_standardization: bool = False
    stochastic_depth: float | jax.Array = 0.0
    norm_layer: Norm = BatchNorm
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

    @property
    def conv_fields(self) -> dict[str, Any]:
        """What all convolutions of the block have."""
        return {"dtype": self.dtype, "standardize": self.weight_standardization}

    @property
    def strided_fields(self) -> dict[str, Any]:
        """What its first 3x3 convolution has, which comes to fewer pixels."""
        dilation = self.dilation if self.first_dilation is None else self.first_dilation
        stride = 1 if self._is_antialiased() else self.stride
        return {"stride": stride, "dilation": dilation, **self.conv_fields}

    def _is_antialiased(self) -> bool:
        dilates = self.first_dilation not in (None, self.dilation)
        return self.antialias != "none" and (self.stride != 1 or dilates)

    def thin_out(self, x: Float[Array, "n h w c"]) -> Float[Array, "n oh ow c"]:
        """What `antialias` does after the first 3x3 convolution."""
        return ANTIALIASED[self.antialias](x, self.stride) if self._is_antialiased() else x

    def changes_shape(self, x: Float[Array, "n h w c"]) -> bool:
        """Whether the output has another shape than the input x."""
        return self.stride != 1 or x.shape[-1] != self.planes * self.expansion

    def downsample(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n oh ow co"] | None:
        """The shortcut: x in the shape of the output, x itself where that is its shape.

        Args:
          x: the block's input, or what the shortcut starts from.
          train: whether BatchNorm uses the batch's statistics.

        Returns:
          None if there is no shortcut.

        Raises:
          ValueError: for another `shortcut`, where "identity" would have to drop channels, or
            where fields do not go together.
        """
        if self.shortcut not in ("projection", "identity", "average", "none"):
            raise ValueError(
                f"shortcut is 'projection', 'identity', 'average' or 'none', not {self.shortcut!r}"
            )
        if self.shortcut == "none" and self._drops_branch():
            raise ValueError("stochastic_depth needs a shortcut: shortcut='none' leaves nothing")
        if self.zero_init_residual and (self.preactivation or self.shortcut == "none"):
            raise ValueError(
                "zero_init_residual=True needs a shortcut, and a BatchNorm at the end of the "
                f"residual branch: not {type(self).__name__} with shortcut={self.shortcut!r}"
            )
        if self.shortcut == "none":
            return None
        if not self.changes_shape(x):
            return x
        planes, stride = self.planes * self.expansion, self.stride
        if self.shortcut == "identity":
            missing = planes - x.shape[-1]
            if missing < 0:
                raise ValueError(
                    f"an identity shortcut cannot go from {x.shape[-1]} to {planes} channels"
                )
            before = missing // 2
            x = x[:, ::stride, ::stride]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, missing - before)))
        names = ["downsample_conv", "downsample_bn"]
        if self.shortcut == "average":
            names = ["downsample_1", "downsample_2"]  # timm's; 0 is the pooling
            if stride > 1:
                x, stride = avg_pool(x, stride, keeps_rest=True), 1
            elif self.dilation > 1:  # as in timm: of 2x2 pixels, zeros beyond the edge
                x = nn.avg_pool(x, (2, 2), padding=((0, 1), (0, 1)))  # pyright: ignore[reportArgumentType]
        x = conv1x1(planes, stride, **self.conv_fields, name=names[0])(x)
        return (
            x if self.preactivation else self.norm_layer(train, dtype=self.dtype, name=names[1])(x)
        )

    def join(
        self,
        branch: Float[Array, "n h w c"],
        shortcut: Float[Array, "n h w c"] | None,
        train: bool,
    ) -> Float[Array, "n h w c"]:
        """The sum of residual branch and shortcut, after what `squeeze_excite`, `eca` and
        `stochastic_depth` do to the branch.

        Raises:
          ValueError: if their shapes differ, as where antialias="average" drops a row that the
            shortcut keeps.
        """
        if shortcut is not None and branch.shape != shortcut.shape:
            hint = (
                ": with antialias='average' an image's sides are multiples of what the net "
                "divides them by, 32 as a rule"
            )
            raise ValueError(
                f"the residual branch is {list(branch.shape)} and the shortcut "
                f"{list(shortcut.shape)}{hint if self.antialias == 'average' else ''}"
            )
        if self.squeeze_excite:
            branch = SqueezeExcite(self.se_ratio, self.dtype, name="se")(branch)
        if self.eca:
            branch = EfficientChannelAttention(self.dtype, name="se")(branch)
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
        norm = partial(self.norm_layer, train, dtype=self.dtype)
        identity = self.downsample(x, train)

        out = conv3x3(self._width(), **self.strided_fields, name="conv1")(x)
        out = norm(name="bn1")(out)
        out = self.thin_out(relu(out))

        out = conv3x3(self.planes, dilation=self.dilation, **self.conv_fields, name="conv2")(out)
        out = norm(name="bn2", zero_init=self.zero_init_residual)(out)

        return relu_from_output(self.join(out, identity, train))


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
        width, conv = self._width(), self.conv_fields
        norm = partial(self.norm_layer, train, dtype=self.dtype)
        identity = self.downsample(x, train)

        out = conv1x1(width, **conv, name="conv1")(x)
        out = norm(name="bn1")(out)
        out = relu(out)

        out = conv3x3(width, groups=self.groups, **self.strided_fields, name="conv2")(out)
        out = norm(name="bn2")(out)
        out = self.thin_out(relu(out))

        out = conv1x1(self.planes * self.expansion, **conv, name="conv3")(out)
        out = norm(name="bn3", zero_init=self.zero_init_residual)(out)

        return relu_from_output(self.join(out, identity, train))


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
        norm = partial(self.norm_layer, train, dtype=self.dtype)

        out = relu(norm(name="bn1")(x))
        identity = self.downsample(out if self.changes_shape(x) else x, train)
        out = conv3x3(self._width(), **self.strided_fields, name="conv1")(out)

        out = self.thin_out(relu(norm(name="bn2")(out)))
        out = nn.Dropout(self.dropout, deterministic=not train)(out)
        out = conv3x3(self.planes, dilation=self.dilation, **self.conv_fields, name="conv2")(out)

        return self.join(out, identity, train)


class PreActBottleneck(ResidualBlock):
    """`Bottleneck` in the order of `PreActBasicBlock`."""

    expansion: ClassVar[int] = 4
    preactivation: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n oh ow {4*self.planes}"]:
        width, conv = self._width(), self.conv_fields
        norm = partial(self.norm_layer, train, dtype=self.dtype)

        out = relu(norm(name="bn1")(x))
        identity = self.downsample(out if self.changes_shape(x) else x, train)
        out = conv1x1(width, **conv, name="conv1")(out)

        out = relu(norm(name="bn2")(out))
        out = conv3x3(width, groups=self.groups, **self.strided_fields, name="conv2")(out)

        out = self.thin_out(relu(norm(name="bn3")(out)))
        out = conv1x1(self.planes * self.expansion, **conv, name="conv3")(out)

        return self.join(out, identity, train)


@checked
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
      block: `BasicBlock`, `Bottleneck`, `PreActBasicBlock`, `PreActBottleneck`, or a
        subclass of `ResidualBlock`.
      layers: number of blocks of each stage.
      num_classes: number of logits; 0 for no classifier, and the pooled features instead.
      zero_init_residual: see `ResidualBlock`.
      widths: `planes` of each stage.
      strides: stride of the first block of each stage.
      cifar_stem: a 3x3 convolution with stride 1 for small images, in place of the
        7x7 convolution with stride 2 and the 3x3 max-pool with stride 2.
      shortcut: "projection", "identity", "average" or "none" (a plain net); see
        `ResidualBlock`.
      deep_stem: three 3x3 convolutions in place of the 7x7 one, the first two with half of
        the stem's channels (ResNet-C of He et al., arXiv:1812.01187, section 4.2).
      tiered_stem: the first of these three has 3/8 of them (timm's resnet*t).
      stem_width: channels of the stem's output; None for those of the first stage.
      stem_pool: "max", of 3x3 pixels with stride 2; "max_of_zeros", where the pixels around the
        image are zeros that count, as in BiT; or "conv", a 3x3 convolution with BatchNorm
        and ReLU in its place (ResNet-RS: Bello et al., arXiv:2103.07579, as in timm).
      replace_stride_with_dilation: for each stage but the first, whether its stride becomes a
        dilation, as in torchvision; None for no stage.
      output_stride: pixels of the image to one of the last stage, 4, 8, 16 or 32, or with
        cifar_stem also 1 or 2: strides beyond become dilations, as in timm; None for what the
        strides make.
      groups, width_per_group, squeeze_excite, se_ratio, eca, antialias,
      weight_standardization: see `ResidualBlock`; the last is the stem's too, and antialias that
        of its pooling.
      norm: "batch" or "group", `BatchNorm` or `GroupNorm`; the names of the modules stay. Or
        what makes a module in their place, from (train, *, dtype, name, zero_init=False), such as
        a `functools.partial` of one of them.
      final_norm: whether pre-activation nets have BatchNorm and ReLU before the pooling, as
        their paper says; kuangliu/pytorch-cifar has none.
      dropout: see `PreActBasicBlock`; no other block has it.
      stochastic_depth: that of the last block; the l-th of L blocks has l / L of it
        (Huang et al., arXiv:1603.09382, equation 4).
      scan_blocks: run the blocks of a stage but the first under `lax.scan`, so that the
        time to compile does not grow with their number. The variables have the same
        names and values either way; see also `stack_blocks`. Of collections and rngs these
        blocks get params, batch_stats and "dropout" alone, and what Flax captures of modules
        inside is not there. On a CPU where XLA does the convolutions (see
        flax_resnet/models/convolution.py) its steps are slow.
      bn_splits: see `BatchNorm`.
      frozen: names, as PyTorch has them, of modules whose BatchNorms keep their running
        statistics and normalise by them in training too, such as ("bn1", "layer1");
        `*`, `?` and `[]` as in file names. Their parameters are the optimizer's to freeze.
      dtype: of the computation, e.g. jnp.bfloat16 on GPU and TPU.

    Raises (when called):
      TypeError: if x is no array, or `train` is missing.
      ValueError: if x is not [N, H, W, C] of floats, if the variables or rngs are not what the call
        needs, or names the fields that do not go together.
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
    tiered_stem: bool = False
    stem_width: int | None = None
    stem_pool: str = "max"
    replace_stride_with_dilation: Sequence[bool] | None = None
    output_stride: int | None = None
    groups: int = 1
    width_per_group: int = 64
    squeeze_excite: bool = False
    se_ratio: float = 1 / 16
    eca: bool = False
    antialias: str = "none"
    weight_standardization: bool = False
    norm: str | Norm = "batch"
    final_norm: bool = True
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
        self._check()
        frozen = partial(has_frozen_statistics, model_path=self.path, patterns=self.frozen)
        batch_norm = partial(BatchNorm, splits=self.bn_splits, frozen=frozen)
        norm = self.norm
        if isinstance(norm, str):
            norm = {"batch": batch_norm, "group": GroupNorm}[norm]
        bn = partial(norm, train, dtype=self.dtype)

        x = self._stem(x, bn)
        outputs = {"stem": x}

        fields: dict[str, Any] = {"dropout": self.dropout} if self.dropout else {}
        block = partial(
            self.block,
            shortcut=self.shortcut,
            zero_init_residual=self.zero_init_residual,
            groups=self.groups,
            width_per_group=self.width_per_group,
            squeeze_excite=self.squeeze_excite,
            se_ratio=self.se_ratio,
            eca=self.eca,
            antialias=self.antialias,
            weight_standardization=self.weight_standardization,
            norm_layer=norm,
            dtype=self.dtype,
            **fields,
        )
        rise = self.stochastic_depth / sum(self.layers)
        done, dilation = 0, 1
        stages = zip(self.layers, self.widths, *self._strides_and_dilations(), strict=True)
        for stage, (blocks, planes, stride, new_dilation) in enumerate(stages, start=1):
            names = [f"layer{stage}_{i}" for i in range(blocks)]
            rates = [rise * (done + i) for i in range(1, blocks + 1)]
            done += blocks
            first = block(
                planes,
                stride,
                first_dilation=dilation,
                dilation=new_dilation,
                stochastic_depth=rates[0],
                name=names[0],
            )
            x, dilation = first(x, train), new_dilation
            other = partial(block, planes, dilation=dilation)
            if self.scan_blocks and blocks > 1 and not self.is_initializing():
                x = self._scan(other(parent=None), stage, rates[1:], x, train)
            else:
                for name, rate in zip(names[1:], rates[1:], strict=True):
                    x = other(stochastic_depth=rate, name=name)(x, train)
            outputs[f"layer{stage}"] = x
        if self.block.preactivation and self.final_norm:
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
                precision="highest",
                name="fc",
            )(x)
            outputs["logits"] = x
        return outputs if features else x

    def _stem(self, x: Float[Array, "n h w c"], bn: Norm) -> Float[Array, "n oh ow co"]:
        """What comes before the first block, with submodules of the net itself."""
        planes = self.stem_width or self.widths[0]
        conv: dict[str, Any] = {"dtype": self.dtype, "standardize": self.weight_standardization}
        if self.cifar_stem:
            x = conv3x3(planes, **conv, name="conv1")(x)
        elif self.deep_stem:
            # torch.nn.Sequential's numbers; 2 and 5 are ReLU.
            half = planes // 2
            x = conv3x3(half // 4 * 3 if self.tiered_stem else half, 2, **conv, name="conv1_0")(x)
            x = relu(bn(name="conv1_1")(x))
            x = conv3x3(half, **conv, name="conv1_3")(x)
            x = relu(bn(name="conv1_4")(x))
            x = conv3x3(planes, **conv, name="conv1_6")(x)
        else:
            x = Conv(planes, 7, stride=2, **conv, name="conv1")(x)
        if not self.block.preactivation:
            x = bn(name="bn1")(x)
            x = relu(x)
        if self.cifar_stem:
            return x
        if self.stem_pool == "conv":
            x = conv3x3(planes, 2, **conv, name="maxpool_0")(x)
            return relu(bn(name="maxpool_1")(x))
        if self.antialias == "average":
            return avg_pool(x, 2)
        if self.antialias == "blur":
            return blur_pool(max_pool(x, 1), 2)
        return max_pool(x, 2, zeros=self.stem_pool == "max_of_zeros")

    def _strides_and_dilations(self) -> tuple[list[int], list[int]]:
        """Stride and dilation of each stage."""
        replaces = [False, *(self.replace_stride_with_dilation or ())]
        strides, dilations = [], []
        reduction, dilation = 1 if self.cifar_stem else 4, 1
        for stage, stride in enumerate(self.strides):
            dilates = reduction >= (self.output_stride or math.inf)
            if self.replace_stride_with_dilation:
                dilates = replaces[stage]
            if dilates:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            strides.append(stride)
            dilations.append(dilation)
        return strides, dilations

    def _check(self) -> None:
        """Raises ValueError where the fields make no sense; blocks check their own."""
        if not len(self.layers) == len(self.widths) == len(self.strides):
            raise ValueError(
                "layers, widths and strides have one entry a stage, not "
                f"{len(self.layers)}, {len(self.widths)} and {len(self.strides)}"
            )
        for name in ("layers", "widths", "strides"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} are at least 1, not {tuple(getattr(self, name))}")
        if self.cifar_stem and self.deep_stem:
            raise ValueError("cifar_stem and deep_stem are two stems: set one of them")
        if self.stem_width is not None and self.stem_width < 1 + self.deep_stem:
            raise ValueError(f"stem_width={self.stem_width} is too small for a stem")
        if self.tiered_stem and (not self.deep_stem or (self.stem_width or self.widths[0]) < 8):
            raise ValueError("tiered_stem is for deep_stem=True, of 8 channels or more")
        if self.stem_pool not in ("max", "max_of_zeros", "conv"):
            raise ValueError(
                f"stem_pool is 'max', 'max_of_zeros' or 'conv', not {self.stem_pool!r}"
            )
        if self.antialias not in ("none", *ANTIALIASED):
            raise ValueError(f"antialias is 'none', 'average' or 'blur', not {self.antialias!r}")
        if self.stem_pool != "max" and (self.cifar_stem or self.antialias != "none"):
            raise ValueError(f"stem_pool={self.stem_pool!r} needs a pooling without antialias")
        if self.eca and self.squeeze_excite:
            raise ValueError("squeeze_excite and eca are two attentions: set one of them")
        if not 0 < self.se_ratio <= 1:
            raise ValueError(f"se_ratio is above 0 and at most 1, not {self.se_ratio}")
        replaces = self.replace_stride_with_dilation
        if replaces is not None and len(replaces) != len(self.strides) - 1:
            raise ValueError(
                "replace_stride_with_dilation has one entry a stage but the first, not "
                f"{len(replaces)} for {len(self.strides)}"
            )
        if replaces is not None and self.output_stride is not None:
            raise ValueError("output_stride and replace_stride_with_dilation: set one of them")
        strides = [2**i for i in range(6) if self.cifar_stem or i >= 2]
        if self.output_stride is not None and self.output_stride not in strides:
            raise ValueError(f"output_stride is one of {strides}, not {self.output_stride}")
        if not callable(self.norm) and self.norm not in ("batch", "group"):
            raise ValueError(f"norm is 'batch', 'group' or makes a module, not {self.norm!r}")
        maker = getattr(self.norm, "func", self.norm)  # of a partial
        if isinstance(maker, type) and next(iter(inspect.signature(maker).parameters)) != "train":
            raise ValueError(
                f"norm is called with train first, which {maker.__name__} takes for something "
                "else: give it a function, def norm(train, *, dtype, name, zero_init=False)"
            )
        if self.norm != "batch" and self.bn_splits != 1:
            raise ValueError(f"bn_splits={self.bn_splits} is for norm='batch'")
        if callable(self.norm) and self.frozen:
            raise ValueError("frozen is for norm='batch' and 'group'")
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
        params = self.variables["params"]
        is_stacked = rest in params
        if is_stacked:
            found = len(jax.tree.leaves(params[rest])[0])
        else:
            found = sum(name in params for name in names)
        if found != len(names):
            raise ValueError(
                f"the variables are of another model: layer{stage} has {found + 1} blocks there, "
                f"not {len(names) + 1}"
            )

        def of_each(kind):
            variables = self.variables[kind]
            return (
                variables[rest] if is_stacked else stack_trees([variables[name] for name in names])
            )

        def run(x, of_one):
            variables, key, rate = of_one
            one = block if rate is None else block.clone(stochastic_depth=rate)
            rngs = None if key is None else {"dropout": key}
            x, updates = one.apply(variables, x, train, mutable=["batch_stats"], rngs=rngs)
            return x, updates.get("batch_stats")

        first = rest if is_stacked else names[0]
        kinds = [k for k in ("params", "batch_stats") if first in self.variables.get(k, {})]
        keys = scanned_rates = None
        if train and (self.dropout or self.stochastic_depth or self.has_rng("dropout")):
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
