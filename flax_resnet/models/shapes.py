"""Shapes of a model's variables, without computing them."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Height and width that are enough for a net of ten stages.
ENOUGH = (1024, 1024)


def variable_shapes(model: nn.Module, image_shape: Sequence[int] = (*ENOUGH, 3)) -> Any:
    """The variables that `model.init` gives, as `jax.ShapeDtypeStruct`s.

    Args:
      model: takes images [N, H, W, C] and `train`.
      image_shape: (H, W, C). Of these only C decides the shapes; H and W are to be enough
        for the model.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
