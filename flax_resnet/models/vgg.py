"""VGG, the nets without shortcuts that He et al. compare theirs with (their figure 3).

Simonyan and Zisserman, arXiv:1409.1556, as torchvision writes it: submodules are numbered
as in its `features` and `classifier`, and pooling brings every image to 7x7.
"""

import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flax_resnet.models.checks import checked
from flax_resnet.models.freezing import has_frozen_statistics
from flax_resnet.models.layers import BatchNorm, Dtype, conv3x3, relu, relu_from_output
from flax_resnet.models.pooling import max_pool2d


@checked
class VGG(nn.Module):
    """Stages of 3x3 convolutions, each with a 2x2 max-pool, and three linear layers.

    Called as `ResNet` is: `model.apply(variables, x, train=False)` gives float32 logits
    [N, num_classes]. Training takes `rngs={"dropout": key}` unless dropout is 0. Only nets
    with batch_norm have "batch_stats" among their variables.

    With `features=True` a dict comes back: "layer1", "layer2", ..., what each stage gives
    after its max-pool; "pooled", float32 [N, hidden], what the last linear layer takes; and
    "logits", if there is one.

    Attributes:
      layers: number of convolutions of each stage.
      num_classes: number of logits; 0 for no last layer, and "pooled" instead.
      batch_norm: put a BatchNorm after every convolution.
      widths: channels of each stage.
      hidden: width of the first two linear layers.
      dropout: share of the values that training sets to zero after each of these.
      bn_splits: see `BatchNorm`.
      frozen: see `ResNet`.
      dtype: of the computation.

    Raises (when called):
      TypeError, ValueError: as `ResNet`; and if x has less than 2 ** len(layers) pixels a side.
    """

    layers: Sequence[int]
    num_classes: int = 1000
    batch_norm: bool = False
    widths: Sequence[int] = (64, 128, 256, 512, 512)
    hidden: int = 4096
    dropout: float = 0.5
    bn_splits: int = 1
    frozen: Sequence[str] = ()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool, *, features: bool = False
    ) -> Float[Array, "n k"] | dict[str, Float[Array, "n ..."]]:
        self._check(x)
        conv = partial(conv3x3, bias_init=nn.initializers.zeros, dtype=self.dtype)
        frozen = partial(has_frozen_statistics, model_path=self.path, patterns=self.frozen)
        bn = partial(BatchNorm, train, splits=self.bn_splits, frozen=frozen, dtype=self.dtype)
        outputs = {}
        index = 0  # in torchvision's `features`, where ReLU and max-pool count too
        for stage, (convs, planes) in enumerate(zip(self.layers, self.widths, strict=True), 1):
            for _ in range(convs):
                x = conv(planes, name=f"features_{index}")(x)
                if self.batch_norm:
                    index += 1
                    x = bn(name=f"features_{index}")(x)
                x = relu(x) if self.batch_norm else relu_from_output(x)
                index += 2
            x = max_pool2d(x, 2)
            index += 1
            outputs[f"layer{stage}"] = x

        x = adaptive_average_pool(x, 7)
        # In the order of PyTorch's [N, C, H, W], which classifier.0.weight goes by.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], math.prod(x.shape[1:]))
        dense = partial(nn.Dense, kernel_init=nn.initializers.normal(0.01))
        for name in ("classifier_0", "classifier_3"):
            x = relu_from_output(dense(self.hidden, dtype=self.dtype, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        outputs["pooled"] = x
        if self.num_classes:
            last = dense(self.num_classes, dtype=x.dtype, precision="highest", name="classifier_6")
            x = last(x)
            outputs["logits"] = x
        return outputs if features else x

    def _check(self, x: jax.Array) -> None:
        if len(self.layers) != len(self.widths):
            raise ValueError(
                f"layers and widths have one entry a stage, not {len(self.layers)} "
                f"and {len(self.widths)}"
            )
        if min(x.shape[1:3]) < 2 ** len(self.layers):
            raise ValueError(
                f"{len(self.layers)} stages need images of {2 ** len(self.layers)} pixels, "
                f"not of {x.shape[1]}x{x.shape[2]}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is from 0 to below 1, not {self.dropout}")
        if self.bn_splits != 1 and not self.batch_norm:
            raise ValueError(f"bn_splits={self.bn_splits} is for batch_norm=True")


def adaptive_average_pool(
    x: Float[Array, "n h w c"], size: int
) -> Float[Array, "n {size} {size} c"]:
    """Means over size x size parts of every image, as torch.nn.AdaptiveAvgPool2d.

    Part i of n pixels goes from i * n / size, rounded down, to (i + 1) * n / size, rounded
    up; so neighbours may share pixels, and an image may be smaller than `size`.

    Args:
      x: [N, H, W, C].
      size: height and width of the result.

    Returns:
      [N, size, size, C].
    """
    dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    for axis in (1, 2):
        length = x.shape[axis]
        if length != size:
            weights = np.zeros((size, length))
            for i in range(size):
                part = slice(i * length // size, -(-(i + 1) * length // size))
                weights[i, part] = 1 / (part.stop - part.start)
            # tensordot puts the new axis last.
            means = jnp.tensordot(
                x.astype(wide), jnp.asarray(weights.T, wide), (axis, 0), precision="highest"
            )
            x = jnp.moveaxis(means, -1, axis)
    return x.astype(dtype)
