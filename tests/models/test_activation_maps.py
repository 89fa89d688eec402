"""Class activation maps: PyTorch's numbers on the same weights, and what they add up to."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flax_resnet as fr

torch = pytest.importorskip("torch")
from tests.models import torch_resnet  # noqa: E402

SMALL: dict[str, Any] = {"num_classes": 5, "widths": (8, 16), "strides": (1, 2)}
LAYERS = (1, 1)


def nets(name: str) -> tuple[Any, Any, Any]:
    """Ours, PyTorch's, and of the latter the function from an image to the last stage."""
    if name == "VGG":
        fields = {"num_classes": 5, "widths": (8, 16), "hidden": 12}
        twin = torch_resnet.VGG(LAYERS, **fields)
        return fr.VGG(LAYERS, **fields), twin, twin.features
    if name == "ResNet9":
        fields = {"num_classes": 5, "widths": (4, 8, 8, 16)}
        twin = torch_resnet.ResNet9(**fields)
        return fr.ResNet9(**fields), twin, twin.block3
    block = getattr(fr, name)
    twin = torch_resnet.ResNet(getattr(torch_resnet, name), LAYERS, cifar_stem=True, **SMALL)
    last = twin.bn if twin.preactivation else twin.layer2
    return fr.ResNet(block, LAYERS, cifar_stem=True, **SMALL), twin, last


def torch_maps(twin, last, images, classes, *, exact: bool) -> np.ndarray:
    """Equation 2 of Zhou et al., or equations 1 and 2 of Grad-CAM by autograd, in float64."""
    kept = []
    last.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = twin(torch.from_numpy(images.transpose(0, 3, 1, 2)).double())
    features = kept[0].relu() if isinstance(last, torch.nn.BatchNorm2d) else kept[0]
    if exact:
        return torch.einsum("nchw,nc->nhw", features, twin.fc.weight[classes]).detach().numpy()
    chosen = logits[torch.arange(len(classes)), classes].sum()
    (gradient,) = torch.autograd.grad(chosen, features)
    alpha = gradient.mean((2, 3))
    return torch.einsum("nchw,nc->nhw", features, alpha).relu().detach().numpy()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("BasicBlock", marks=pytest.mark.slow),
        pytest.param("PreActBottleneck", marks=pytest.mark.slow),
        "ResNet9",
        "VGG",
    ],
)
def test_maps_are_those_of_torch(name, rng):
    model, twin, last = nets(name)
    twin = torch_resnet.randomize(twin).double().eval()
    images = rng.normal(size=(4, 18, 12, 3)).astype(np.float32)
    classes = np.array([1, 0, 4, 2])
    weights = {key: value.float() for key, value in twin.state_dict().items()}
    variables = fr.from_torch(model, weights)
    maps = jax.jit(partial(fr.class_activation_maps, model))
    ours = np.asarray(maps(variables, images, classes))
    exact = isinstance(model, fr.ResNet)
    theirs = torch_maps(twin, last, images, classes, exact=exact)
    assert theirs.any()
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)
    logits = model.apply(variables, images, train=False)
    if exact:  # a mean and the bias are the logit
        sums = ours.mean((1, 2)) + variables["params"]["fc"]["bias"][classes]
        np.testing.assert_allclose(sums, logits[np.arange(4), classes], rtol=1e-4, atol=1e-5)
    most_probable = maps(variables, images, jnp.argmax(logits, -1))
    np.testing.assert_allclose(maps(variables, images), most_probable, rtol=1e-5)


def test_maps_of_images_on_several_devices(rng):
    model = fr.cifar_resnet8()
    x = jnp.float32(rng.normal(size=(4, 8, 8, 3)))
    variables = model.init(jax.random.key(0), x, train=False)
    expected = fr.class_activation_maps(model, variables, x)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    copied = jax.device_put(variables, NamedSharding(mesh, P()))
    maps = jax.jit(partial(fr.class_activation_maps, model))(copied, spread)
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-6)
    constant = jax.device_get(variables)
    maps = jax.jit(lambda x: fr.class_activation_maps(model, constant, x))(x)
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-6)


def test_maps_of_a_vgg_and_long_images(rng):
    model = fr.VGG((1, 1), num_classes=3, widths=(8, 16), hidden=8)
    x = jnp.float32(rng.normal(size=(2, 12, 64, 3)))
    variables = model.init(jax.random.key(0), x, train=False)
    assert fr.class_activation_maps(model, variables, x).shape == (2, 3, 16)
    logits: Any = model.apply(variables, x[:0], train=False)
    assert logits.shape == (0, 3)


def test_refusals():
    x = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match="takes a ResNet, ResNet9 or VGG, not a Dense"):
        fr.class_activation_maps(nn.Dense(2), {}, x)
    with pytest.raises(ValueError, match="with a classifier: num_classes=0"):
        fr.class_activation_maps(fr.cifar_resnet8(num_classes=0), {}, x)
