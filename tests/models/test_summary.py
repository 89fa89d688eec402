"""Parameters and multiply-adds of the models, against what others publish."""

import flax.linen as nn
import jax
import pytest

import flax_resnet as fr

# torchvision's documentation: parameters, and GMACs at 224 pixels ("GFLOPS" there).
TORCHVISION = {
    "resnet18": (11_689_512, 1.81),
    "resnet34": (21_797_672, 3.66),
    "resnet50": (25_557_032, 4.09),
    "resnet101": (44_549_160, 7.80),
    "resnet152": (60_192_808, 11.51),
    "resnext50_32x4d": (25_028_904, 4.23),
    "wide_resnet50_2": (68_883_240, 11.40),
    "vgg11": (132_863_336, 7.61),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_totals_are_torchvisions(name):
    parameters, giga = TORCHVISION[name]
    ours = fr.summary(fr.create_model(name), 224)
    assert ours.parameters == parameters
    assert round(ours.multiply_adds / 1e9, 2) == giga


def test_layers_stand_in_the_order_of_their_use():
    layers = fr.summary(fr.resnet18(num_classes=5), (65, 32), channels=1).layers
    assert layers[0] == ("conv1", (33, 16, 64), 7 * 7 * 64, 33 * 16 * 7 * 7 * 64)
    assert layers[1] == ("bn1", (33, 16, 64), 2 * 64, 0)
    assert [layer.name for layer in layers if layer.name.startswith("layer2_0")] == [
        f"layer2_0/{name}"
        for name in ("downsample_conv", "downsample_bn", "conv1", "bn1", "conv2", "bn2")
    ]
    assert layers[-1] == ("fc", (5,), 513 * 5, 512 * 5)


def test_scanned_blocks_are_counted_one_by_one():
    scanned = fr.cifar_resnet20(scan_blocks=True)
    assert fr.summary(scanned, 32) == fr.summary(fr.cifar_resnet20(), 32)


class Layers(nn.Module):
    """Layers that are Flax's own, one with parameters beside its parts."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = x * self.param("gain", nn.initializers.ones, (8,))[None, None, None]
        x = nn.Conv(16, (3, 3), feature_group_count=4, use_bias=False, name="grouped")(x)
        x = nn.GroupNorm(4, name="norm")(x)
        return nn.Dense(3, name="dense")(x)


def test_layers_of_flax():
    ours = fr.summary(Layers(), 5, channels=8)
    assert ours.layers == (
        ("", (5, 5, 3), 8, 0),
        ("grouped", (5, 5, 16), 3 * 3 * 2 * 16, 5 * 5 * 3 * 3 * 2 * 16),
        ("norm", (5, 5, 16), 32, 0),
        ("dense", (5, 5, 3), 17 * 3, 5 * 5 * 16 * 3),
    )


def test_attention_and_a_layer_that_is_called_twice():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            convolution = nn.Conv(3, (3, 3))
            x = convolution(convolution(x))
            x = nn.ConvTranspose(64, (2, 2), strides=(2, 2))(x)
            return nn.MultiHeadDotProductAttention(num_heads=8)(x.reshape(1, -1, 64))

    once, twice, transposed, *attention = fr.summary(Net(), 2).layers
    assert (once.parameters, twice.parameters) == (3 * 3 * 3 * 3 + 3, 0)
    assert once.multiply_adds == twice.multiply_adds == 2 * 2 * 3 * 3 * 3 * 3
    assert transposed.multiply_adds == 2 * 2 * 2 * 2 * 3 * 64
    assert [layer.multiply_adds for layer in attention] == [4 * 4 * 64 * 64] * 4


def test_table():
    table = str(fr.summary(fr.cifar_resnet8(), 32)).splitlines()
    assert table[0].split() == ["layer", "output", "parameters", "multiply-adds"]
    assert table[1].split() == ["conv1", "32", "x", "32", "x", "16", "432", "442,368"]
    assert table[-1].split() == ["total", "75,290", "12,239,488"]
    assert len({len(line) for line in table}) == 1
