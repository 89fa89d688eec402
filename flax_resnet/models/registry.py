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
    name: str, *, weights: str | os.PathLike[str], channels: int | None = None, **fields
) -> tuple[Model, dict[str, Any]]: ...
def create_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    channels: int | None = None,
    **fields,
) -> Model | tuple[Model, dict[str, Any]]:
    """The model of that name, e.g. `create_model("cifar_resnet18", num_classes=100)`.

    Args:
      name: one of `list_models()`.
      weights: path of a file that PyTorch, timm or `save_weights` has written, or id of a
        Hugging Face Hub repository, such as "timm/resnet18.a1_in1k"; see `read_state_dict`.
        If they are for another number of classes, the classifier starts anew, and a warning
        in the log says so.
      channels: of the images that the weights shall be for, e.g. 1 for gray ones; None for
        those that they are for. For another number the first convolution is adapted, as timm
        does, and a warning in the log says so. Without weights a model takes any.
      **fields: fields of `ResNet` (but `block`), `ResNet9` or `VGG` to set: num_classes, ...

    Returns:
      The model; with `weights` (model, variables), as `from_torch` gives them.

    Raises:
      ValueError: if there is no such model, or the weights cannot be read or do not fit.
      TypeError: if it has no such field, or weights is neither a path nor an id.
      ImportError: if the weights need torch or huggingface_hub, and it is not installed.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "fr.list_models() names all"
        raise ValueError(f"unknown model {name!r}: {hint}")
    published = f'fr.create_model("{name}", weights="timm/{name}.a1_in1k")'
    if "pretrained" in fields:
        raise TypeError(f"{name} has no field 'pretrained': weights are named, as in {published}")
    if not isinstance(weights, str | os.PathLike | None):
        hint = f"write {published}"
        if hasattr(weights, "keys") or hasattr(weights, "state_dict"):
            hint = f"write fr.from_torch(fr.{name}(), model.state_dict())"
        raise TypeError(
            f"weights are a path or the id of a Hub repository, not {_short(weights)}: {hint}"
        )
    if channels is not None and weights is None:
        raise ValueError(f"channels={channels} goes with weights: without, a model takes any")
    if channels is not None and channels < 1:
        raise ValueError(f"channels is at least 1, not {channels}")
    model = _MODELS[name](**fields)
    return model if weights is None else (model, pretrained(model, weights, channels))


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float) else f"a {type(value).__name__}"
