"""timm's nets, the reference, without torchvision, of which no build loads beside a CPU's PyTorch.

timm wants it for data and for one layer that ResNets do not have. Here empty classes stand in.
"""

import importlib
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from typing import Any

_IMPORTED = """
    models models.feature_extraction ops ops.misc transforms transforms.functional datasets utils
"""


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _EmptyModule(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


def load_timm() -> Any:
    """The module timm.

    Raises:
      ImportError: if it is not installed.
    """
    if "timm" not in sys.modules:
        names = ["torchvision", *(f"torchvision.{name}" for name in _IMPORTED.split())]
        modules = {name: _EmptyModule(name) for name in names}
        for name, module in modules.items():
            module.__path__ = []  # a package
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, module)
        kept = {name: sys.modules.get(name) for name in names}
        sys.modules.update(modules)
        try:
            with warnings.catch_warnings(action="ignore"):
                importlib.import_module("timm")
        finally:
            for name, module in kept.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module
    return sys.modules["timm"]
