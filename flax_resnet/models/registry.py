"""All models by their names."""

import difflib
import os
from collections.abc import Callable
from functools import partial
from typing import Any, overload

from flax_resnet.models import resnet, resnet9, vgg
from flax_resnet.models.weights import pretrained

Model = resnet.ResNet | resnet9.ResNet9 | vgg.VGG

# Every variant that the three files define, in their order.
_MODELS: dict[str, Callable[..., Model]] = {
    name: value
    for module in (resnet, resnet9, vgg)
    for name, value in vars(module).items()
    if isinstance(value, partial) and not name.startswith("_")
}


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(_MODELS)


@overload
def create_model(name: str, *, weights: None = None, **fields) -> Model: ...
@overload
def create_model(
    name: str, *, weights: str | os.PathLike[str], **fields
) -> tuple[Model, dict[str, Any]]: ...
def create_model(
    name: str, *, weights: str | os.PathLike[str] | None = None, **fields
) -> Model | tuple[Model, dict[str, Any]]:
    """The model of that name, e.g. `create_model("cifar_resnet18", num_classes=100)`.

    Args:
      name: one of `list_models()`.
      weights: path of a `.safetensors`, `.pth` or `.pt` file, or id of a Hugging Face Hub
        repository, such as "timm/resnet18.a1_in1k". If they are for another number of
        classes, the classifier starts anew, and a warning in the log says so.
      **fields: fields of `ResNet` (but `block`), `ResNet9` or `VGG` to set: num_classes, ...

    Returns:
      The model; with `weights` (model, variables), as `from_torch` gives them.

    Raises:
      ValueError: if there is no such model, or the weights cannot be read or do not fit.
      TypeError: if it has no such field.
      ImportError: if the weights need torch or huggingface_hub, and it is not installed.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "fr.list_models() names all"
        raise ValueError(f"unknown model {name!r}: {hint}")
    model = _MODELS[name](**fields)
    return model if weights is None else (model, pretrained(model, weights))
