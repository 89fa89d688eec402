"""What is said of mistakes in calling a model, in place of Flax's and Python's own errors.

It says what came, what is expected, and what to write. Shapes and names are known while a call is
traced, so that none of it is left in what is compiled.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors
from flax.traverse_util import flatten_dict

from flax_resnet.models.freezing import unmatched
from flax_resnet.models.stacking import is_stacked

_SHOWN = 5  # of a list of names

_EVALUATION = "model.apply(variables, x, train=False)"
_TRAINING = 'logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])'
_UNBOUND = (
    "a model holds no variables: write variables = model.init(key, x, train=False), then "
    f"{_EVALUATION}. Inside a module make it one of its fields, or call "
    'model.clone(parent=self, name="backbone")(x, train)'
)
_VARIABLES = 'variables are {"params": ..., "batch_stats": ...}, as model.init gives them'
# Where a net's first convolution and its classifier may be.
_FIRST = ("conv1", "conv1_0", "features_0")
_LAST = ("fc", "classifier_6")

M = TypeVar("M", bound=nn.Module)


def some(names: Iterable[Any]) -> str:
    """The first few names, and how many more there are."""
    listed = [str(name) for name in names]
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def checked(model: type[M]) -> type[M]:
    """The class of a model [N, H, W, C] -> logits, whose calls say what is wrong with them."""
    call: Callable[..., Any] = model.__call__

    @functools.wraps(call)
    def checked_call(self: M, *args: Any, **kwargs: Any) -> Any:
        if self.scope is None:
            raise TypeError(_UNBOUND)
        if "train" not in kwargs and len(args) < 2:
            name = type(self).__name__
            raise TypeError(f"{name} has to be told whether it trains: write {_EVALUATION}")
        x: Any = args[0] if args else kwargs.get("x")
        _check_images(x)
        _check_fields(self)
        try:
            output = call(self, *args, **kwargs)
        except errors.FlaxError as error:
            if line := _what_to_write(self, x, error):
                raise ValueError(line) from error
            raise
        _check_frozen(self)
        return output

    model.__call__ = checked_call
    return model


def _check_fields(model: Any) -> None:
    """Raises ValueError for values that make no sense in a ResNet, a ResNet9 or a VGG."""
    if not isinstance(getattr(model, "block", type), type):
        raise ValueError(f"block is a class such as fr.BasicBlock, not {_a(model.block)}")
    for name in ("layers", "widths", "strides"):
        value = getattr(model, name, ())
        if not hasattr(value, "__len__") or isinstance(value, str):
            raise ValueError(f"{name} is a tuple with one entry a stage, not {value!r}")
    if not hasattr(model.num_classes, "__index__"):
        raise ValueError(f"num_classes is a whole number, not {model.num_classes!r}")
    if model.num_classes < 0:
        raise ValueError(f"num_classes is 0 for no classifier, or more: not {model.num_classes}")
    if isinstance(model.frozen, str):  # of which each letter would be a name
        raise ValueError(f"frozen is a sequence of names, not {model.frozen!r}")
    if not _is_floating(model.dtype):
        raise ValueError(f"dtype is a float type such as jnp.bfloat16, not {model.dtype!r}")


def _check_frozen(model: Any) -> None:
    """Raises ValueError for names of nothing, once the model has its variables."""
    if not model.frozen:
        return
    trees = {kind: model.variables.get(kind, {}) for kind in ("params", "batch_stats")}
    paths: list[Any] = list(flatten_dict(trees))
    if not model.num_classes:  # names of the classifier may be there all the same
        paths += [("params", name, array) for name in _LAST for array in ("kernel", "bias")]
    for name, hint in unmatched(model.frozen, paths):
        raise ValueError(f"frozen: nothing in the model is called {name!r}: {hint}")


def _is_floating(dtype: Any) -> bool:
    try:
        return dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:  # no dtype at all
        return False


def check_model(model: Any, line: str) -> None:
    """Raises TypeError for what is no model, with the line to write."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str):
        line = f'fr.create_model("{model}")'
    elif callable(model) and hasattr(model, "__name__"):
        line = f"fr.{model.__name__}()"
    raise TypeError(f"a model is a flax.linen.Module, not {_a(model)}: write {line}")


def check_variables(variables: Any) -> None:
    """Raises ValueError for what has no "params"."""
    if not hasattr(variables, "keys") or "params" not in variables:
        names = f" of {some(variables)}" if hasattr(variables, "keys") else ""
        raise ValueError(f"{_VARIABLES}, not {_a(variables)}{names}: give it all of them")


def _check_images(x: Any) -> None:
    if hasattr(x, "detach"):
        raise TypeError("images are an array of JAX or NumPy, not a torch.Tensor: write x.numpy()")
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"images are one array [N, H, W, C], not {_a(x)}: write jnp.asarray(x)")
    if x.ndim != 4:
        hint = ": write x[None] for one image" if x.ndim == 3 else ""
        raise ValueError(f"images are [N, H, W, C], not of shape {x.shape}{hint}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"images are normalised floats, not {x.dtype}: write "
            "flax_resnet.data.normalize(x, mean, std)"
        )
    if _looks_like_nchw(x.shape):
        raise ValueError(_nchw(x))


def _looks_like_nchw(shape: Sequence[int]) -> bool:
    """Three rows of many pixels with many channels each are no image, but three channels are."""
    _, channels, height, width = shape
    if not all(isinstance(size, int) for size in (channels, height, width)):
        return False  # sizes that an export leaves open
    is_square = height == width and channels in (1, 4)
    return min(height, width) >= 16 and (channels == 3 or is_square)


def _nchw(x: jax.Array) -> str:
    return (
        f"images are [N, H, W, C], and {x.shape} looks like [N, C, H, W]: write "
        "x.transpose(0, 2, 3, 1)"
    )


def _what_to_write(model: nn.Module, x: jax.Array, error: errors.FlaxError) -> str | None:
    """In place of an error of Flax; None where that says it all."""
    if isinstance(error, errors.ModifyScopeVariableError) and '"batch_stats"' in str(error):
        return f"training moves the running statistics of BatchNorm: write {_TRAINING}"
    if isinstance(error, errors.InvalidRngError) and '"dropout"' in str(error):
        end = _TRAINING.removesuffix(")")
        return f'training draws random numbers here: write {end}, rngs={{"dropout": key}})'
    variables = model.variables
    if "params" not in variables:
        names = some(variables) or "nothing"
        return f"{_VARIABLES}, not a dict of {names}: write {_EVALUATION}"
    if isinstance(error, errors.ScopeCollectionNotFound) and "batch_stats" not in variables:
        return (
            'the variables lack "batch_stats", the statistics of BatchNorm: write '
            'model.apply({"params": params, "batch_stats": batch_stats}, x, train=False)'
        )
    if isinstance(error, errors.ScopeParamShapeError | errors.ScopeParamNotFoundError):
        return _of_another_model(model, x, variables["params"], error)
    return None


def _of_another_model(model: Any, x: jax.Array, params: Any, error: errors.FlaxError) -> str:
    if any(is_stacked((name,)) for name in params) and not getattr(model, "scan_blocks", True):
        return (
            "the blocks are stacked, for scan_blocks=True: write fr.unstack_blocks(variables), or "
            "model.clone(scan_blocks=True)"
        )
    kernels = {name: layer["kernel"] for name, layer in params.items() if "kernel" in layer}
    channels = next((kernels[name].shape[-2] for name in _FIRST if name in kernels), x.shape[-1])
    if channels != x.shape[-1]:
        if channels == x.shape[1]:
            return _nchw(x)
        hint = "init the model with such images"
        if x.shape[-1] == 1:
            hint = f"write x.repeat({channels}, axis=-1)"
        return f"the variables are for {channels} channels, not images of {x.shape[-1]}: {hint}"
    classes = next((kernels[name].shape[-1] for name in _LAST if name in kernels), 0)
    if classes != model.num_classes:
        return (
            f"the variables are for {classes} classes, not {model.num_classes}: write "
            f"model.clone(num_classes={classes}), or init the model anew"
        )
    reason = str(error).partition(" (http")[0]
    return f"the variables are of another model: {reason[0].lower()}{reason[1:]}"


def _a(value: Any) -> str:
    return f"a {type(value).__name__}"
