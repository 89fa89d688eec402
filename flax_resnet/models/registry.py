"""All models by their names."""

import difflib
import os
from typing import Any, overload

from flax_resnet.models.variants import VARIANTS, Model
from flax_resnet.models.weights import pretrained


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(VARIANTS)


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
      TypeError: if it has no such field, or weights is neither a path nor an id, or name no
        string.
      ImportError: if the weights need torch or huggingface_hub, and it is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is one of fr.list_models(), not {_short(name)}")
    if name not in VARIANTS:
        near = [known for known in VARIANTS if known.endswith(f"_{name}")]
        near = near or difflib.get_close_matches(name, VARIANTS, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "fr.list_models() names all"
        raise ValueError(f"unknown model {name!r}: {hint}")
    variant = VARIANTS[name]
    if not isinstance(weights, str | os.PathLike | None):
        hint = f"write {variant.with_weights()}"
        if hasattr(weights, "keys") or hasattr(weights, "state_dict"):
            hint = f"write fr.from_torch(fr.{name}(), model.state_dict())"
        raise TypeError(
            f"weights are a path or the id of a Hub repository, not {_short(weights)}: {hint}"
        )
    if channels is not None and weights is None:
        raise ValueError(f"channels={channels} goes with weights: without, a model takes any")
    if channels is not None and channels < 1:
        raise ValueError(f"channels is at least 1, not {channels}")
    model = variant.make(**fields)
    return model if weights is None else (model, pretrained(model, weights, channels))


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float) else f"a {type(value).__name__}"
