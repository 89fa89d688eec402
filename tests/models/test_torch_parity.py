"""Same weights, same images: the numbers of PyTorch, forward and backward."""

import contextlib
import copy
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_resnet as fr

torch = pytest.importorskip("torch")
from tests.models import torch_resnet  # noqa: E402

TOLERANCE = 1e-4

# (ours, channels of the input, PyTorch's after that)
BLOCKS = {
    "basic": (fr.BasicBlock(8), 8, (torch_resnet.BasicBlock, 8)),
    "basic, stride 2": (fr.BasicBlock(16, 2), 8, (torch_resnet.BasicBlock, 16, 2)),
    "basic, option A": (
        fr.BasicBlock(16, 2, shortcut="identity"),
        8,
        (torch_resnet.BasicBlock, 16, 2, "identity"),
    ),
    "bottleneck": (fr.Bottleneck(4), 16, (torch_resnet.Bottleneck, 4)),
    "bottleneck, wider": (fr.Bottleneck(4), 8, (torch_resnet.Bottleneck, 4)),
    "bottleneck, stride 2": (fr.Bottleneck(8, 2), 8, (torch_resnet.Bottleneck, 8, 2)),
}
# (model, height, width): even and odd sizes.
NETS = [
    ("resnet18", 64, 64),
    ("resnet18", 65, 75),
    ("resnet50", 64, 64),
    ("resnet50", 65, 75),
    ("cifar_resnet20", 32, 32),
    ("cifar_resnet20", 33, 27),
    ("lab10_resnet50", 16, 16),
    ("lab10_resnet50", 17, 13),
]


def assert_close(ours, theirs, what: str) -> None:
    """The norm of the difference is at most TOLERANCE of the norm."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, what
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
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
    that is three batches of four. So up to 20 random batches are tried; a gradient that is
    wrong agrees on none.
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

    def assert_agree(seed: int) -> None:
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
        assert_close(by_images, to_nhwc(x.grad), "gradient by the images")
        ours = fr.to_torch(model, {"params": by_params, **updates})
        for name, parameter in twin.named_parameters():
            assert_close(ours[name], parameter.grad, f"gradient of {name}")
        for name, m in norms.items():
            assert_close(ours[f"{name}.running_mean"], m.running_mean, f"{name}.running_mean")
            # Ours moves by a tenth of the biased variance, PyTorch's of the unbiased one.
            kept = 0.9 * initial[f"{name}.running_var"]
            biased = (m.running_var - kept) * (counts[name] - 1) / counts[name]
            assert_close(ours[f"{name}.running_var"], kept + biased, f"{name}.running_var")

    for seed in range(19):
        with contextlib.suppress(AssertionError):
            return assert_agree(seed)
    assert_agree(19)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_block_agrees_with_torch(name, size):
    model, channels, (block, *arguments) = BLOCKS[name]
    twin = torch_resnet.randomize(block(channels, *arguments))
    assert_parity(model, twin, (4, *size, channels))


@pytest.mark.parametrize(("name", "height", "width"), NETS)
def test_net_agrees_with_torch(name, height, width):
    twin = torch_resnet.randomize(torch_resnet.create(name))
    assert_parity(fr.create_model(name), twin, (4, height, width, 3))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20", "lab10_resnet50"])
def test_round_trip_is_exact(name):
    twin = torch_resnet.randomize(torch_resnet.create(name))
    model = fr.create_model(name)
    state_dict = fr.to_torch(model, fr.from_torch(model, twin.state_dict()))
    assert state_dict.keys() == twin.state_dict().keys()
    for key, value in twin.state_dict().items():
        assert torch.equal(state_dict[key], value), key
    torch_resnet.create(name).load_state_dict(state_dict)


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
