"""What the fields of ResNet, ResNet9 and VGG do, beyond what parity with PyTorch shows."""

from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_resnet as fr
from flax_resnet.models.freezing import is_frozen
from flax_resnet.models.layers import BatchNorm, GroupNorm
from flax_resnet.models.torch_weights import to_arrays

SMALL: dict[str, Any] = {
    "layers": (2, 3),
    "num_classes": 5,
    "widths": (8, 16),
    "strides": (1, 2),
    "cifar_stem": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "basic": {"block": fr.BasicBlock},
    "resnext, SE": {
        "block": fr.Bottleneck,
        "groups": 4,
        "width_per_group": 32,
        "squeeze_excite": True,
    },
    "wide preact": {"block": fr.PreActBasicBlock, "stem_width": 4},
    "preact": {"block": fr.PreActBottleneck},
    "group norm": {"block": fr.BasicBlock, "norm": "group"},
    "plain": {"block": fr.BasicBlock, "shortcut": "none"},
}


def small(kind="basic", **fields) -> Any:
    return fr.ResNet(**SMALL | KINDS[kind] | fields)


def images_of(rng, count=4, size=8):
    return jnp.asarray(rng.normal(size=(count, size, size, 3)), jnp.float32)


def init(model, x):
    # Compiling the random numbers would take many times longer than drawing them.
    options = {"xla_backend_optimization_level": "0"}
    program = jax.jit(partial(model.init, train=False), compiler_options=options)
    return program(jax.random.key(0), x)


@pytest.mark.parametrize(
    "kind", [k if k == "basic" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_scanned_blocks_are_the_same_blocks(kind, rng):
    x = images_of(rng)
    variables = init(small(kind), x)
    chex.assert_trees_all_equal(variables, init(small(kind, scan_blocks=True), x))

    def results(scan_blocks):
        model = small(kind, scan_blocks=scan_blocks)

        @jax.jit
        def compute(variables):
            def loss(params):
                outputs, updates = model.apply(
                    {**variables, "params": params},
                    x,
                    train=True,
                    features=True,
                    mutable=["batch_stats"],
                )
                return jnp.sum(jnp.sin(outputs["logits"])), (outputs, updates)

            gradient, trained = jax.grad(loss, has_aux=True)(variables["params"])
            return gradient, trained, model.apply(variables, x, train=False)

        return compute(variables)

    chex.assert_trees_all_close(results(False), results(True), rtol=1e-4, atol=1e-5)


class NoisyBlock(fr.BasicBlock):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5, deterministic=not train)(super().__call__(x, train))


def test_scanned_blocks_of_ones_own_get_the_dropout_key(rng):
    x = images_of(rng)
    model = small("basic", block=NoisyBlock, scan_blocks=True)
    variables = init(model, x)
    logits = [
        model.apply(
            variables, x, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(seed)}
        )[0]
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert not np.allclose(logits[0], logits[2])


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_a_norm_of_ones_own(scan_blocks, rng):
    x = images_of(rng)
    slow = partial(BatchNorm, momentum=0.99)
    model, usual = (small("basic", norm=norm, scan_blocks=scan_blocks) for norm in (slow, "batch"))
    variables = init(usual, x)
    (logits, moved), (expected, usually) = (
        m.apply(variables, x, train=True, mutable=["batch_stats"]) for m in (model, usual)
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-6)

    def steps(updates):
        return jax.tree.map(jnp.subtract, updates["batch_stats"], variables["batch_stats"])

    tenfold = jax.tree.map(lambda step: 10 * step, steps(moved))
    chex.assert_trees_all_close(tenfold, steps(usually), rtol=1e-3, atol=1e-5)


class ScaledBlock(fr.BasicBlock):
    @nn.compact
    def __call__(self, x, train):
        return self.param("gamma", nn.initializers.ones, ()) * super().__call__(x, train)


def test_parameters_of_other_names_keep_them(rng):
    x = images_of(rng)
    model = small("basic", block=ScaledBlock)
    variables = init(model, x)
    state_dict = to_arrays(variables)
    assert "layer1.1.gamma" in state_dict
    chex.assert_trees_all_equal(fr.from_torch(model, state_dict), variables)


@pytest.mark.parametrize("kind", ["basic", "preact"])
def test_features_are_what_lies_on_the_way(kind, rng):
    x = images_of(rng)
    model = small(kind, dtype=jnp.bfloat16)
    variables = init(model, x)
    apply = partial(jax.jit(model.apply, static_argnames=("train", "features")), variables, x)
    features = apply(train=False, features=True)
    expansion = model.block.expansion
    shapes = {name: value.shape for name, value in features.items()}
    assert shapes == {
        "stem": (4, 8, 8, 8),
        "layer1": (4, 8, 8, 8 * expansion),
        "layer2": (4, 4, 4, 16 * expansion),
        "pooled": (4, 16 * expansion),
        "logits": (4, 5),
    }
    dtypes = [features[name].dtype for name in ("stem", "layer1", "layer2", "pooled", "logits")]
    assert dtypes == [jnp.bfloat16] * 3 + [jnp.float32] * 2
    np.testing.assert_allclose(features["logits"], apply(train=False), atol=0.01)
    fc = variables["params"]["fc"]
    logits = features["pooled"] @ fc["kernel"] + fc["bias"][None]
    np.testing.assert_allclose(features["logits"], logits, rtol=1e-4, atol=1e-5)


SMALL_OTHERS = {
    "ResNet9": fr.ResNet9(num_classes=5, widths=(8, 12, 16, 24)),
    "VGG": fr.VGG((1, 1), num_classes=5, batch_norm=True, widths=(8, 16), hidden=12, dropout=0.0),
}


@pytest.mark.parametrize("model", SMALL_OTHERS.values(), ids=SMALL_OTHERS)
def test_fields_that_all_nets_have(model, rng):
    x = images_of(rng)
    variables = init(model, x)

    def train(**fields):
        options = {"mutable": ["batch_stats", "intermediates"], "capture_intermediates": True}
        apply = partial(model.clone(**fields).apply, train=True, **options)
        return jax.jit(apply)(variables, x)

    logits, updates = train()
    _, kept = train(frozen=("*",))
    chex.assert_trees_all_equal(kept["batch_stats"], variables["batch_stats"])
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(updates["batch_stats"], variables["batch_stats"])
    halves, _ = train(bn_splits=2)
    apart = [
        model.apply(variables, part, train=True, mutable=["batch_stats"])[0]
        for part in (x[:2], x[2:])
    ]
    size = np.linalg.norm(halves)
    assert np.linalg.norm(halves - np.concatenate(apart)) < 1e-4 * size
    assert np.linalg.norm(halves - logits) > 1e-2 * size
    _, half = train(dtype=jnp.bfloat16)
    convolutions = [
        value["__call__"][0].dtype
        for name, value in half["intermediates"].items()
        if name.startswith(("conv", "features"))
    ]
    assert set(convolutions) == {jnp.dtype(jnp.bfloat16)}


def test_frozen_statistics_are_named_by_module_or_leaf(rng):
    x = images_of(rng)
    variables = init(small(), x)
    for frozen, keeps in ((("*.running_*",), True), (("*.bn?",), True), (("*.weight",), False)):
        apply = partial(small(frozen=frozen).apply, train=True, mutable=["batch_stats"])
        _, updates = apply(variables, x)
        before, after = (v["batch_stats"]["layer1_0"]["bn1"] for v in (variables, updates))
        assert bool((before["mean"] == after["mean"]).all()) == keeps
    assert is_frozen(("params", "fc", "bias"), ("fc.bias",))
    assert not is_frozen(("params", "fc", "kernel"), ("fc.bias",))


def test_dropout_has_the_rate_that_is_asked_for(rng):
    x = images_of(rng)
    model = small("wide preact", dropout=0.3)
    variables = init(model, x)
    rates = []

    def look(call, arguments, options, context):
        if isinstance(context.module, nn.Dropout):
            rates.append(context.module.rate)
        return call(*arguments, **options)

    with nn.intercept_methods(look):
        model.apply(variables, x, train=False)
    assert rates == [0.3] * 5


def test_without_a_classifier_the_pooled_features_come_out(rng):
    x = images_of(rng)
    model, headless = small(), small(num_classes=0)
    variables = init(model, x)
    assert "fc" not in init(headless, x)["params"]
    features = model.apply(variables, x, train=False, features=True)
    pooled = headless.apply(variables, x, train=False)
    np.testing.assert_array_equal(pooled, features["pooled"])
    assert headless.apply(variables, x, train=False, features=True).keys() == {
        *("stem", "layer1", "layer2", "pooled")
    }


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (
            fr.ResNet9(num_classes=5, widths=(8, 12, 16, 24)),
            {
                "stem": (4, 8, 8, 8),
                "layer1": (4, 4, 4, 12),
                "layer2": (4, 2, 2, 16),
                "layer3": (4, 1, 1, 24),
                "pooled": (4, 24),
                "logits": (4, 5),
            },
        ),
        (
            fr.VGG((1, 1), num_classes=5, widths=(8, 16), hidden=12),
            {
                "layer1": (4, 4, 4, 8),
                "layer2": (4, 2, 2, 16),
                "pooled": (4, 12),
                "logits": (4, 5),
            },
        ),
    ],
)
def test_resnet9_and_vgg_have_features_too(model, shapes, rng):
    x = images_of(rng)
    variables = init(model, x)
    features = model.apply(variables, x, train=False, features=True)
    assert {name: value.shape for name, value in features.items()} == shapes
    np.testing.assert_array_equal(features["logits"], model.apply(variables, x, train=False))
    pooled = model.clone(num_classes=0).apply(variables, x, train=False)
    np.testing.assert_array_equal(pooled, features["pooled"])


def test_stochastic_depth_leaves_out_the_branches_of_examples(rng):
    """And scales the others up: to 1 / 0.75 of what it is without."""
    x = images_of(rng, count=256, size=4).repeat(3, axis=-1)[..., :8]
    block = fr.PreActBasicBlock(8)
    variables = block.init(jax.random.key(0), x, train=False)
    apply = partial(block.clone(stochastic_depth=0.25).apply, variables, x)
    branch = block.apply(variables, x, train=True, mutable=["batch_stats"])[0] - x
    key = jax.random.key(1)
    y, _ = apply(train=True, mutable=["batch_stats"], rngs={"dropout": key})
    again, _ = apply(train=True, mutable=["batch_stats"], rngs={"dropout": key})
    np.testing.assert_array_equal(y, again)
    kept = np.abs(y - x).max((1, 2, 3)) > 0
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 256)
    np.testing.assert_allclose((y - x)[kept], (branch / 0.75)[kept], rtol=1e-4, atol=1e-5)
    # Evaluation draws nothing, and has all branches as they are.
    np.testing.assert_array_equal(apply(train=False), block.apply(variables, x, train=False))


def test_stochastic_depth_grows_linearly_to_that_of_the_last_block():
    rates = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, fr.BasicBlock) and context.method_name == "__call__":
            rates.append(context.module.stochastic_depth)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        x = jnp.zeros((1, 8, 8, 3))
        jax.eval_shape(partial(small(stochastic_depth=0.5).init, train=False), jax.random.key(0), x)
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_stochastic_depth_reaches_every_block(scan_blocks, rng):
    """Blocks with rates of 0.4 and 0.8 are both left out, as in 0.32 of the examples."""
    model = small(
        "wide preact",
        layers=(2,),
        widths=(8,),
        strides=(1,),
        stem_width=8,
        stochastic_depth=0.8,
        scan_blocks=scan_blocks,
    )
    x = images_of(rng, count=256)
    apply = partial(
        jax.jit(model.apply, static_argnames=("train", "features", "mutable")), init(model, x), x
    )
    features, _ = apply(
        train=True, features=True, mutable="batch_stats", rngs={"dropout": jax.random.key(1)}
    )
    untouched = (features["stem"] == features["layer1"]).all((1, 2, 3)).mean()
    assert abs(untouched - 0.32) < 4 * np.sqrt(0.32 * 0.68 / 256)


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_dropout_draws_by_its_key_in_training_alone(scan_blocks, rng):
    model = small("wide preact", dropout=0.3, scan_blocks=scan_blocks)
    x = images_of(rng)
    variables = init(model, x)
    apply = jax.jit(
        lambda key: model.apply(
            variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )[0]
    )
    first, again, other = (apply(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    plain = small("wide preact")
    np.testing.assert_allclose(
        model.apply(variables, x, train=False), plain.apply(variables, x, train=False), rtol=1e-4
    )


def test_group_norm_has_no_statistics_and_takes_each_image_by_itself(rng):
    model = small("group norm")
    x = images_of(rng)
    variables = init(model, x)
    assert variables.keys() == {"params"}
    y, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert not updates
    np.testing.assert_allclose(y[:1], model.apply(variables, x[:1], train=False), rtol=1e-4)


def test_zero_init_reaches_group_norm(rng):
    x = images_of(rng)
    params = init(small("group norm", zero_init_residual=True), x)["params"]
    np.testing.assert_array_equal(params["layer1_0"]["bn2"]["scale"], 0)
    np.testing.assert_array_equal(params["layer1_0"]["bn1"]["scale"], 1)


def test_group_norm_computes_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 8)), jnp.bfloat16)
    norm = GroupNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    expected = GroupNorm().apply(variables, x)
    y = norm.apply(variables, x)
    np.testing.assert_array_equal(y, jnp.asarray(expected).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "layer"}, "norm is 'batch', 'group' or makes a module, not 'layer'"),
        ({"norm": "group", "bn_splits": 2}, "bn_splits=2 is for norm='batch'"),
        ({"norm": BatchNorm, "frozen": ("bn1",)}, "frozen is for norm='batch' and 'group'"),
        ({"deep_stem": True}, "cifar_stem and deep_stem"),
        ({"layers": (2, 0)}, r"layers are at least 1, not \(2, 0\)"),
        ({"strides": (0, 2)}, r"strides are at least 1, not \(0, 2\)"),
        ({"num_classes": -1}, "num_classes .* not -1"),
        ({"frozen": "layer1"}, "frozen is a sequence of names, not 'layer1'"),
        ({"dropout": 0.1}, "dropout is for PreActBasicBlock, not BasicBlock"),
        ({"block": fr.PreActBasicBlock, "dropout": 1.0}, "dropout is from 0 to below 1"),
        ({"stochastic_depth": -0.1}, "stochastic_depth is from 0 to below 1"),
        ({"stochastic_depth": 0.1, "shortcut": "none"}, "stochastic_depth needs a shortcut"),
        ({"zero_init_residual": True, "shortcut": "none"}, "zero_init_residual=True needs"),
        ({"zero_init_residual": True, "block": fr.PreActBottleneck}, "zero_init_residual=True"),
        ({"groups": 2}, "groups=2 .* BasicBlock"),
        ({"width_per_group": 128}, "width_per_group=128 .* BasicBlock"),
        ({"block": fr.Bottleneck, "width_per_group": 1}, "width_per_group=1 leave no channels"),
        ({"stem_width": 0}, "stem_width"),
        ({"tiered_stem": True}, "tiered_stem is for deep_stem=True"),
        ({"stem_pool": "mean"}, "stem_pool is 'max', 'max_of_zeros' or 'conv', not 'mean'"),
        ({"stem_pool": "conv"}, "stem_pool='conv' needs a pooling"),
        ({"antialias": "sinc"}, "antialias is 'none', 'average' or 'blur', not 'sinc'"),
        ({"squeeze_excite": True, "eca": True}, "squeeze_excite and eca are two attentions"),
        ({"squeeze_excite": True, "se_ratio": 0.0}, "se_ratio is above 0 and at most 1, not 0.0"),
        ({"replace_stride_with_dilation": (True,) * 3}, "one entry a stage but the first, not 3"),
        ({"output_stride": 5}, r"output_stride is one of \[1, 2, 4, 8, 16, 32\], not 5"),
        ({"output_stride": 2, "cifar_stem": False}, r"is one of \[4, 8, 16, 32\], not 2"),
        (
            {"output_stride": 8, "replace_stride_with_dilation": (True,)},
            "output_stride and replace_stride_with_dilation: set one of them",
        ),
        ({"stem_width": 1, "cifar_stem": False, "deep_stem": True}, "stem_width=1"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, message):
    model = small(**fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_the_least_that_fields_may_be():
    x = jnp.zeros((1, 8, 8, 3))
    model = small(block=fr.Bottleneck, width_per_group=8, output_stride=1)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    chex.assert_shape(variables["params"]["layer1_0"]["conv2"]["kernel"], (3, 3, 1, 1))
    features = jax.eval_shape(partial(model.apply, train=False, features=True), variables, x)
    chex.assert_shape(features["layer2"], (1, 8, 8, 64))


def test_splits_divide_the_batch():
    model = small(bn_splits=3)
    x = jnp.zeros((4, 8, 8, 3))
    with pytest.raises(ValueError, match="bn_splits=3 does not divide a batch of 4"):
        jax.eval_shape(partial(model.init, train=True), jax.random.key(0), x)


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (32, 32, 3), r"\[N, H, W, C\]"),
        ({}, (1, 32, 7, 3), "8 pixels a side or more, not 32x7"),
        ({"widths": (8, 16, 32)}, (1, 32, 32, 3), "widths are those of 4 parts, not 3"),
        ({"num_classes": -1}, (1, 32, 32, 3), "num_classes .* not -1"),
    ],
)
def test_resnet9_refuses_too(fields, shape, message):
    model = fr.cifar_resnet9(**fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"bn_splits": 2}, 32, "bn_splits=2 is for batch_norm=True"),
        ({"widths": (8,)}, 32, "layers and widths have one entry a stage, not 5 and 1"),
        ({"dropout": 1.0}, 32, "dropout is from 0"),
        ({"num_classes": -1}, 32, "num_classes .* not -1"),
        ({}, 16, "5 stages need images of 32 pixels, not of 16x40"),
    ],
)
def test_vgg_refuses_too(fields, size, message):
    model = fr.vgg11(**fields)
    x = jnp.zeros((1, size, 40, 3))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
