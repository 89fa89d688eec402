"""All models by their names."""

import difflib
from collections.abc import Callable
from functools import partial

from flax_resnet.models import resnet, vgg

# Every variant that the two files define, in their order.
_MODELS: dict[str, Callable[..., resnet.ResNet | vgg.VGG]] = {
    name: value
    for module in (resnet, vgg)
    for name, value in vars(module).items()
    if isinstance(value, partial) and not name.startswith("_")
}


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(_MODELS)


def create_model(name: str, **fields) -> resnet.ResNet | vgg.VGG:
    """The model of that name, e.g. `create_model("cifar_resnet18", num_classes=100)`.

    Args:
      name: one of `list_models()`.
      **fields: fields of `ResNet` or `VGG` to set: num_classes, dtype, ...

    Raises:
      ValueError: if there is no such model.
      TypeError: if it has no such field.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=3) or _MODELS
        raise ValueError(f"unknown model {name!r}: did you mean {', '.join(near)}?")
    return _MODELS[name](**fields)
