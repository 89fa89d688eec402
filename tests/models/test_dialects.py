"""Weights under the names that other code gives the same nets, written out by hand."""

from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_resnet as fr
from flax_resnet.models.torch_weights import to_arrays

SMALL = {"num_classes": 3, "widths": (4, 8), "strides": (1, 2)}
BASIC = fr.ResNet(fr.BasicBlock, (1, 1), cifar_stem=True, **SMALL)
BOTTLENECK = fr.ResNet(fr.Bottleneck, (1, 1), **SMALL)
PREACT = fr.ResNet(fr.PreActBasicBlock, (1, 1), cifar_stem=True, **SMALL)

# Modules of each code, and ours in the same order.
KUANGLIU = """
conv1 bn1 layer1.0.conv1 layer1.0.bn1 layer1.0.conv2 layer1.0.bn2
layer2.0.conv1 layer2.0.bn1 layer2.0.conv2 layer2.0.bn2 layer2.0.shortcut.0 layer2.0.shortcut.1
linear
"""
WEIAICUNZAI = """
conv1.0 conv1.1 conv2_x.0.residual_function.0 conv2_x.0.residual_function.1
conv2_x.0.residual_function.3 conv2_x.0.residual_function.4
conv3_x.0.residual_function.0 conv3_x.0.residual_function.1 conv3_x.0.residual_function.3
conv3_x.0.residual_function.4 conv3_x.0.shortcut.0 conv3_x.0.shortcut.1 fc
"""
OUR_BASIC = """
conv1 bn1 layer1.0.conv1 layer1.0.bn1 layer1.0.conv2 layer1.0.bn2
layer2.0.conv1 layer2.0.bn1 layer2.0.conv2 layer2.0.bn2 layer2.0.downsample.0 layer2.0.downsample.1
fc
"""
TRANSFORMERS = """
resnet.embedder.embedder.convolution resnet.embedder.embedder.normalization
resnet.encoder.stages.0.layers.0.shortcut.convolution
resnet.encoder.stages.0.layers.0.shortcut.normalization
resnet.encoder.stages.0.layers.0.layer.0.convolution
resnet.encoder.stages.0.layers.0.layer.0.normalization
resnet.encoder.stages.0.layers.0.layer.1.convolution
resnet.encoder.stages.0.layers.0.layer.1.normalization
resnet.encoder.stages.0.layers.0.layer.2.convolution
resnet.encoder.stages.0.layers.0.layer.2.normalization
resnet.encoder.stages.1.layers.0.shortcut.convolution
resnet.encoder.stages.1.layers.0.shortcut.normalization
resnet.encoder.stages.1.layers.0.layer.0.convolution
resnet.encoder.stages.1.layers.0.layer.0.normalization
resnet.encoder.stages.1.layers.0.layer.1.convolution
resnet.encoder.stages.1.layers.0.layer.1.normalization
resnet.encoder.stages.1.layers.0.layer.2.convolution
resnet.encoder.stages.1.layers.0.layer.2.normalization
classifier.1
"""
OUR_BOTTLENECK = """
conv1 bn1 layer1.0.downsample.0 layer1.0.downsample.1
layer1.0.conv1 layer1.0.bn1 layer1.0.conv2 layer1.0.bn2 layer1.0.conv3 layer1.0.bn3
layer2.0.downsample.0 layer2.0.downsample.1
layer2.0.conv1 layer2.0.bn1 layer2.0.conv2 layer2.0.bn2 layer2.0.conv3 layer2.0.bn3 fc
"""
OPENMMLAB = " ".join(f"backbone.{name}" for name in OUR_BASIC.split()[:-1]) + " head.fc"
XTERNALZ = """
conv1 block1.layer.0.bn1 block1.layer.0.conv1 block1.layer.0.bn2 block1.layer.0.conv2
block2.layer.0.bn1 block2.layer.0.conv1 block2.layer.0.bn2 block2.layer.0.conv2
block2.layer.0.convShortcut bn1 fc
"""
OUR_PREACT = """
conv1 layer1.0.bn1 layer1.0.conv1 layer1.0.bn2 layer1.0.conv2
layer2.0.bn1 layer2.0.conv1 layer2.0.bn2 layer2.0.conv2 layer2.0.downsample.0 bn fc
"""
DIALECTS = {
    "kuangliu": (BASIC, KUANGLIU, OUR_BASIC),
    "weiaicunzai": (BASIC, WEIAICUNZAI, OUR_BASIC),
    "Cadene": (BASIC, OUR_BASIC.replace("fc", "last_linear"), OUR_BASIC),
    "OpenMMLab": (BASIC, OPENMMLAB, OUR_BASIC),
    "transformers": (BOTTLENECK, TRANSFORMERS, OUR_BOTTLENECK),
    "ResNetModel": (
        BOTTLENECK.clone(num_classes=0),
        TRANSFORMERS.replace("resnet.", "").replace("classifier.1", ""),
        OUR_BOTTLENECK.replace("fc", ""),
    ),
    "xternalz": (PREACT, XTERNALZ, OUR_PREACT),
    "kuangliu, pre-activation": (
        PREACT.clone(final_norm=False),
        OUR_PREACT.replace("downsample", "shortcut").replace("bn fc", "linear"),
        OUR_PREACT.replace("bn fc", "fc"),
    ),
}


def draw(model):
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.array(rng.normal(size=s.shape), s.dtype), shapes)


@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
@pytest.mark.parametrize("name", DIALECTS)
def test_same_net_under_other_names(name, prefix):
    model, theirs, ours = DIALECTS[name]
    names = dict(zip(ours.split(), theirs.split(), strict=True))
    variables = draw(model)
    state_dict = {}
    for entry, value in to_arrays(variables).items():
        module, _, leaf = entry.rpartition(".")
        state_dict[f"{prefix}{names[module]}.{leaf}"] = value
    chex.assert_trees_all_equal(fr.from_torch(model, state_dict), variables)


def test_unknown_names_are_shown_beside_ours():
    state_dict = {f"trunk.{i}.weight": np.zeros(3) for i in range(9)}
    with pytest.raises(ValueError, match="has other names than the model: ") as error:
        fr.from_torch(BASIC, state_dict)
    message = str(error.value)
    assert "trunk.0.weight, trunk.1.weight, trunk.2.weight, " in message
    assert "trunk.4.weight and 4 more, where the model has bn1.bias, bn1.weight, conv1" in message
    assert len(message) < 400


def test_entries_that_would_share_a_name_are_left_over():
    arrays = to_arrays(draw(BASIC))
    ours = {f"backbone.{name}": array for name, array in arrays.items()}
    for state_dict, left_over in (
        (arrays | {"linear.bias": arrays["fc.bias"]}, "linear.bias"),
        # Lightning: a net with a classifier, and another behind it.
        (ours | {"fc.bias": arrays["fc.bias"]}, "backbone.fc.bias"),
    ):
        with pytest.raises(ValueError, match=f"not fit the model: left over {left_over}$"):
            fr.from_torch(BASIC, state_dict)


class Own(nn.Module):
    """A model whose modules have names that are prefixes elsewhere."""

    @nn.compact
    def __call__(self, x, train):
        without_head: Any = SMALL | {"num_classes": 0}
        x = fr.ResNet(fr.BasicBlock, (1, 1), **without_head, name="backbone")(x, train)
        return nn.Dense(3, name="head")(x)


def test_names_of_ones_own_model_stay(tmp_path):
    variables = draw(Own())
    fr.save_weights(Own(), variables, tmp_path / "own.safetensors")
    for source in (to_arrays(variables), tmp_path / "own.safetensors"):
        chex.assert_trees_all_equal(fr.from_torch(Own(), source), variables)


def test_deep_stem_is_not_taken_for_another_dialect():
    model = fr.ResNet(fr.Bottleneck, (1, 1), deep_stem=True, shortcut="average", **SMALL)
    variables = draw(model)
    chex.assert_trees_all_equal(fr.from_torch(model, to_arrays(variables)), variables)


def test_a_published_file():
    """As akamaster/pytorch_resnet_cifar10 has it: DataParallel, linear, option A."""
    path = Path(__file__).parents[3] / "shared" / "data" / "weights" / "resnet20-12fca82f.th"
    if not path.exists():
        pytest.skip(f"needs {path}")
    torch = pytest.importorskip("torch")
    _, variables = fr.create_model("cifar_resnet20", weights=path)
    theirs = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    expected = theirs["module.layer2.0.conv1.weight"].numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(variables["params"]["layer2_0"]["conv1"]["kernel"], expected)
    expected = theirs["module.linear.weight"].numpy().T
    np.testing.assert_array_equal(variables["params"]["fc"]["kernel"], expected)
