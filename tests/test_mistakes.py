"""Common mistakes in one's own code, and what is said of each."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_resnet as fr

MODEL = fr.cifar_resnet8()
DROPS = fr.cifar_resnet8(stochastic_depth=0.1)
KEY = jax.random.key(0)
X = np.zeros((2, 32, 32, 3), np.float32)
NCHW = X.transpose(0, 3, 1, 2)
SHAPES: Any = jax.eval_shape(partial(MODEL.init, train=False), KEY, X)
VARIABLES = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), SHAPES)
PARAMS, BATCH_STATS = VARIABLES["params"], VARIABLES["batch_stats"]
OTHER = fr.cifar_resnet20()


class Module:
    """What from_torch sees of a torch.nn.Module."""

    def state_dict(self): ...


class Tensor:
    """What a model sees of a torch.Tensor."""

    shape, dtype, ndim, detach = (2, 3, 32, 32), "torch.float32", 4, None


LOOKS_LIKE_NCHW = (
    "images are [N, H, W, C], and (2, 3, 32, 32) looks like [N, C, H, W]: write "
    "x.transpose(0, 2, 3, 1)"
)
WEIGHTS = 'write fr.create_model("resnet18", weights="timm/resnet18.a1_in1k")'
ALL_VARIABLES = (
    'variables are {"params": ..., "batch_stats": ...}, as model.init gives them, not a dict of '
    "bn1, conv1, fc, layer1_0, layer2_0 and 1 more: "
)

MISTAKES = {
    # Images.
    "NCHW images in init": (lambda: MODEL.init(KEY, NCHW, train=False), LOOKS_LIKE_NCHW),
    "NCHW images in apply": (lambda: MODEL.apply(VARIABLES, NCHW, train=False), LOOKS_LIKE_NCHW),
    "NCHW images in training": (
        lambda: MODEL.apply(VARIABLES, NCHW, train=True, mutable=["batch_stats"]),
        LOOKS_LIKE_NCHW,
    ),
    "small NCHW images": (
        lambda: MODEL.apply(VARIABLES, NCHW[:, :, :8, :8], train=False),
        LOOKS_LIKE_NCHW.replace("32, 32", "8, 8"),
    ),
    "gray images": (
        lambda: MODEL.apply(VARIABLES, X[..., :1], train=False),
        "the variables are for 3 channels, not images of 1: write x.repeat(3, axis=-1)",
    ),
    "images with alpha": (
        lambda: MODEL.apply(VARIABLES, np.zeros((2, 32, 32, 4), np.float32), train=False),
        "the variables are for 3 channels, not images of 4: init the model with such images",
    ),
    "one image": (
        lambda: MODEL.apply(VARIABLES, X[0], train=False),
        "images are [N, H, W, C], not of shape (32, 32, 3): write x[None] for one image",
    ),
    "bytes": (
        lambda: MODEL.apply(VARIABLES, X.astype(np.uint8), train=False),
        "images are normalised floats, not uint8: write flax_resnet.data.normalize(x, mean, std)",
    ),
    "a tensor": (
        lambda: MODEL.apply(VARIABLES, Tensor(), train=False),
        "images are an array of JAX or NumPy, not a torch.Tensor: write x.numpy()",
    ),
    "a list": (
        lambda: MODEL.apply(VARIABLES, [X[0], X[1]], train=False),
        "images are one array [N, H, W, C], not a list: write jnp.asarray(x)",
    ),
    # Calls.
    "a call as in PyTorch": (
        lambda: MODEL(X, train=False),
        "a model holds no variables: write variables = model.init(key, x, train=False), then "
        "model.apply(variables, x, train=False). Inside a module make it one of its fields, or "
        'call model.clone(parent=self, name="backbone")(x, train)',
    ),
    "no train": (
        lambda: MODEL.apply(VARIABLES, X),
        "ResNet has to be told whether it trains: write model.apply(variables, x, train=False)",
    ),
    "training for train": (
        lambda: MODEL.apply(VARIABLES, X, training=True),
        "ResNet has to be told whether it trains: write model.apply(variables, x, train=False)",
    ),
    "no mutable": (
        lambda: MODEL.apply(VARIABLES, X, train=True),
        "training moves the running statistics of BatchNorm: write logits, updates = "
        'model.apply(variables, x, train=True, mutable=["batch_stats"])',
    ),
    "no rngs": (
        lambda: DROPS.apply(VARIABLES, X, train=True, mutable=["batch_stats"]),
        "training draws random numbers here: write logits, updates = model.apply(variables, x, "
        'train=True, mutable=["batch_stats"], rngs={"dropout": key})',
    ),
    # Variables.
    "params alone": (
        lambda: MODEL.apply(PARAMS, X, train=False),
        ALL_VARIABLES + "write model.apply(variables, x, train=False)",
    ),
    "no batch_stats": (
        lambda: MODEL.apply({"params": PARAMS}, X, train=False),
        'the variables lack "batch_stats", the statistics of BatchNorm: write '
        'model.apply({"params": params, "batch_stats": batch_stats}, x, train=False)',
    ),
    "variables for other classes": (
        lambda: MODEL.clone(num_classes=7).apply(VARIABLES, X, train=False),
        "the variables are for 10 classes, not 7: write model.clone(num_classes=10), or init the "
        "model anew",
    ),
    "variables of another model": (
        lambda: OTHER.apply(VARIABLES, X, train=False),
        'the variables are of another model: could not find parameter named "kernel" in scope '
        '"/layer1_1/conv1".',
    ),
    # Models by name.
    "pretrained": (
        lambda: fr.resnet18(pretrained=True),
        f"resnet18 has no field 'pretrained': {WEIGHTS}",
    ),
    "pretrained, first": (
        lambda: fr.resnet18(True),
        f"resnet18 takes its fields by name, not True: {WEIGHTS}",
    ),
    "classes, first": (
        lambda: fr.resnet18(10),
        "resnet18 takes its fields by name, not 10: write fr.resnet18(num_classes=10)",
    ),
    "num_class": (
        lambda: fr.resnet18(num_class=10),
        "resnet18 has no field 'num_class': did you mean num_classes?",
    ),
    "weights=True": (
        lambda: fr.create_model("resnet18", weights=True),  # pyright: ignore[reportArgumentType, reportCallIssue]
        f"weights are a path or the id of a Hub repository, not True: {WEIGHTS}",
    ),
    "torchvision's weights": (
        lambda: fr.create_model("resnet18", weights="DEFAULT"),
        "DEFAULT is neither a file nor the id of a Hub repository, which looks like "
        "timm/resnet18.a1_in1k",
    ),
    "a function for a name": (
        lambda: fr.create_model(fr.resnet18),  # pyright: ignore[reportArgumentType, reportCallIssue]
        "name is one of fr.list_models(), not a function",
    ),
    "another spelling": (
        lambda: fr.create_model("ResNet-18"),
        "unknown model 'ResNet-18': did you mean resnet18, resnet18d, seresnet18?",
    ),
    # Models by class.
    "a block by name": (
        lambda: fr.ResNet("BasicBlock", (1,)).init(KEY, X, train=False),  # pyright: ignore[reportArgumentType]
        "block is a class such as fr.BasicBlock, not a str",
    ),
    "a number of layers": (
        lambda: fr.ResNet(fr.BasicBlock, 18).init(KEY, X, train=False),  # pyright: ignore[reportArgumentType]
        "layers is a tuple with one entry a stage, not 18",
    ),
    "classes as text": (
        lambda: fr.cifar_resnet8(num_classes="10").init(KEY, X, train=False),
        "num_classes is a whole number, not '10'",
    ),
    "an unknown type": (
        lambda: fr.cifar_resnet8(dtype="bf16").init(KEY, X, train=False),
        "dtype is a float type such as jnp.bfloat16, not 'bf16'",
    ),
    "a type of integers": (
        lambda: fr.cifar_resnet8(dtype=jnp.int32).init(KEY, X, train=False),
        "dtype is a float type such as jnp.bfloat16, not <class 'jax.numpy.int32'>",
    ),
    "no type": (
        lambda: fr.cifar_resnet8(dtype=None).init(KEY, X, train=False),  # pyright: ignore[reportArgumentType]
        "dtype is a float type such as jnp.bfloat16, not None",
    ),
    "a frozen name of Flax, without a classifier": (
        lambda: fr.cifar_resnet8(num_classes=0, frozen=("fc", "layer1_0")).init(
            KEY, X, train=False
        ),
        "frozen: nothing in the model is called 'layer1_0': did you mean layer1.0, layer1?",
    ),
    "a normalisation of Flax": (
        lambda: MODEL.clone(block=fr.PreActBasicBlock, norm=nn.LayerNorm).init(KEY, X, train=False),
        "norm is called with train first, which LayerNorm takes for something else: give it a "
        "function, def norm(train, *, dtype, name, zero_init=False)",
    ),
    "a frozen name of Flax": (
        lambda: MODEL.clone(frozen=("layer1_0",)).apply(VARIABLES, X, train=False),
        "frozen: nothing in the model is called 'layer1_0': did you mean layer1.0, layer1?",
    ),
    # Weights.
    "several models": (
        lambda: fr.to_torch(MODEL, jax.tree.map(lambda a: jnp.stack([a] * 5), VARIABLES)),
        "these are the variables of 5 models: write jax.tree.map(lambda array: array[0], "
        "variables)",
    ),
    "a torch module": (
        lambda: fr.from_torch(MODEL, Module()),  # pyright: ignore[reportArgumentType]
        "from_torch takes a state_dict, which is a dict of tensors, or the path of one, not a "
        "tests.test_mistakes.Module: write model.state_dict()",
    ),
    "a state_dict first": (
        lambda: fr.from_torch({}, MODEL),  # pyright: ignore[reportArgumentType]
        "a model is a flax.linen.Module, not a dict: write fr.from_torch(model, state_dict)",
    ),
    "variables for a state_dict": (
        lambda: fr.from_torch(MODEL, VARIABLES),
        "these are the variables of a Flax model already, and no state_dict",
    ),
    "save_weights of params": (
        lambda: fr.save_weights(MODEL, PARAMS, "net.safetensors"),
        ALL_VARIABLES + "give it all of them",
    ),
    "save_weights without batch_stats": (
        lambda: fr.save_weights(MODEL, {"params": PARAMS}, "net.safetensors"),
        'without "batch_stats" the statistics of BatchNorm are lost: write {"params": params, '
        '"batch_stats": batch_stats}',
    ),
    # Summaries.
    "a function for a model": (
        lambda: fr.summary(fr.resnet18, 224),  # pyright: ignore[reportArgumentType]
        "a model is a flax.linen.Module, not a function: write fr.resnet18()",
    ),
    "a name for a model": (
        lambda: fr.summary("resnet18", 224),  # pyright: ignore[reportArgumentType]
        'a model is a flax.linen.Module, not a str: write fr.create_model("resnet18")',
    ),
    "channels in the size": (
        lambda: fr.summary(MODEL, (32, 32, 3)),  # pyright: ignore[reportArgumentType]
        "image_size is a number of pixels or (height, width), not (32, 32, 3): write "
        "fr.summary(model, (224, 224), channels=3)",
    ),
    # Data and runs.
    "float images in a data set": (
        lambda: fr.Dataset(X, np.zeros(2, np.int32), ("cat", "dog")),
        "images must be uint8 of shape [N, H, W, C], from 0 to 255, not float32 of shape "
        "[2, 32, 32, 3]",
    ),
    "a recipe's path for a config": (
        lambda: fr.train("configs/digits_resnet8.py", "run"),  # pyright: ignore[reportArgumentType]
        "a config is what fr.default_config() gives, or a dict, not 'configs/digits_resnet8.py'",
    ),
    "a key that is none": (
        lambda: fr.train({"epochs": 3}, "run"),
        "unknown config key 'epochs': did you mean 'num_epochs'?",
    ),
    "a name for train's model": (
        lambda: fr.train(fr.default_config(), "run", model="resnet18"),  # pyright: ignore[reportArgumentType]
        "model is a flax.linen.Module, not a str",
    ),
    "a folder that is no run": (
        lambda: fr.load_run("/"),
        "/ is not the folder of a run: it has no config.json",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = MISTAKES[name]
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert str(error.value) == message
    assert not list(tmp_path.iterdir())


def test_what_is_said_under_jit():
    with pytest.raises(ValueError, match=r"write x\.transpose\(0, 2, 3, 1\)"):
        jax.jit(partial(MODEL.apply, train=False))(VARIABLES, NCHW)


def test_what_only_looks_like_a_mistake():
    """Signals and feature maps of odd shapes, and sizes as NumPy counts them."""
    for shape in ((2, 1, 128, 12), (2, 4, 4, 64), (2, 3, 7, 8), (2, 1, 1, 3), (2, 32, 3, 3)):
        jax.eval_shape(partial(MODEL.init, train=False), KEY, jnp.zeros(shape))
    size: Any = np.int64(32)
    assert fr.summary(MODEL, size) == fr.summary(MODEL, (size, 32)) == fr.summary(MODEL, 32)


def test_errors_of_ones_own_modules_stay_as_they_are():
    class Draws(fr.BasicBlock):
        @nn.compact
        def __call__(self, x, train):
            return x + self.make_rng("noise").ndim

    model = MODEL.clone(block=Draws, widths=(16, 16, 16))
    with pytest.raises(Exception, match='needs PRNG for "noise"'):
        jax.eval_shape(partial(model.apply, train=False), VARIABLES, X)


def test_of_many_names_five_are_said():
    with pytest.raises(ValueError, match="other names than the model") as error:
        fr.from_torch(fr.cifar_resnet110(), {f"block{i}.weight": X for i in range(1000)})
    assert len(str(error.value)) < 300
    assert "block4.weight and 995 more" in str(error.value)
