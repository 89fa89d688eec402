"""Where in an image a net sees a class."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_resnet.models.layers import relu
from flax_resnet.models.resnet import ResNet
from flax_resnet.models.resnet9 import ResNet9
from flax_resnet.models.vgg import VGG, adaptive_average_pool


def class_activation_maps(
    model: nn.Module,
    variables: Any,
    x: Float[Array, "n h w c"],
    classes: Int[Array, " n"] | None = None,
) -> Float[Array, "n oh ow"]:
    """What each place of an image says for a class.

    Behind global average pooling it is exact: the mean of a map, with the classifier's bias
    added, is the logit (Zhou et al., Learning Deep Features for Discriminative Localization,
    CVPR 2016, arXiv:1512.04150, equation 2). So it is for `ResNet`. For `ResNet9` and `VGG` it is
    Grad-CAM of the last stage (Selvaraju et al., ICCV 2017, arXiv:1610.02391, equations 1 and 2),
    which is 0 where it would be negative.

    Args:
      model: a `ResNet`, `ResNet9` or `VGG` with a classifier.
      variables: {"params", "batch_stats"}, or {"params"} without BatchNorm.
      x: images as the model takes them, float [N, H, W, C].
      classes: int [N], one for each image; the most probable ones if None.

    Returns:
      float32 [N, H', W'], of the pixels of the last stage: 7x7 for `fr.resnet50()` and images of
      224x224.

    Raises:
      ValueError: if the model is of another class, or has no classifier.
    """
    if not isinstance(model, ResNet | ResNet9 | VGG):
        raise ValueError(
            f"class_activation_maps takes a ResNet, ResNet9 or VGG, not a {type(model).__name__}"
        )
    if not model.num_classes:
        raise ValueError("class_activation_maps takes a model with a classifier: num_classes=0")
    applied: Any = model.apply(
        variables,
        x,
        train=False,
        features=True,
        mutable=["intermediates"],
        # Of a pre-activation net, after whose last stage it stands.
        capture_intermediates=lambda module, _: module.path == ("bn",),
    )
    outputs, captured = applied
    last = outputs[[name for name in outputs if name.startswith("layer")][-1]]
    if "intermediates" in captured:
        last = relu(captured["intermediates"]["bn"]["__call__"][0])
    last = last.astype(jnp.float32)
    if classes is None:
        classes = outputs["logits"].argmax(-1)

    if isinstance(model, ResNet):
        # Not by indexing, which JAX refuses where the images lie on several devices.
        kernel = variables["params"]["fc"]["kernel"]
        chosen = jax.nn.one_hot(classes, kernel.shape[-1])
        weights = jnp.einsum("nk,ck->nc", chosen, kernel, precision="highest")
        return jnp.einsum("nhwc,nc->nhw", last, weights, precision="highest")

    def logits(last) -> Any:
        if isinstance(model, ResNet9):
            return 0.125 * last.max(axis=(1, 2)) @ variables["params"]["fc"]["kernel"]
        # A VGG without its stages is what follows them; 7x7 is no shape to take for [N, C, H, W].
        pooled = adaptive_average_pool(last, 7)
        return model.clone(layers=(), widths=()).apply(variables, pooled, train=False)

    def of_classes(last, classes):
        return jnp.take_along_axis(logits(last), classes[:, None], axis=-1).sum()

    weights = jax.grad(of_classes)(last, classes).mean(axis=(1, 2))  # Grad-CAM's alpha
    return relu(jnp.einsum("nhwc,nc->nhw", last, weights, precision="highest"))
