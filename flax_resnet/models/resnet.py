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

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_resnet.models.convolution import convolution

Dtype = Any

# torch.nn.init.kaiming_normal_(mode="fan_out", nonlinearity="relu")
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """Convolution of odd size, padded by half of it on every side, without bias.

    Attributes:
      planes: channels of the output.
      size: height and width of the kernel.
      stride: in both directions.
      dtype: type of the compute.
    """

    planes: int
    size: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.planes)
        kernel = self.param("kernel", kaiming_normal, shape, jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return convolution(x, kernel, stride=self.stride, padding=self.size // 2)


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
      zero_init: start the scale at zero instead of one.
      dtype: type of the output.
    """

    train: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    splits: int = 1
    zero_init: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = (x.shape[-1],)
        scale_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        scale = self.param("scale", scale_init, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)

        shape = x.shape
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        if self.train:
            x = x.reshape(self.splits, -1, *shape[1:])
            mean = x.mean((1, 2, 3))
            var = jnp.maximum(0, jnp.square(x).mean((1, 2, 3)) - jnp.square(mean))
            if not self.is_initializing():
                new = 1 - self.momentum
                running_mean.value = self.momentum * running_mean.value + new * mean.mean(0)
                running_var.value = self.momentum * running_var.value + new * var.mean(0)
        else:
            x, mean, var = x[None], running_mean.value[None], running_var.value[None]

        # One factor and one summand a channel: the gradient then needs no more of x than
        # x itself, where x - mean would be another array of its size to keep.
        factor = scale[None] * jax.lax.rsqrt(var + self.epsilon)
        summand = bias[None] - mean * factor
        x = x * factor[:, None, None, None] + summand[:, None, None, None]
        return x.reshape(shape).astype(self.dtype)


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), whose gradient is taken from its output, which the next layer keeps anyway."""
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
    out = relu(*primals)
    return out, jnp.where(out > 0, tangents[0], 0)


Norm = Callable[..., nn.Module]


def shortcut_connection(
    x: jax.Array, planes: int, stride: int, kind: str, *, train: bool, norm: Norm, dtype: Dtype
) -> jax.Array:
    """Brings a block's input to the shape of its output; x itself where that is its shape.

    Args:
      x: the block's input, [N, H, W, C].
      planes: channels of the block's output.
      stride: stride of the block.
      kind: "projection", a 1x1 convolution and BatchNorm (option B of He et al.
        section 4.1), or "identity", every stride-th pixel with zero channels added
        on both sides (option A), which has no parameters.
      train: whether BatchNorm uses the batch's statistics.
      norm: `BatchNorm`, with fields of its own set or not.
      dtype: type of the compute.

    Raises:
      ValueError: for another kind, or where "identity" would have to drop channels.
    """
    if kind not in ("projection", "identity"):
        raise ValueError(f"shortcut is 'projection' or 'identity', not {kind!r}")
    if stride == 1 and x.shape[-1] == planes:
        return x
    if kind == "projection":
        x = conv1x1(planes, stride, dtype=dtype, name="downsample_conv")(x)
        return norm(train, dtype=dtype, name="downsample_bn")(x)
    missing = planes - x.shape[-1]
    if missing < 0:
        raise ValueError(f"an identity shortcut cannot go from {x.shape[-1]} to {planes} channels")
    before = missing // 2
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, missing - before)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and 34.

    Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), planes].

    Attributes:
      planes: channels of both convolutions.
      stride: stride of the first one.
      shortcut: "projection" or "identity" where the shape changes; see
        `shortcut_connection`.
      zero_init_residual: start the scale of the last BatchNorm at zero, so that the
        block starts as the identity (Goyal et al., arXiv:1706.02677, section 5.1).
      norm: `BatchNorm`, with fields of its own set or not.
      dtype: type of the compute.
    """

    planes: int
    stride: int = 1
    shortcut: str = "projection"
    zero_init_residual: bool = False
    norm: Norm = BatchNorm
    dtype: Dtype = jnp.float32

    expansion: ClassVar[int] = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        out_planes = self.planes * self.expansion
        dtype = self.dtype
        norm = partial(self.norm, train, dtype=dtype)
        identity = shortcut_connection(
            x, out_planes, self.stride, self.shortcut, train=train, norm=self.norm, dtype=dtype
        )

        out = conv3x3(self.planes, self.stride, dtype=dtype, name="conv1")(x)
        out = norm(name="bn1")(out)
        out = relu(out)

        out = conv3x3(out_planes, dtype=dtype, name="conv2")(out)
        out = norm(name="bn2", zero_init=self.zero_init_residual)(out)

        return relu(out + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: the block of ResNet-50 and deeper.

    The stride sits on the 3x3 convolution, as in torchvision ("v1.5"). Maps
    [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), 4 * planes].

    Attributes:
      planes: channels of the first two convolutions; the third has 4 times as many.
      stride: stride of the 3x3 convolution.
      shortcut, zero_init_residual, norm, dtype: as in `BasicBlock`.
    """

    planes: int
    stride: int = 1
    shortcut: str = "projection"
    zero_init_residual: bool = False
    norm: Norm = BatchNorm
    dtype: Dtype = jnp.float32

    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        out_planes = self.planes * self.expansion
        dtype = self.dtype
        norm = partial(self.norm, train, dtype=dtype)
        identity = shortcut_connection(
            x, out_planes, self.stride, self.shortcut, train=train, norm=self.norm, dtype=dtype
        )

        out = conv1x1(self.planes, dtype=dtype, name="conv1")(x)
        out = norm(name="bn1")(out)
        out = relu(out)

        out = conv3x3(self.planes, self.stride, dtype=dtype, name="conv2")(out)
        out = norm(name="bn2")(out)
        out = relu(out)

        out = conv1x1(out_planes, dtype=dtype, name="conv3")(out)
        out = norm(name="bn3", zero_init=self.zero_init_residual)(out)

        return relu(out + identity)


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pooling and a linear classifier.

    `model.init(key, x, train=False)` gives {"params", "batch_stats"};
    `model.apply(variables, x, train=False)` gives float32 logits [N, num_classes];
    with `train=True` BatchNorm uses the batch's statistics, and
    `mutable=["batch_stats"]` returns the moved running ones beside the logits.

    Attributes:
      block: `BasicBlock` or `Bottleneck`.
      layers: number of blocks of each stage.
      num_classes: number of logits.
      zero_init_residual: see `BasicBlock`.
      widths: `planes` of each stage; the stem has the first stage's.
      strides: stride of the first block of each stage.
      cifar_stem: a 3x3 convolution with stride 1 for small images, in place of the
        7x7 convolution with stride 2 and the 3x3 max-pool with stride 2.
      shortcut: "projection" or "identity"; see `shortcut_connection`.
      scan_blocks: run the blocks of a stage but the first under `lax.scan`, so that the
        time to compile does not grow with their number. The variables have the same
        names and values either way; see also `stack_blocks`. For GPU and TPU: XLA:CPU
        is slow in loops.
      bn_splits: see `BatchNorm`.
      dtype: type of the compute, e.g. jnp.bfloat16 on GPU and TPU.

    Raises (when called):
      ValueError: if x is not 4-dimensional, or layers, widths and strides differ in
        length.
    """

    block: type[BasicBlock] | type[Bottleneck]
    layers: Sequence[int]
    num_classes: int = 1000
    zero_init_residual: bool = False
    widths: Sequence[int] = (64, 128, 256, 512)
    strides: Sequence[int] = (1, 2, 2, 2)
    cifar_stem: bool = False
    shortcut: str = "projection"
    scan_blocks: bool = False
    bn_splits: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if x.ndim != 4:
            raise ValueError(f"images are [N, H, W, C], not of shape {x.shape}")
        if not len(self.layers) == len(self.widths) == len(self.strides):
            raise ValueError(
                "layers, widths and strides have one entry a stage, not "
                f"{len(self.layers)}, {len(self.widths)} and {len(self.strides)}"
            )

        norm = partial(BatchNorm, splits=self.bn_splits)
        if self.cifar_stem:
            x = conv3x3(self.widths[0], dtype=self.dtype, name="conv1")(x)
        else:
            x = Conv(self.widths[0], 7, stride=2, dtype=self.dtype, name="conv1")(x)
        x = norm(train, dtype=self.dtype, name="bn1")(x)
        x = relu(x)
        if not self.cifar_stem:
            # Flax takes what its annotation of padding does not allow.
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]

        stages = zip(self.layers, self.widths, self.strides, strict=True)
        for stage, (blocks, planes, stride) in enumerate(stages, start=1):
            block = partial(
                self.block,
                planes,
                shortcut=self.shortcut,
                zero_init_residual=self.zero_init_residual,
                norm=norm,
                dtype=self.dtype,
            )
            x = block(stride, name=f"layer{stage}_0")(x, train=train)
            if self.scan_blocks and blocks > 1 and not self.is_initializing():
                x = self._scan(block(parent=None), stage, blocks, x, train)
            else:
                for i in range(1, blocks):
                    x = block(name=f"layer{stage}_{i}")(x, train=train)

        # Pooling and the classifier cost next to nothing: never in half precision.
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32)).mean(axis=(1, 2))
        return nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            bias_init=_uniform(x.shape[-1] ** -0.5),
            dtype=x.dtype,
            name="fc",
        )(x)

    def _scan(
        self, block: nn.Module, stage: int, blocks: int, x: jax.Array, train: bool
    ) -> jax.Array:
        """Runs the blocks of a stage but the first in a `lax.scan` over their variables.

        These are stacked for it, unless they come as `stack_blocks` leaves them.
        """
        rest = f"layer{stage}_rest"
        names = [f"layer{stage}_{i}" for i in range(1, blocks)]
        is_stacked = rest in self.variables["params"]

        def of_each(kind):
            variables = self.variables[kind]
            return variables[rest] if is_stacked else _stack([variables[name] for name in names])

        def run(x, variables):
            x, updates = block.apply(variables, x, train=train, mutable=["batch_stats"])
            return x, updates["batch_stats"]

        x, batch_stats = jax.lax.scan(
            run, x, {kind: of_each(kind) for kind in ("params", "batch_stats")}
        )
        if train and is_stacked:
            self.put_variable("batch_stats", rest, batch_stats)
        elif train:
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


def _uniform(limit: float) -> Callable[..., jax.Array]:
    """Initialiser on [-limit, limit): torch.nn.Linear's, with limit = fan_in ** -0.5."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


# He et al. table 1: 224x224 images, 1000 classes.
resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet34 = partial(ResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3))
resnet101 = partial(ResNet, Bottleneck, (3, 4, 23, 3))
resnet152 = partial(ResNet, Bottleneck, (3, 8, 36, 3))

# The same for 32x32 images and 10 classes.
cifar_resnet18 = partial(resnet18, num_classes=10, cifar_stem=True)
cifar_resnet34 = partial(resnet34, num_classes=10, cifar_stem=True)
cifar_resnet50 = partial(resnet50, num_classes=10, cifar_stem=True)
cifar_resnet101 = partial(resnet101, num_classes=10, cifar_stem=True)
cifar_resnet152 = partial(resnet152, num_classes=10, cifar_stem=True)

# He et al. section 4.2: 6n + 2 layers in three stages, shortcuts without parameters.
_he_cifar = partial(
    ResNet,
    BasicBlock,
    num_classes=10,
    widths=(16, 32, 64),
    strides=(1, 2, 2),
    cifar_stem=True,
    shortcut="identity",
)
cifar_resnet8 = partial(_he_cifar, (1, 1, 1))
cifar_resnet20 = partial(_he_cifar, (3, 3, 3))
cifar_resnet32 = partial(_he_cifar, (5, 5, 5))
cifar_resnet44 = partial(_he_cifar, (7, 7, 7))
cifar_resnet56 = partial(_he_cifar, (9, 9, 9))
cifar_resnet110 = partial(_he_cifar, (18, 18, 18))
cifar_resnet1202 = partial(_he_cifar, (200, 200, 200))

# The CIFAR-10 net of the lesson "Lab10-6: ResNet" (Deep Learning Zero To All, season 2).
lab10_resnet50 = partial(
    ResNet,
    Bottleneck,
    (3, 4, 6, 3),
    num_classes=10,
    widths=(16, 32, 64, 128),
    strides=(1, 1, 2, 2),
    cifar_stem=True,
)

_MODELS: dict[str, Callable[..., ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "cifar_resnet18": cifar_resnet18,
    "cifar_resnet34": cifar_resnet34,
    "cifar_resnet50": cifar_resnet50,
    "cifar_resnet101": cifar_resnet101,
    "cifar_resnet152": cifar_resnet152,
    "cifar_resnet8": cifar_resnet8,
    "cifar_resnet20": cifar_resnet20,
    "cifar_resnet32": cifar_resnet32,
    "cifar_resnet44": cifar_resnet44,
    "cifar_resnet56": cifar_resnet56,
    "cifar_resnet110": cifar_resnet110,
    "cifar_resnet1202": cifar_resnet1202,
    "lab10_resnet50": lab10_resnet50,
}


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(_MODELS)


def create_model(name: str, **fields) -> ResNet:
    """The model of that name, e.g. `create_model("cifar_resnet18", num_classes=100)`.

    Args:
      name: one of `list_models()`.
      **fields: fields of `ResNet` to set: num_classes, dtype, zero_init_residual, ...

    Raises:
      ValueError: if there is no such model.
      TypeError: if `ResNet` has no such field.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=3) or _MODELS
        raise ValueError(f"unknown model {name!r}: did you mean {', '.join(near)}?")
    return _MODELS[name](**fields)
