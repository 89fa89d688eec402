"""The nets that have names: a row for each, and what makes a function of it.

A row has the name, the class or the net whose fields are the start, millions of parameters,
10^9 multiply-adds for one image, the published weights that fit, and the fields that differ.
`timm:a1_in1k` after the name "resnet18" is the Hub's "timm/resnet18.a1_in1k".
"""

import difflib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from flax_resnet.models.resnet import (
    BasicBlock,
    Bottleneck,
    PreActBasicBlock,
    PreActBottleneck,
    ResidualBlock,
    ResNet,
)
from flax_resnet.models.resnet9 import ResNet9
from flax_resnet.models.vgg import VGG

__all__ = [
    "cifar_plain20",
    "cifar_plain32",
    "cifar_plain44",
    "cifar_plain56",
    "cifar_preact_resnet18",
    "cifar_preact_resnet164",
    "cifar_preact_resnet1001",
    "cifar_resnet8",
    "cifar_resnet9",
    "cifar_resnet18",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet34",
    "cifar_resnet44",
    "cifar_resnet50",
    "cifar_resnet56",
    "cifar_resnet101",
    "cifar_resnet110",
    "cifar_resnet152",
    "cifar_resnet1202",
    "cifar_wrn16_8",
    "cifar_wrn28_10",
    "ecaresnet26t",
    "ecaresnet50d",
    "ecaresnet50t",
    "ecaresnet101d",
    "ecaresnet269d",
    "ecaresnetlight",
    "lab10_resnet50",
    "plain18",
    "plain34",
    "resnet10t",
    "resnet14t",
    "resnet18",
    "resnet18d",
    "resnet26",
    "resnet26d",
    "resnet26t",
    "resnet34",
    "resnet34d",
    "resnet50",
    "resnet50_gn",
    "resnet50c",
    "resnet50d",
    "resnet50s",
    "resnet101",
    "resnet101c",
    "resnet101d",
    "resnet101s",
    "resnet152",
    "resnet152c",
    "resnet152d",
    "resnet152s",
    "resnet200d",
    "resnetaa50",
    "resnetaa50d",
    "resnetaa101d",
    "resnetblur50",
    "resnetrs50",
    "resnetrs101",
    "resnetrs152",
    "resnetrs200",
    "resnetrs270",
    "resnetrs350",
    "resnetrs420",
    "resnetv2_18",
    "resnetv2_18d",
    "resnetv2_34",
    "resnetv2_34d",
    "resnetv2_50",
    "resnetv2_50d_gn",
    "resnetv2_50x1_bit",
    "resnetv2_50x3_bit",
    "resnetv2_101",
    "resnetv2_101x1_bit",
    "resnetv2_101x3_bit",
    "resnetv2_152x2_bit",
    "resnetv2_152x4_bit",
    "resnext50_32x4d",
    "resnext50d_32x4d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_32x16d",
    "resnext101_32x32d",
    "resnext101_64x4d",
    "seresnet18",
    "seresnet34",
    "seresnet50",
    "seresnet101",
    "seresnet152",
    "seresnet152d",
    "seresnext26d_32x4d",
    "seresnext26t_32x4d",
    "seresnext50_32x4d",
    "seresnext101_32x4d",
    "seresnext101_32x8d",
    "seresnext101_64x4d",
    "seresnext101d_32x8d",
    "seresnextaa101d_32x8d",
    "seresnextaa201d_32x8d",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

Model = ResNet | ResNet9 | VGG
M = TypeVar("M", ResNet, ResNet9, VGG)


@dataclass(frozen=True)
class Variant:
    """A named net.

    Attributes:
      name: of the function that makes it.
      make: that function.
      model: the class that it makes an object of.
      fields: the fields that differ from those of the class.
      parameters: how many it has, in millions, with the classes and channels that it has.
      multiply_adds: of its convolutions and linear layers for one image, in 10^9.
      pixels: height and width of that image.
      paper: where it comes from.
      weights: whose published weights fit; "" for nobody's that we know of.
    """

    name: str
    make: Callable[..., Model]
    model: type[Model]
    fields: Mapping[str, Any]
    parameters: float
    multiply_adds: float
    pixels: int
    paper: str
    weights: str

    def hub_id(self) -> str | None:
        """Published weights on the Hugging Face Hub."""
        _, has_some, tag = self.weights.partition("timm:")
        return f"timm/{self.name}.{tag}" if has_some else None

    def with_weights(self) -> str:
        """The line that makes the net with its published weights."""
        return f'fr.create_model("{self.name}", weights="{self.hub_id() or "PATH"}")'


# In the order in which they stand here.
VARIANTS: dict[str, Variant] = {}


def variant(
    name: str,
    start: Callable[..., M],
    parameters: float,
    multiply_adds: float,
    weights: str = "",
    *,
    paper: str,
    **fields: Any,
) -> Callable[..., M]:
    """The function of that name, which makes the net; and its entry in `VARIANTS`."""
    model: Any = start
    if (known := VARIANTS.get(start.__name__)) and known.make is start:
        model, fields = known.model, {**known.fields, **fields}

    def make(*values: Any, **changes: Any) -> M:
        if values:
            raise TypeError(_by_name(VARIANTS[name], values))
        for field in changes:
            if field not in signature.parameters and field != "parent":
                raise TypeError(_no_such_field(VARIANTS[name], field, signature))
        return model(**{**fields, **changes})

    signature = _signature(model, fields)
    pixels = 32 if name.startswith(("cifar", "lab10")) else 224
    entry = Variant(name, make, model, fields, parameters, multiply_adds, pixels, paper, weights)
    VARIANTS[name] = entry
    make.__name__ = make.__qualname__ = name
    make.__doc__ = _docstring(entry)
    make.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return make


def _signature(model: type, fields: Mapping[str, Any]) -> inspect.Signature:
    """The fields of a class that a variant takes, with the variant's defaults."""
    parameters = [
        parameter.replace(
            kind=inspect.Parameter.KEYWORD_ONLY, default=fields.get(name, parameter.default)
        )
        for name, parameter in inspect.signature(model).parameters.items()
        if name not in ("block", "parent")
    ]
    return inspect.Signature(parameters, return_annotation=model)


def _docstring(entry: Variant) -> str:
    differing = ", ".join(
        f"{name}={getattr(value, '__name__', repr(value))}" for name, value in entry.fields.items()
    )
    weights = f"{entry.weights or 'none that we know of'}."
    if entry.hub_id():
        others = "torchvision's and " if "torchvision" in entry.weights else ""
        weights = f"{others}timm's, as {entry.with_weights()}."
    model = entry.model.__name__
    parts = [
        f"{entry.paper}.",
        f"{entry.parameters:g} million parameters; {entry.multiply_adds:g} * 10^9 multiply-adds "
        f"for an image of {entry.pixels}x{entry.pixels} pixels.",
        f"Published weights that fit: {weights}",
        f"Args: any field of `{model}` by name, as in fr.{entry.name}(num_classes=10). Those that "
        f"this net sets: {differing or 'none'}.",
        f"Raises:\n  TypeError: if `{model}` has no such field, or for a value without a name.",
    ]
    return "\n\n".join(part if "\n" in part else textwrap.fill(part, 90) for part in parts)


def _by_name(entry: Variant, values: tuple[Any, ...]) -> str:
    said = f"{entry.name} takes its fields by name, not {', '.join(map(repr, values))}: write "
    if isinstance(values[0], int) and not isinstance(values[0], bool):
        return f"{said}fr.{entry.name}(num_classes={values[0]})"
    return said + entry.with_weights()


def _no_such_field(entry: Variant, field: str, signature: inspect.Signature) -> str:
    if field in ("pretrained", "weights"):
        hint = f"write {entry.with_weights()}"
    elif field == "block":
        hint = f"write fr.{entry.name}().clone(block=...)"
    elif near := difflib.get_close_matches(field, signature.parameters, n=1):
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"help(fr.{entry.name}) lists its fields"
    return f"{entry.name} has no field {field!r}: {hint}"


_he = partial(
    variant, paper="He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385"
)
_group = partial(variant, paper="Wu and He, Group Normalization, arXiv:1803.08494")
_wide = partial(variant, paper="Zagoruyko and Komodakis, Wide Residual Networks, arXiv:1605.07146")
_xie = partial(
    variant,
    paper="Xie et al., Aggregated Residual Transformations for DNNs, arXiv:1611.05431",
)
_bag = partial(
    variant,
    paper="He et al., Bag of Tricks for Image Classification with CNNs, arXiv:1812.01187",
)
_hu = partial(variant, paper="Hu et al., Squeeze-and-Excitation Networks, arXiv:1709.01507")
_wang = partial(variant, paper="Wang et al., ECA-Net, arXiv:1910.03151")
_zhang = partial(
    variant, paper="Zhang, Making Convolutional Networks Shift-Invariant Again, arXiv:1904.11486"
)
_bello = partial(variant, paper="Bello et al., Revisiting ResNets, arXiv:2103.07579")
_preact = partial(
    variant, paper="He et al., Identity Mappings in Deep Residual Networks, arXiv:1603.05027"
)
_kolesnikov = partial(variant, paper="Kolesnikov et al., Big Transfer (BiT), arXiv:1912.11370")
_lesson = partial(variant, paper="The lesson Lab10-6 of Deep Learning Zero To All, season 2")
_page = partial(variant, paper="D. Page, How to Train Your ResNet, 2018")
_vgg = partial(variant, paper="Simonyan and Zisserman, Very Deep Networks, arXiv:1409.1556")
# ResNet-D.
_D: dict[str, Any] = {"deep_stem": True, "shortcut": "average"}
# Three stages for 32x32 images and 10 classes, which papers on CIFAR have.
_THREE: dict[str, Any] = {
    "num_classes": 10,
    "widths": (16, 32, 64),
    "strides": (1, 2, 2),
    "cifar_stem": True,
}
_small = partial(_he, shortcut="identity", **_THREE)
_small_preact = partial(_preact, **_THREE)
_small_wide = partial(_wide, stem_width=16, **_THREE)
_AKAMASTER = "akamaster/pytorch_resnet_cifar10"


def _blocks(block: type[ResidualBlock], *layers: int) -> dict[str, Any]:
    return {"block": block, "layers": layers}


_basic, _bottleneck = partial(_blocks, BasicBlock), partial(_blocks, Bottleneck)
_preact_basic = partial(_blocks, PreActBasicBlock)
_preact_bottleneck = partial(_blocks, PreActBottleneck)


# He et al. table 1: 224x224 images, 1000 classes; 26 and 200 layers as in timm.
resnet18 = _he("resnet18", ResNet, 11.69, 1.81, "torchvision, timm:a1_in1k", **_basic(2, 2, 2, 2))
resnet34 = _he("resnet34", ResNet, 21.8, 3.66, "torchvision, timm:a1_in1k", **_basic(3, 4, 6, 3))
resnet26 = _he("resnet26", ResNet, 16.0, 2.34, "timm:bt_in1k", **_bottleneck(2, 2, 2, 2))
resnet50 = _he(
    "resnet50", ResNet, 25.56, 4.09, "torchvision, timm:a1_in1k", **_bottleneck(3, 4, 6, 3)
)
resnet101 = _he(
    "resnet101", ResNet, 44.55, 7.8, "torchvision, timm:a1_in1k", **_bottleneck(3, 4, 23, 3)
)
resnet152 = _he(
    "resnet152", ResNet, 60.19, 11.5, "torchvision, timm:a1_in1k", **_bottleneck(3, 8, 36, 3)
)

# The same with GroupNorm: Wu and He.
resnet50_gn = _group("resnet50_gn", resnet50, 25.56, 4.09, "timm:a1h_in1k", norm="group")

# Zagoruyko and Komodakis, table 8: twice as wide inside of the blocks.
wide_resnet50_2 = _wide(
    "wide_resnet50_2", resnet50, 68.88, 11.4, "torchvision, timm:racm_in1k", width_per_group=128
)
wide_resnet101_2 = _wide(
    "wide_resnet101_2", resnet101, 126.9, 22.8, "torchvision, timm:tv2_in1k", width_per_group=128
)

# Xie et al., table 1 and section 5.1, and wider ones after Mahajan et al., arXiv:1805.00932.
resnext50_32x4d = _xie(
    "resnext50_32x4d",
    resnet50,
    25.03,
    4.23,
    "torchvision, timm:a1_in1k",
    groups=32,
    width_per_group=4,
)
resnext101_32x4d = _xie(
    "resnext101_32x4d",
    resnet101,
    44.18,
    7.97,
    "timm:fb_ssl_yfcc100m_ft_in1k",
    groups=32,
    width_per_group=4,
)
resnext101_32x8d = _xie(
    "resnext101_32x8d",
    resnet101,
    88.79,
    16.4,
    "torchvision, timm:fb_ssl_yfcc100m_ft_in1k",
    groups=32,
    width_per_group=8,
)
resnext101_64x4d = _xie(
    "resnext101_64x4d",
    resnet101,
    83.46,
    15.5,
    "torchvision, timm:c1_in1k",
    groups=64,
    width_per_group=4,
)
resnext101_32x16d = _xie(
    "resnext101_32x16d",
    resnet101,
    194.0,
    36.2,
    "timm:fb_ssl_yfcc100m_ft_in1k",
    groups=32,
    width_per_group=16,
)
resnext101_32x32d = _xie(
    "resnext101_32x32d",
    resnet101,
    468.5,
    87.1,
    "timm:fb_wsl_ig1b_ft_in1k",
    groups=32,
    width_per_group=32,
)

# He et al., "Bag of Tricks", section 4.2: three convolutions in the stem (c; s are wider),
# shortcuts that average too (d), and a narrower first convolution (t), as in timm.
resnet50c = _bag("resnet50c", resnet50, 25.58, 4.33, "timm:gluon_in1k", deep_stem=True)
resnet101c = _bag("resnet101c", resnet101, 44.57, 8.04, "timm:gluon_in1k", deep_stem=True)
resnet152c = _bag("resnet152c", resnet152, 60.21, 11.8, "timm:gluon_in1k", deep_stem=True)
resnet50s = _bag(
    "resnet50s", resnet50, 25.68, 5.44, "timm:gluon_in1k", deep_stem=True, stem_width=128
)
resnet101s = _bag(
    "resnet101s", resnet101, 44.67, 9.16, "timm:gluon_in1k", deep_stem=True, stem_width=128
)
resnet152s = _bag(
    "resnet152s", resnet152, 60.32, 12.9, "timm:gluon_in1k", deep_stem=True, stem_width=128
)
resnet18d = _bag("resnet18d", resnet18, 11.71, 2.05, "timm:ra2_in1k", **_D)
resnet26d = _bag("resnet26d", resnet26, 16.01, 2.58, "timm:bt_in1k", **_D)
resnet34d = _bag("resnet34d", resnet34, 21.82, 3.9, "timm:ra2_in1k", **_D)
resnet50d = _bag("resnet50d", resnet50, 25.58, 4.33, "timm:a1_in1k", **_D)
resnet101d = _bag("resnet101d", resnet101, 44.57, 8.04, "timm:gluon_in1k", **_D)
resnet152d = _bag("resnet152d", resnet152, 60.21, 11.8, "timm:gluon_in1k", **_D)
resnet200d = _bag("resnet200d", resnet50d, 64.69, 15.2, "timm:ra2_in1k", layers=(3, 24, 36, 3))
resnet10t = _bag(
    "resnet10t", resnet18d, 5.435, 1.1, "timm:c3_in1k", layers=(1, 1, 1, 1), tiered_stem=True
)
resnet14t = _bag(
    "resnet14t", resnet50d, 10.08, 1.68, "timm:c3_in1k", layers=(1, 1, 1, 1), tiered_stem=True
)
resnet26t = _bag("resnet26t", resnet26d, 16.01, 2.55, "timm:ra2_in1k", tiered_stem=True)
resnext50d_32x4d = _bag("resnext50d_32x4d", resnext50_32x4d, 25.05, 4.47, "timm:bt_in1k", **_D)

# Hu et al., table 2, and its like in timm.
seresnet18 = _hu("seresnet18", resnet18, 11.78, 1.81, squeeze_excite=True)
seresnet34 = _hu("seresnet34", resnet34, 21.96, 3.66, squeeze_excite=True)
seresnet50 = _hu("seresnet50", resnet50, 28.09, 4.09, "timm:a1_in1k", squeeze_excite=True)
seresnet101 = _hu("seresnet101", resnet101, 49.33, 7.81, squeeze_excite=True)
seresnet152 = _hu("seresnet152", resnet152, 66.82, 11.5, squeeze_excite=True)
seresnet152d = _hu("seresnet152d", resnet152d, 66.84, 11.8, "timm:ra2_in1k", squeeze_excite=True)
seresnext26d_32x4d = _hu(
    "seresnext26d_32x4d",
    resnet26d,
    16.81,
    2.71,
    "timm:bt_in1k",
    groups=32,
    width_per_group=4,
    squeeze_excite=True,
)
seresnext26t_32x4d = _hu(
    "seresnext26t_32x4d",
    resnet26t,
    16.81,
    2.68,
    "timm:bt_in1k",
    groups=32,
    width_per_group=4,
    squeeze_excite=True,
)
seresnext50_32x4d = _hu(
    "seresnext50_32x4d", resnext50_32x4d, 27.56, 4.23, "timm:gluon_in1k", squeeze_excite=True
)
seresnext101_32x4d = _hu(
    "seresnext101_32x4d", resnext101_32x4d, 48.96, 7.97, "timm:gluon_in1k", squeeze_excite=True
)
seresnext101_32x8d = _hu(
    "seresnext101_32x8d", resnext101_32x8d, 93.57, 16.4, "timm:ah_in1k", squeeze_excite=True
)
seresnext101_64x4d = _hu(
    "seresnext101_64x4d", resnext101_64x4d, 88.23, 15.5, "timm:gluon_in1k", squeeze_excite=True
)
seresnext101d_32x8d = _hu(
    "seresnext101d_32x8d", seresnext101_32x8d, 93.59, 16.7, "timm:ah_in1k", **_D
)

# Wang et al.: ECA in timm's nets.
ecaresnet26t = _wang("ecaresnet26t", resnet26t, 16.01, 2.55, "timm:ra2_in1k", eca=True)
ecaresnet50d = _wang("ecaresnet50d", resnet50d, 25.58, 4.33, "timm:miil_in1k", eca=True)
ecaresnet50t = _wang(
    "ecaresnet50t", resnet50d, 25.57, 4.3, "timm:a1_in1k", tiered_stem=True, eca=True
)
ecaresnet101d = _wang("ecaresnet101d", resnet101d, 44.57, 8.04, "timm:miil_in1k", eca=True)
ecaresnet269d = _wang(
    "ecaresnet269d", resnet50d, 102.1, 20.3, "timm:ra2_in1k", layers=(3, 30, 48, 8), eca=True
)
ecaresnetlight = _wang(
    "ecaresnetlight",
    resnet50,
    30.16,
    4.09,
    "timm:miil_in1k",
    layers=(1, 1, 11, 3),
    shortcut="average",
    eca=True,
)

# Zhang: anti-aliased, by a blur or, in timm's resnetaa, by means.
resnetblur50 = _zhang("resnetblur50", resnet50, 25.56, 5.13, "timm:bt_in1k", antialias="blur")
resnetaa50 = _zhang("resnetaa50", resnet50, 25.56, 5.13, "timm:a1h_in1k", antialias="average")
resnetaa50d = _zhang(
    "resnetaa50d", resnet50d, 25.58, 5.37, "timm:sw_in12k_ft_in1k", antialias="average"
)
resnetaa101d = _zhang(
    "resnetaa101d", resnet101d, 44.57, 9.08, "timm:sw_in12k_ft_in1k", antialias="average"
)
seresnextaa101d_32x8d = _zhang(
    "seresnextaa101d_32x8d", seresnext101d_32x8d, 93.59, 17.2, "timm:ah_in1k", antialias="average"
)
seresnextaa201d_32x8d = _zhang(
    "seresnextaa201d_32x8d",
    seresnextaa101d_32x8d,
    149.4,
    34.3,
    "timm:sw_in12k_ft_in1k_384",
    layers=(3, 24, 36, 4),
    stem_width=128,
)

# Bello et al., table 5 (supplement), as in timm.
resnetrs50 = _bello(
    "resnetrs50",
    resnet50d,
    35.69,
    4.45,
    "timm:tf_in1k",
    squeeze_excite=True,
    se_ratio=0.25,
    stem_pool="conv",
)
resnetrs101 = _bello("resnetrs101", resnetrs50, 63.62, 8.18, "timm:tf_in1k", layers=(3, 4, 23, 3))
resnetrs152 = _bello("resnetrs152", resnetrs50, 86.62, 11.9, "timm:tf_in1k", layers=(3, 8, 36, 3))
resnetrs200 = _bello("resnetrs200", resnetrs50, 93.21, 15.4, "timm:tf_in1k", layers=(3, 24, 36, 3))
resnetrs270 = _bello("resnetrs270", resnetrs50, 129.9, 20.6, "timm:tf_in1k", layers=(4, 29, 53, 4))
resnetrs350 = _bello("resnetrs350", resnetrs50, 164.0, 26.3, "timm:tf_in1k", layers=(4, 36, 72, 4))
resnetrs420 = _bello("resnetrs420", resnetrs50, 191.9, 31.4, "timm:tf_in1k", layers=(4, 44, 87, 4))

# He et al. 2016 for 224x224 images, as in timm's resnetv2.py.
resnetv2_18 = _preact(
    "resnetv2_18", ResNet, 11.69, 1.81, "timm:ra4_e3600_r224_in1k", **_preact_basic(2, 2, 2, 2)
)
resnetv2_34 = _preact(
    "resnetv2_34", ResNet, 21.8, 3.66, "timm:ra4_e3600_r224_in1k", **_preact_basic(3, 4, 6, 3)
)
resnetv2_18d = _preact("resnetv2_18d", resnetv2_18, 11.71, 2.05, "timm:ra4_e3600_r224_in1k", **_D)
resnetv2_34d = _preact("resnetv2_34d", resnetv2_34, 21.82, 3.9, "timm:ra4_e3600_r224_in1k", **_D)
resnetv2_50 = _preact(
    "resnetv2_50", ResNet, 25.55, 4.09, "timm:a1h_in1k", **_preact_bottleneck(3, 4, 6, 3)
)
resnetv2_101 = _preact(
    "resnetv2_101", ResNet, 44.54, 7.8, "timm:a1h_in1k", **_preact_bottleneck(3, 4, 23, 3)
)
resnetv2_50d_gn = _preact(
    "resnetv2_50d_gn", resnetv2_50, 25.57, 4.33, "timm:ah_in1k", **_D, norm="group"
)

# Kolesnikov et al.: BiT, with weight standardization, GroupNorm, and the widths times 1 to 4.
resnetv2_50x1_bit = _kolesnikov(
    "resnetv2_50x1_bit",
    resnetv2_50,
    25.55,
    4.09,
    "timm:goog_distilled_in1k",
    norm="group",
    weight_standardization=True,
    stem_pool="max_of_zeros",
)
resnetv2_50x3_bit = _kolesnikov(
    "resnetv2_50x3_bit",
    resnetv2_50x1_bit,
    217.3,
    36.1,
    "timm:goog_in21k_ft_in1k",
    widths=(192, 384, 768, 1536),
)
resnetv2_101x1_bit = _kolesnikov(
    "resnetv2_101x1_bit",
    resnetv2_50x1_bit,
    44.54,
    7.8,
    "timm:goog_in21k_ft_in1k",
    layers=(3, 4, 23, 3),
)
resnetv2_101x3_bit = _kolesnikov(
    "resnetv2_101x3_bit",
    resnetv2_50x3_bit,
    387.9,
    69.5,
    "timm:goog_in21k_ft_in1k",
    layers=(3, 4, 23, 3),
)
resnetv2_152x2_bit = _kolesnikov(
    "resnetv2_152x2_bit",
    resnetv2_50x1_bit,
    236.3,
    45.8,
    "timm:goog_in21k_ft_in1k",
    layers=(3, 8, 36, 3),
    widths=(128, 256, 512, 1024),
)
resnetv2_152x4_bit = _kolesnikov(
    "resnetv2_152x4_bit",
    resnetv2_50x1_bit,
    936.5,
    183.0,
    "timm:goog_in21k_ft_in1k",
    layers=(3, 8, 36, 3),
    widths=(256, 512, 1024, 2048),
)

# He et al. figure 3 and table 2: the same layers without shortcuts.
plain18 = _he("plain18", resnet18, 11.52, 1.79, shortcut="none")
plain34 = _he("plain34", resnet34, 21.62, 3.64, shortcut="none")

# resnet18 ... resnet152 for 32x32 images and 10 classes.
cifar_resnet18 = _he("cifar_resnet18", resnet18, 11.17, 0.555, num_classes=10, cifar_stem=True)
cifar_resnet34 = _he("cifar_resnet34", resnet34, 21.28, 1.16, num_classes=10, cifar_stem=True)
cifar_resnet50 = _he("cifar_resnet50", resnet50, 23.52, 1.3, num_classes=10, cifar_stem=True)
cifar_resnet101 = _he("cifar_resnet101", resnet101, 42.51, 2.51, num_classes=10, cifar_stem=True)
cifar_resnet152 = _he("cifar_resnet152", resnet152, 58.16, 3.72, num_classes=10, cifar_stem=True)

# He et al. section 4.2: 6n + 2 layers in three stages, shortcuts without parameters.
cifar_resnet8 = _small("cifar_resnet8", ResNet, 0.07529, 0.0122, **_basic(1, 1, 1))
cifar_resnet20 = _small("cifar_resnet20", ResNet, 0.2697, 0.0406, _AKAMASTER, **_basic(3, 3, 3))
cifar_resnet32 = _small("cifar_resnet32", ResNet, 0.4642, 0.0689, _AKAMASTER, **_basic(5, 5, 5))
cifar_resnet44 = _small("cifar_resnet44", ResNet, 0.6586, 0.0972, _AKAMASTER, **_basic(7, 7, 7))
cifar_resnet56 = _small("cifar_resnet56", ResNet, 0.853, 0.125, _AKAMASTER, **_basic(9, 9, 9))
cifar_resnet110 = _small("cifar_resnet110", ResNet, 1.728, 0.253, _AKAMASTER, **_basic(18, 18, 18))
cifar_resnet1202 = _small(
    "cifar_resnet1202", ResNet, 19.42, 2.83, _AKAMASTER, **_basic(200, 200, 200)
)
cifar_plain20 = _small("cifar_plain20", cifar_resnet20, 0.2697, 0.0406, shortcut="none")
cifar_plain32 = _small("cifar_plain32", cifar_resnet32, 0.4642, 0.0689, shortcut="none")
cifar_plain44 = _small("cifar_plain44", cifar_resnet44, 0.6586, 0.0972, shortcut="none")
cifar_plain56 = _small("cifar_plain56", cifar_resnet56, 0.853, 0.125, shortcut="none")

# He et al. 2016: 9n + 2 layers (section 5), and the 18 layers from above, whose first block keeps
# the shape: its shortcut is the stem's output, not activated.
cifar_preact_resnet18 = _preact(
    "cifar_preact_resnet18",
    ResNet,
    11.17,
    0.555,
    **_preact_basic(2, 2, 2, 2),
    num_classes=10,
    cifar_stem=True,
)
cifar_preact_resnet164 = _small_preact(
    "cifar_preact_resnet164", ResNet, 1.703, 0.248, **_preact_bottleneck(18, 18, 18)
)
cifar_preact_resnet1001 = _small_preact(
    "cifar_preact_resnet1001", ResNet, 10.33, 1.49, **_preact_bottleneck(111, 111, 111)
)

# Zagoruyko and Komodakis, table 1: 6n + 4 layers, widened from 16/32/64.
cifar_wrn16_8 = _small_wide(
    "cifar_wrn16_8", ResNet, 10.96, 1.55, **_preact_basic(2, 2, 2), widths=(128, 256, 512)
)
cifar_wrn28_10 = _small_wide(
    "cifar_wrn28_10", ResNet, 36.48, 5.24, **_preact_basic(4, 4, 4), widths=(160, 320, 640)
)

# The CIFAR-10 net of the lesson "Lab10-6: ResNet" (Deep Learning Zero To All, season 2).
lab10_resnet50 = _lesson(
    "lab10_resnet50", cifar_resnet50, 1.484, 0.277, widths=(16, 32, 64, 128), strides=(1, 1, 2, 2)
)

# D. Page's net.
cifar_resnet9 = _page("cifar_resnet9", ResNet9, 6.573, 0.379)

# Simonyan and Zisserman, table 1, columns A, B, D and E, and with BatchNorm.
vgg11 = _vgg("vgg11", VGG, 132.9, 7.61, "torchvision", layers=(1, 1, 2, 2, 2))
vgg13 = _vgg("vgg13", VGG, 133.0, 11.3, "torchvision", layers=(2, 2, 2, 2, 2))
vgg16 = _vgg("vgg16", VGG, 138.4, 15.5, "torchvision", layers=(2, 2, 3, 3, 3))
vgg19 = _vgg("vgg19", VGG, 143.7, 19.6, "torchvision", layers=(2, 2, 4, 4, 4))
vgg11_bn = _vgg("vgg11_bn", vgg11, 132.9, 7.61, "torchvision", batch_norm=True)
vgg13_bn = _vgg("vgg13_bn", vgg13, 133.1, 11.3, "torchvision", batch_norm=True)
vgg16_bn = _vgg("vgg16_bn", vgg16, 138.4, 15.5, "torchvision", batch_norm=True)
vgg19_bn = _vgg("vgg19_bn", vgg19, 143.7, 19.6, "torchvision", batch_norm=True)
