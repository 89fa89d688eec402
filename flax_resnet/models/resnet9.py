"""ResNet-9, a small wide net for short trainings on CIFAR-10.

After the nets with which D. Page won DAWNBench's CIFAR-10 training ("How to Train Your
ResNet", 2018 and 2019), with pooling before BatchNorm as in part 8 of it; the residual
branches are `BasicBlock`s.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_resnet.models.checks import checked
from flax_resnet.models.freezing import has_frozen_statistics
from flax_resnet.models.layers import BatchNorm, Dtype, conv3x3, relu, uniform
from flax_resnet.models.pooling import max_pool2d
from flax_resnet.models.resnet import BasicBlock


@checked
class ResNet9(nn.Module):
    """A 3x3 convolution, three stages, the maximum of each channel and a linear classifier.

    A stage is a 3x3 convolution, a 2x2 max-pool, BatchNorm and ReLU; the first and the last
    of them end with a `BasicBlock`. Logits are an eighth of what the classifier gives.

    Called as `ResNet` is. With `features=True` a dict comes back: "stem", [N, H, W, C];
    "layer1", "layer2" and "layer3", what each stage gives; "pooled", float32 [N, C]; and
    "logits", if there is a classifier.

    Attributes:
      num_classes: number of logits; 0 for no classifier, and the pooled features instead.
      widths: channels of the first convolution and of each stage.
      bn_splits: see `BatchNorm`.
      frozen: see `ResNet`.
      dtype: of the computation.

    Raises (when called):
      TypeError, ValueError: as `ResNet`; and if x has less than 8 pixels a side.
    """

    num_classes: int = 10
    widths: Sequence[int] = (64, 128, 256, 512)
    bn_splits: int = 1
    frozen: Sequence[str] = ()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool, *, features: bool = False
    ) -> Float[Array, "n k"] | dict[str, Float[Array, "n ..."]]:
        self._check(x)
        conv = partial(conv3x3, dtype=self.dtype)
        frozen = partial(has_frozen_statistics, model_path=self.path, patterns=self.frozen)
        norm = partial(BatchNorm, splits=self.bn_splits, frozen=frozen)
        bn = partial(norm, train, dtype=self.dtype)
        outputs = {}

        x = relu(bn(name="bn1")(conv(self.widths[0], name="conv1")(x)))
        outputs["stem"] = x
        for stage, planes in enumerate(self.widths[1:], start=1):
            x = max_pool2d(conv(planes, name=f"conv{stage + 1}")(x), 2)
            x = relu(bn(name=f"bn{stage + 1}")(x))
            if stage != 2:
                block = BasicBlock(planes, norm_layer=norm, dtype=self.dtype, name=f"block{stage}")
                x = block(x, train)
            outputs[f"layer{stage}"] = x

        x = x.astype(jnp.promote_types(self.dtype, jnp.float32)).max(axis=(1, 2))
        outputs["pooled"] = x
        if self.num_classes:
            x = 0.125 * nn.Dense(
                self.num_classes,
                use_bias=False,
                kernel_init=uniform(x.shape[-1] ** -0.5),
                dtype=x.dtype,
                precision="highest",
                name="fc",
            )(x)
            outputs["logits"] = x
        return outputs if features else x

    def _check(self, x: jax.Array) -> None:
        if min(x.shape[1:3]) < 8:
            raise ValueError(f"images have 8 pixels a side or more, not {x.shape[1]}x{x.shape[2]}")
        if len(self.widths) != 4:
            raise ValueError(f"widths are those of 4 parts, not {len(self.widths)}")
