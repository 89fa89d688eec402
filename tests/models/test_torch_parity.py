"""Same weights, same images: the numbers of PyTorch, forward and backward."""

import contextlib
import copy
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_resnet as fr
from flax_resnet.models.layers import GroupNorm
from flax_resnet.models.pooling import max_pool2d
from tests.models.test_resnet import deep_is_slow

torch = pytest.importorskip("torch")
from tests.models import torch_resnet  # noqa: E402

TOLERANCE = 1e-4

# (class, channels of the input, planes, stride, other fields)
BLOCKS: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "basic": ("BasicBlock", 8, 8, 1, {}),
    "basic, stride 2": ("BasicBlock", 8, 16, 2, {}),
    "basic, option A": ("BasicBlock", 8, 16, 2, {"shortcut": "identity"}),
    "basic, option D": ("BasicBlock", 8, 16, 2, {"shortcut": "average"}),
    "basic, plain": ("BasicBlock", 8, 16, 2, {"shortcut": "none"}),
    "basic, SE": ("BasicBlock", 8, 8, 1, {"squeeze_excite": True}),
    "basic, GroupNorm": ("BasicBlock", 8, 48, 2, {"norm": "group"}),
    "bottleneck": ("Bottleneck", 16, 4, 1, {}),
    "bottleneck, wider": ("Bottleneck", 8, 4, 1, {}),
    "bottleneck, stride 2": ("Bottleneck", 8, 8, 2, {}),
    "bottleneck, option D, wider": ("Bottleneck", 8, 4, 1, {"shortcut": "average"}),
    "bottleneck, wide": ("Bottleneck", 16, 4, 1, {"width_per_group": 128}),
    "bottleneck, grouped": ("Bottleneck", 16, 4, 1, {"groups": 4, "width_per_group": 32}),
    "bottleneck, grouped, stride 2": (
        "Bottleneck",
        8,
        8,
        2,
        {"groups": 8, "width_per_group": 16},
    ),
    "bottleneck, SE": ("Bottleneck", 8, 8, 2, {"squeeze_excite": True}),
    "preact basic": ("PreActBasicBlock", 8, 8, 1, {}),
    "preact basic, stride 2": ("PreActBasicBlock", 8, 16, 2, {}),
    "preact basic, option A": ("PreActBasicBlock", 8, 16, 2, {"shortcut": "identity"}),
    "preact bottleneck": ("PreActBottleneck", 16, 4, 1, {}),
    "preact bottleneck, stride 2": ("PreActBottleneck", 8, 8, 2, {}),
}
# (class of the blocks, channels of the images, other fields)
SMALL_NETS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "wide": ("Bottleneck", 3, {"width_per_group": 128}),
    "resnext": ("Bottleneck", 3, {"groups": 4, "width_per_group": 32}),
    "d": ("Bottleneck", 3, {"deep_stem": True, "shortcut": "average"}),
    "se": ("Bottleneck", 3, {"squeeze_excite": True}),
    "plain": ("BasicBlock", 3, {"shortcut": "none"}),
    "preact": ("PreActBottleneck", 3, {"cifar_stem": True}),
    "wide preact": ("PreActBasicBlock", 3, {"cifar_stem": True, "stem_width": 4}),
    "group norm": ("BasicBlock", 3, {"norm": "group"}),
    "gray images": ("BasicBlock", 1, {}),
    "many channels": ("BasicBlock", 12, {"deep_stem": True}),
}
# (model, height, width): an even and an odd side.
NETS = [
    ("resnet18", 64, 75),
    pytest.param("resnet50", 65, 64, marks=pytest.mark.slow),
    ("cifar_resnet20", 32, 27),
    ("cifar_resnet9", 16, 11),
    ("lab10_resnet50", 17, 16),
]


def assert_close(ours, theirs, what: str) -> None:
    """The norm of the difference is at most TOLERANCE of the norm.

    Norms below 0.01 count as 0.01: all but rounding is the gradient of a convolution's bias
    before BatchNorm, which takes it away again.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, what
    error = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 0.01)
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


def to_nhwc(x) -> np.ndarray:
    x = x.detach().numpy()
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def to_nchw(images: np.ndarray):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def assert_parity(model, twin, shape: tuple[int, ...]) -> None:
    """Compares all numbers for random images of a shape.

    Where the input of a ReLU rounds to the other side of zero, the gradient jumps: on
    such images PyTorch's own float32 is off its float64 by up to 3e-2, and for resnet50
    that is three batches of four. So for the gradients up to 20 random batches are tried; one
    that is wrong agrees on none.
    """
    initial = copy.deepcopy(twin.state_dict())
    variables = fr.from_torch(model, initial)
    norms = {n: m for n, m in twin.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    counts = {}  # values that each BatchNorm takes its statistics over
    for name, m in norms.items():
        m.register_forward_hook(
            lambda m, args, out, name=name: counts.update({name: out.numel() // out.shape[1]})
        )

    def weighted_sum(params, images, cotangent):
        output, updates = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return (output * cotangent).sum(), (output, updates)

    gradient = jax.jit(jax.grad(weighted_sum, argnums=(0, 1), has_aux=True))
    predict = jax.jit(partial(model.apply, train=False))

    def compare(seed: int) -> list[tuple[Any, Any, str]]:
        """Compares all but the gradients, and returns these."""
        images = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        twin.load_state_dict(initial)
        with torch.no_grad():
            expected = to_nhwc(twin.eval()(to_nchw(images)))
        assert_close(predict(variables, images), expected, "eval output")

        x = to_nchw(images).requires_grad_()
        twin.zero_grad()
        expected = twin.train()(x)
        cotangent = torch.randn_like(expected)
        (expected * cotangent).sum().backward()
        (by_params, by_images), (output, updates) = gradient(
            variables["params"], images, to_nhwc(cotangent)
        )
        assert_close(output, to_nhwc(expected), "train output")
        ours = fr.to_torch(model, {"params": by_params, **updates})
        for name, m in norms.items():
            assert_close(ours[f"{name}.running_mean"], m.running_mean, f"{name}.running_mean")
            # Ours moves by a tenth of the biased variance, PyTorch's of the unbiased one.
            kept = 0.9 * initial[f"{name}.running_var"]
            biased = (m.running_var - kept) * (counts[name] - 1) / counts[name]
            assert_close(ours[f"{name}.running_var"], kept + biased, f"{name}.running_var")
        return [
            (by_images, to_nhwc(x.grad), "gradient by the images"),
            *((ours[name], p.grad, f"gradient of {name}") for name, p in twin.named_parameters()),
        ]

    for seed in range(20):
        gradients = compare(seed)
        with contextlib.suppress(AssertionError) if seed < 19 else contextlib.nullcontext():
            for pair in gradients:
                assert_close(*pair)
            return


@pytest.mark.parametrize("window", [(1,), (2,), (3,), (3, 2, 1), (3, 1, 1), (2, 3), (5, 3, 2)])
# On a CPU convolution.cc takes float32 and as many channels as a multiple of a register's.
@pytest.mark.parametrize(("dtype", "channels"), [("float32", 16), ("float32", 3), ("bfloat16", 16)])
def test_max_pool_agrees_with_torch(window, dtype, channels, rng):
    images = rng.integers(3, size=(2, 7, 6, channels)).astype(np.float32)  # full of ties
    images[1, 0, 0, 0] = np.nan
    x = to_nchw(images).to(getattr(torch, dtype)).requires_grad_()
    expected = torch.nn.functional.max_pool2d(x, *window)
    gradient = torch.randint_like(expected, 100)
    expected.backward(gradient)

    @jax.jit
    def value_and_gradient(x, g):
        out, backward = jax.vjp(lambda x: max_pool2d(x, *window), x)
        return out, backward(g)[0]

    g = jnp.asarray(to_nhwc(gradient.float()), dtype)
    ours, by_images = value_and_gradient(jnp.asarray(images, dtype), g)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), to_nhwc(expected.float()))
    np.testing.assert_array_equal(np.asarray(by_images, np.float32)[0], to_nhwc(x.grad.float())[0])


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((1, 4, 4, 16), (2, 1, 3)),
        ((1, 4, 4, 16), (2, 1, -1)),
        ((1, 4, 4, 16), (2, -1, 0)),
        ((1, 32, 32, 16), (17, 1, 0)),
        ((1, 2, 4, 16), (3, 1, 0)),
        ((4, 4, 16), (2, 2, 0)),
    ],
)
def test_max_pool_of_what_is_no_window(shape, window):
    with pytest.raises(ValueError, match=r"size=|have no"):
        max_pool2d(jnp.ones(shape), *window)


def test_max_pool_is_differentiated_in_every_way(rng):
    x, tangents = (rng.normal(size=(2, 3, 7, 6, 16)).astype(np.float32) for _ in range(2))

    def flax_pool(x):
        return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]

    def derivatives(pool):
        def gradient(x):
            return jax.grad(lambda x: jnp.sum(pool(x) ** 3))(x)

        def both(x, tangent):
            return jax.jvp(pool, (x,), (tangent,)), jax.jvp(gradient, (x,), (tangent,))

        return jax.jit(jax.vmap(both))(x, tangents)

    ours = derivatives(lambda x: max_pool2d(x, 3, 2, 1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, derivatives(flax_pool)
    )


def test_nan_comes_through_a_compiled_model():
    model = fr.ResNet(
        fr.Bottleneck, (1,), num_classes=10, widths=(16,), strides=(1,), cifar_stem=True
    )
    images = np.zeros((2, 8, 8, 3), np.float32)
    variables = model.init(jax.random.key(0), images, train=False)
    images[0, 5, 5, 0] = np.nan
    logits = jax.jit(partial(model.apply, train=False))(variables, images)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("size", [(8, 7), (9, 8)])
def test_block_agrees_with_torch(name, size):
    kind, channels, planes, stride, fields = BLOCKS[name]
    norms, their_norms = {}, {}
    if "norm" in fields:
        fields = {k: v for k, v in fields.items() if k != "norm"}
        norms, their_norms = {"norm_layer": GroupNorm}, {"norm": torch_resnet.group_norm}
    model = getattr(fr, kind)(planes, stride, **fields, **norms)
    twin = getattr(torch_resnet, kind)(channels, planes, stride, **fields, **their_norms)
    assert_parity(model, torch_resnet.randomize(twin), (4, *size, channels))


def small_net(name):
    """(model, twin, channels of the images)"""
    kind, channels, fields = SMALL_NETS[name]
    fields = {"num_classes": 5, "widths": (8, 16), "strides": (1, 2)} | fields
    model = fr.ResNet(getattr(fr, kind), (2, 1), **fields)
    if fields.get("norm") == "group":
        fields["norm"] = torch_resnet.group_norm
    twin = torch_resnet.ResNet(getattr(torch_resnet, kind), (2, 1), in_channels=channels, **fields)
    return model, torch_resnet.randomize(twin), channels


@pytest.mark.parametrize("name", SMALL_NETS)
def test_small_net_agrees_with_torch(name):
    model, twin, channels = small_net(name)
    assert_parity(model, twin, (4, 33, 26, channels))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("size", [(28, 28), (35, 18)])
def test_vgg_agrees_with_torch(batch_norm, size):
    """After two max-pools 7x7 pixels, which pooling leaves alone, and 8x4."""
    layers = (1, 2)
    fields = {"num_classes": 5, "widths": (8, 16), "hidden": 16, "dropout": 0.0}
    model = fr.VGG(layers, batch_norm=batch_norm, **fields)
    twin = torch_resnet.VGG(layers, batch_norm=batch_norm, **fields)
    assert_parity(model, torch_resnet.randomize(twin), (4, *size, 3))


@pytest.mark.parametrize(("name", "height", "width"), NETS)
def test_net_agrees_with_torch(name, height, width):
    twin = torch_resnet.randomize(torch_resnet.create(name))
    assert_parity(fr.create_model(name), twin, (4, height, width, 3))


# One net of each kind in its full size; (name, fields of both, height, width).
LOGITS: list[tuple[str, dict[str, Any], int, int]] = [
    ("wide_resnet50_2", {}, 64, 64),
    ("resnext50_32x4d", {}, 65, 75),
    ("resnet50d", {}, 65, 75),
    ("seresnet50", {}, 64, 64),
    ("plain34", {}, 64, 64),
    ("cifar_preact_resnet18", {}, 32, 32),
    ("cifar_preact_resnet164", {}, 16, 16),
    ("cifar_wrn16_8", {}, 16, 16),
    ("vgg19", {"hidden": 64}, 64, 64),
    ("vgg19_bn", {"hidden": 64}, 65, 75),
]


@pytest.mark.parametrize(("name", "fields", "height", "width"), LOGITS)
def test_logits_agree_with_torch(name, fields, height, width, rng):
    twin = torch_resnet.randomize(torch_resnet.create(name, **fields)).eval()
    model = fr.create_model(name, **fields)
    variables = fr.from_torch(model, twin.state_dict())
    images = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    with torch.no_grad():
        expected = twin(to_nchw(images))
    logits = jax.jit(partial(model.apply, train=False))(variables, images)
    assert_close(logits, to_nhwc(expected), "logits")


def assert_round_trip(model, state_dict):
    ours = fr.to_torch(model, fr.from_torch(model, state_dict))
    assert ours.keys() == state_dict.keys()
    for key, value in state_dict.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20", "lab10_resnet50"])
def test_round_trip_is_exact(name):
    twin = torch_resnet.randomize(torch_resnet.create(name))
    assert_round_trip(fr.create_model(name), twin.state_dict())


@pytest.mark.parametrize("name", SMALL_NETS)
def test_round_trip_of_every_kind_is_exact(name):
    model, twin, _ = small_net(name)
    assert_round_trip(model, twin.state_dict())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_round_trip_of_vgg_is_exact(batch_norm):
    fields = {"batch_norm": batch_norm, "widths": (8, 16), "hidden": 16}
    twin = torch_resnet.randomize(torch_resnet.VGG((1, 2), **fields))
    state_dict = twin.state_dict()
    assert_round_trip(fr.VGG((1, 2), **fields), state_dict)
    gray = state_dict | {"features.0.weight": state_dict["features.0.weight"][:, :1]}
    assert_round_trip(fr.VGG((1, 2), **fields), gray)


@pytest.mark.parametrize("name", [deep_is_slow(name) for name in torch_resnet.TWINS])
def test_state_dict_of_every_model_is_that_of_its_twin(name):
    """Names and shapes, and all twins have their state_dict from PyTorch itself."""
    with torch.device("meta"):
        expected = torch_resnet.create(name).state_dict()
    model = fr.create_model(name)
    x = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    ours = fr.to_torch(model, zeros)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}


def test_from_torch_gives_what_init_gives():
    model = fr.cifar_resnet20()
    x = jnp.zeros((1, 32, 32, 3))
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    ours = fr.from_torch(model, torch_resnet.create("cifar_resnet20").state_dict())
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, expected)


def test_from_torch_copies():
    twin = torch_resnet.create("cifar_resnet8")
    variables = fr.from_torch(fr.cifar_resnet8(), twin.state_dict())
    kernel = np.array(variables["params"]["conv1"]["kernel"])
    with torch.no_grad():
        twin.conv1.weight.add_(1)
    np.testing.assert_array_equal(variables["params"]["conv1"]["kernel"], kernel)


def test_from_torch_takes_arrays_and_half_precision():
    state_dict = torch_resnet.create("cifar_resnet8").state_dict()
    state_dict["fc.weight"] = state_dict["fc.weight"].bfloat16()
    expected = state_dict["fc.weight"].float().numpy().T
    state_dict["fc.bias"] = state_dict["fc.bias"].numpy()
    params = fr.from_torch(fr.cifar_resnet8(), state_dict)["params"]
    np.testing.assert_array_equal(params["fc"]["kernel"], expected)
    np.testing.assert_array_equal(params["fc"]["bias"], state_dict["fc.bias"])


def test_from_torch_lists_all_that_does_not_fit():
    state_dict = torch_resnet.create("cifar_resnet8").state_dict()
    del state_dict["layer2.0.bn1.weight"]
    state_dict["head.weight"] = torch.zeros(3)
    state_dict["fc.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"missing layer2\.0\.bn1\.weight") as error:
        fr.from_torch(fr.cifar_resnet8(), state_dict)
    assert "left over head.weight" in str(error.value)
    assert "fc.bias has shape (7,), expected (10,)" in str(error.value)
