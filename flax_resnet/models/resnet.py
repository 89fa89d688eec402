"""Residual networks in Flax linen, in the order and with the names of PyTorch's.

He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, as
PyTorch writes it: the same submodule names, explicit symmetric padding, Kaiming
initialisation, and the stride of a Bottleneck on its 3x3 convolution.

Images are float [N, H, W, C]. Parameters and BatchNorm statistics are float32;
`dtype` is the type of the compute.
"""

from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_resnet.models.freezing import has_frozen_statistics
from flax_resnet.models.layers import (
    BatchNorm,
    Conv,
    Dtype,
    GroupNorm,
    Norm,
    SqueezeExcite,
    check_common,
    conv1x1,
    conv3x3,
    relu,
    uniform,
)
from flax_resnet.models.stacking import stack_trees


class ResidualBlock(nn.Module):
    """What all blocks have: their fields, their shortcut, and how the two paths meet.

    Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), expansion * planes]. A block
    of your own derives from this one or from one below, and calls `downsample` and `join`.

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
      squeeze_excite: end the residual branch with `SqueezeExcite`.
      stochastic_depth: probability that training leaves the residual branch of an example
        out; what stays is scaled up to keep the mean. Needs the rng "dropout".
      norm_layer: `BatchNorm` or `GroupNorm`, or a `functools.partial` of one.
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
                padding = [(0, -size % stride) for size in x.shape[1:3]]
                window = (stride, stride)
                # Flax takes what its annotation of padding does not allow.
                x = nn.avg_pool(x, window, window, padding, count_include_pad=False)  # pyright: ignore[reportArgumentType]
                stride = 1
        x = conv1x1(planes, stride, dtype=self.dtype, name=names[0])(x)
        return (
            x if self.preactivation else self.norm_layer(train, dtype=self.dtype, name=names[1])(x)
        )

    def join(
        self,
        branch: Float[Array, "n h w c"],
        shortcut: Float[Array, "n h w c"] | None,
        train: bool,
    ) -> Float[Array, "n h w c"]:
        """The sum of residual branch and shortcut, after what `squeeze_excite` and
        `stochastic_depth` do to the branch.
        """
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
        norm = partial(self.norm_layer, train, dtype=dtype)
        identity = self.downsample(x, train)

        out = conv3x3(self._width(), self.stride, dtype=dtype, name="conv1")(x)
        out = norm(name="bn1")(out)
        out = relu(out)

        out = conv3x3(self.planes, dtype=dtype, name="conv2")(out)
        out = norm(name="bn2", zero_init=self.zero_init_residual)(out)

        return relu(self.join(out, identity, train))


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
        norm = partial(self.norm_layer, train, dtype=dtype)
        identity = self.downsample(x, train)

        out = conv1x1(width, dtype=dtype, name="conv1")(x)
        out = norm(name="bn1")(out)
        out = relu(out)

        out = conv3x3(width, self.stride, groups=self.groups, dtype=dtype, name="conv2")(out)
        out = norm(name="bn2")(out)
        out = relu(out)

        out = conv1x1(self.planes * self.expansion, dtype=dtype, name="conv3")(out)
        out = norm(name="bn3", zero_init=self.zero_init_residual)(out)

        return relu(self.join(out, identity, train))


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
        norm = partial(self.norm_layer, train, dtype=dtype)

        out = relu(norm(name="bn1")(x))
        identity = self.downsample(out if self.changes_shape(x) else x, train)
        out = conv3x3(self._width(), self.stride, dtype=dtype, name="conv1")(out)

        out = relu(norm(name="bn2")(out))
        out = nn.Dropout(self.dropout, deterministic=not train)(out)
        out = conv3x3(self.planes, dtype=dtype, name="conv2")(out)

        return self.join(out, identity, train)


class PreActBottleneck(ResidualBlock):
    """`Bottleneck` in the order of `PreActBasicBlock`."""

    expansion: ClassVar[int] = 4
    preactivation: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n oh ow {4*self.planes}"]:
        width, dtype = self._width(), self.dtype
        norm = partial(self.norm_layer, train, dtype=dtype)

        out = relu(norm(name="bn1")(x))
        identity = self.downsample(out if self.changes_shape(x) else x, train)
        out = conv1x1(width, dtype=dtype, name="conv1")(out)

        out = relu(norm(name="bn2")(out))
        out = conv3x3(width, self.stride, groups=self.groups, dtype=dtype, name="conv2")(out)

        out = relu(norm(name="bn3")(out))
        out = conv1x1(self.planes * self.expansion, dtype=dtype, name="conv3")(out)

        return self.join(out, identity, train)


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
      stem_width: channels of the stem's output; None for those of the first stage.
      groups, width_per_group, squeeze_excite: see `ResidualBlock`.
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
        inside is not there. On a CPU where XLA does the convolutions (several
        devices, or no compiler) its steps are slow.
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
        self._check(x)
        frozen = partial(has_frozen_statistics, model_path=self.path, patterns=self.frozen)
        batch_norm = partial(BatchNorm, splits=self.bn_splits, frozen=frozen)
        norm = self.norm
        if isinstance(norm, str):
            norm = {"batch": batch_norm, "group": GroupNorm}[norm]
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
            norm_layer=norm,
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

    def _check(self, x: jax.Array) -> None:
        """Raises ValueError where x or the fields make no sense; blocks check their own."""
        check_common(self, x)
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
        if not callable(self.norm) and self.norm not in ("batch", "group"):
            raise ValueError(f"norm is 'batch', 'group' or makes a module, not {self.norm!r}")
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
        is_stacked = rest in self.variables["params"]

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

        kinds = [kind for kind in ("params", "batch_stats") if kind in self.variables]
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

# resnet18 ... resnet152 for 32x32 images and 10 classes.
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
