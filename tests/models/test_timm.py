"""Our nets beside timm's of the same names: entries, shapes and logits."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import flax_resnet as fr
from flax_resnet.models.dialects import in_our_names, torch_name
from flax_resnet.models.layers import Conv, EfficientChannelAttention, blur_pool, max_pool
from flax_resnet.models.shapes import variable_shapes
from flax_resnet.models.variants import VARIANTS
from flax_resnet.training.data import published_statistics
from tests.models import timm_nets, torch_resnet

torch = pytest.importorskip("torch")
try:
    timm = timm_nets.load_timm()
except ImportError:
    pytest.skip("needs timm: pip install --no-deps timm", allow_module_level=True)

pytestmark = pytest.mark.timm

# A net for each thing that is ours to say: blocks, stems, shortcuts, attentions, poolings, norms.
SOME = [
    "resnet10t",
    "resnet50_gn",
    "seresnet18",
    "ecaresnetlight",
    "resnetaa50d",
    "resnetblur50",
    "resnetrs50",
    "resnetv2_34d",
]
THEIRS = {*timm.list_models(module="resnet"), *timm.list_models(module="resnetv2")}
assert THEIRS.issuperset(SOME)
NAMES = [
    pytest.param(name, marks=() if name in SOME else pytest.mark.full)
    for name in fr.list_models()
    if name in THEIRS
]


def small(name: str, **fields) -> tuple[Any, Any]:
    """timm's net and ours, of few channels and blocks, with random weights and statistics."""
    stem, block = VARIANTS[name].fields.get("stem_width", 64), VARIANTS[name].fields["block"]
    wider = VARIANTS[name].fields.get("widths", (64,))[0] // 64
    planes, layers = (32, 32, 64, 96), (2, 1, 1, 1)
    channels: tuple[int, ...] = planes
    if name.startswith("resnetv2"):
        channels = tuple(block.expansion * n for n in planes)
    same = {"num_classes": 7, "layers": layers, **fields}
    if name.endswith("_bit"):  # timm takes no other layers for these
        del same["layers"]
    theirs = timm.create_model(name, channels=channels, **same)
    widths = tuple(wider * n for n in planes)
    ours = fr.create_model(name, widths=widths, stem_width=wider * stem, **same)
    return torch_resnet.randomize(theirs).eval(), ours


def assert_same_logits(theirs, ours) -> None:
    """At an odd size, to 2e-4 of the largest logit."""
    # timm's two paths part at an odd size where one of them averages without the rest.
    size = (64, 96) if ours.antialias == "average" else (75, 93)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    variables = fr.from_torch(ours, theirs.state_dict())
    logits = ours.apply(variables, jnp.asarray(images), train=False)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    assert_same_logits(*small(name))


LAYERS = {
    "ECA": (EfficientChannelAttention(), lambda: timm.layers.EcaModule(48)),
    "standardized": (
        Conv(16, 3, stride=2, standardize=True),
        lambda: timm.layers.StdConv2d(48, 16, 3, stride=2, eps=1e-8),
    ),
    "dilated": (
        Conv(16, 3, dilation=2, groups=4),
        lambda: torch.nn.Conv2d(48, 16, 3, padding=2, dilation=2, groups=4, bias=False),
    ),
    "blur": (partial(blur_pool, stride=2), lambda: timm.layers.BlurPool2d(48, stride=2)),
    "zeros around": (
        partial(max_pool, stride=2, zeros=True),
        lambda: torch.nn.Sequential(torch.nn.ConstantPad2d(1, 0.0), torch.nn.MaxPool2d(3, 2)),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_a_layer(name):
    layer: Any
    layer, make = LAYERS[name]
    torch.manual_seed(0)
    theirs: Any = make().double()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 11, 14, 48)).astype(np.float32)
    images = torch.from_numpy(x.transpose(0, 3, 1, 2)).double().requires_grad_()
    expected = theirs(images)
    weights = rng.normal(size=expected.shape).astype(np.float32)
    (expected * torch.from_numpy(weights)).sum().backward()

    params, gradient = {}, np.zeros(0)
    for value in theirs.parameters():  # one kernel at most
        axes = (2, 3, 1, 0) if value.ndim == 4 else (2, 1, 0)
        params["kernel"] = value.detach().numpy().transpose(axes).astype(np.float32)
        gradient = value.grad.numpy().transpose(axes)

    def apply(params, x) -> Any:
        tree = {"conv": params} if name == "ECA" else params
        return layer.apply({"params": tree}, x) if isinstance(layer, nn.Module) else layer(x)

    out: Any
    out, pull = jax.vjp(apply, params, jnp.asarray(x))
    ours, by_x = pull(jnp.asarray(weights.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(out, expected.detach().numpy().transpose(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(by_x, images.grad.numpy().transpose(0, 2, 3, 1), atol=1e-4)
    if params:
        error = np.linalg.norm(ours["kernel"] - gradient)
        assert error <= 1e-4 * np.linalg.norm(gradient)


@pytest.mark.parametrize("name", [name for name in fr.list_models() if VARIANTS[name].hub_id()])
def test_published_weights_have_our_classes_and_normalisation(name):
    published = timm.models.get_pretrained_cfg(str(VARIANTS[name].hub_id()).removeprefix("timm/"))
    assert published.num_classes == 1000
    (mean, std), _ = published_statistics(name)
    assert (tuple(published.mean), tuple(published.std)) == (mean, std)


@pytest.mark.parametrize("name", sorted(THEIRS & {*fr.list_models()}))
def test_entries_and_shapes(name):
    state_dict = in_our_names(timm.create_model(name, device="meta").state_dict())
    theirs = {entry: tuple(value.shape) for entry, value in state_dict.items()}
    theirs["fc.weight"] = theirs["fc.weight"][:2]  # which resnetv2 has as a 1x1 convolution
    shapes: dict[tuple[str, ...], Any] = flatten_dict(variable_shapes(fr.create_model(name)))
    ours = {}
    for path, value in shapes.items():
        order = (3, 2, 0, 1) if len(value.shape) == 4 else range(len(value.shape))[::-1]
        ours[torch_name(path)] = tuple(value.shape[i] for i in order)
    assert ours == theirs
    count = sum(np.prod(v.shape) for path, v in shapes.items() if path[0] == "params")
    assert float(f"{count / 1e6:.4g}") == VARIANTS[name].parameters


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        ("resnet50d", 8),
        *(
            pytest.param(name, output_stride, marks=pytest.mark.full)
            for name in ("resnet18", "resnetblur50", "resnetv2_50")
            for output_stride in (16, 8)
        ),
    ],
)
def test_dilation(name, output_stride):
    theirs, ours = small(name, output_stride=output_stride)
    assert_same_logits(theirs, ours)
    # torchvision's field says the same for each stage.
    replaces = (False, output_stride == 8, True)
    twin = ours.clone(output_stride=None, replace_stride_with_dilation=replaces)
    assert twin._strides_and_dilations() == ours._strides_and_dilations()
    images = jnp.zeros((1, 65, 97, 3))
    variables = fr.from_torch(ours, theirs.state_dict())
    outputs: Any = twin.apply(variables, images, train=False, features=True)
    assert outputs["layer4"].shape[1:3] == (-(-65 // output_stride), -(-97 // output_stride))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channels(channels, tmp_path):
    adapt_input_conv = timm.models.adapt_input_conv

    theirs, ours = small("resnet10t")
    fr.save_weights(ours, fr.from_torch(ours, theirs.state_dict()), tmp_path / "w.safetensors")
    names = ("layers", "widths", "stem_width", "num_classes")
    fields = {field: getattr(ours, field) for field in names}
    _, variables = fr.create_model(
        "resnet10t", weights=tmp_path / "w.safetensors", channels=channels, **fields
    )
    kernel = adapt_input_conv(channels, theirs.conv1[0].weight).detach().numpy()
    np.testing.assert_allclose(
        variables["params"]["conv1_0"]["kernel"], kernel.transpose(2, 3, 1, 0), rtol=1e-6
    )
