"""Sizes, shapes and initial values of the models."""

import ast
import inspect
import pickle
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import flax_resnet as fr
from flax_resnet.models.layers import BatchNorm, SqueezeExcite
from flax_resnet.models.variants import VARIANTS
from tests.models.test_fields import init

# torchvision's documentation: num_params of its published weights.
TORCHVISION = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
}
# Millions, as published: timm's results tables; He et al. table 6; He et al. 2016 table 4;
# Zagoruyko and Komodakis table 4.
MILLIONS = {
    "resnet18d": "11.71",
    "resnet34d": "21.82",
    "resnet50d": "25.58",
    "resnet101d": "44.57",
    "resnet152d": "60.21",
    "seresnet50": "28.09",
    "seresnet101": "49.33",
    "seresnet152": "66.82",
    "cifar_resnet20": "0.27",
    "cifar_resnet32": "0.46",
    "cifar_resnet44": "0.66",
    "cifar_resnet56": "0.85",
    "cifar_resnet110": "1.7",
    "cifar_resnet1202": "19.4",
    "cifar_preact_resnet164": "1.7",
    "cifar_wrn16_8": "11.0",
    "cifar_wrn28_10": "36.5",
}
# Arithmetic on the layers, or the count of the twin in torch_resnet.py.
PARAMETERS = TORCHVISION | {
    "resnet18d": 11_708_744,
    "resnet34d": 21_816_904,
    "resnet50d": 25_576_264,
    "resnet101d": 44_568_392,
    "resnet152d": 60_212_040,
    "seresnet50": 28_088_024,
    "seresnet101": 49_326_872,
    "seresnet152": 66_821_848,
    "plain18": 11_515_688,
    "plain34": 21_623_848,
    "cifar_resnet18": 11_173_962,
    "cifar_resnet34": 21_282_122,
    "cifar_resnet50": 23_520_842,
    "cifar_resnet101": 42_512_970,
    "cifar_resnet152": 58_156_618,
    "cifar_resnet8": 75_290,
    "cifar_resnet9": 6_573_120,
    "cifar_resnet20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "cifar_resnet1202": 19_421_274,
    # Identity shortcuts have no parameters to lose.
    "cifar_plain20": 269_722,
    "cifar_plain32": 464_154,
    "cifar_plain44": 658_586,
    "cifar_plain56": 853_018,
    "cifar_preact_resnet18": 11_172_170,
    "cifar_preact_resnet164": 1_703_258,
    "cifar_preact_resnet1001": 10_327_706,  # 10.2 M in the paper's table 4
    "cifar_wrn16_8": 10_961_370,
    "cifar_wrn28_10": 36_479_194,
    "lab10_resnet50": 1_484_186,
}


def init_shapes(model, shape=(1, 32, 32, 3)):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))


def test_every_model_has_its_count_here_or_is_one_of_timm():
    """Those have theirs in test_timm.py."""
    others = [name for name in fr.list_models() if name not in PARAMETERS]
    assert set(PARAMETERS) <= set(fr.list_models())
    assert all(VARIANTS[name].hub_id() or name in ("seresnet18", "seresnet34") for name in others)


def deep_is_slow(name):
    """A name to parametrize with; nets of 100 layers and more take seconds."""
    deep = any(int(number) >= 100 for number in re.findall(r"\d+", name))
    return pytest.param(name, marks=pytest.mark.slow) if deep else name


# One test, so that a net is traced but once in each type.
@pytest.mark.parametrize("name", [deep_is_slow(name) for name in PARAMETERS])
def test_parameter_count_and_float32_logits(name):
    model = fr.create_model(name)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    init = partial(model.init_with_output, train=False)
    logits, variables = jax.eval_shape(init, jax.random.key(0), x)
    count = sum(p.size for p in jax.tree.leaves(variables["params"]))
    assert count == PARAMETERS[name]
    assert float(f"{count / 1e6:.4g}") == VARIANTS[name].parameters
    if published := MILLIONS.get(name):
        assert f"{count / 1e6:.{len(published.partition('.')[2])}f}" == published

    half = fr.create_model(name, dtype=jnp.bfloat16)
    if isinstance(model, fr.ResNet):
        half = half.clone(scan_blocks=True)  # is traced sooner
    of_half = jax.eval_shape(partial(half.apply, train=False), variables, x)
    for result in (logits, of_half):
        assert (result.shape, result.dtype) == ((2, model.num_classes), jnp.float32)


def test_the_tables_of_models_are_up_to_date():
    root = Path(__file__).parents[2]
    text = (root / "docs" / "models.md").read_text()
    overview = runpy.run_path(str(root / "benchmarks" / "models.py"))["overview"]()
    assert "\n".join(overview) in text
    assert sorted(re.findall(r"`(\w+)`", "".join(overview))) == sorted(fr.list_models())
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d.]+) \| (\d+) \|", text, re.MULTILINE)
    assert [name for name, *_ in rows] == fr.list_models()
    for name, parameters, giga, pixels in rows:
        count, variant = int(parameters.replace(",", "")), VARIANTS[name]
        assert PARAMETERS.get(name, count) == count
        assert float(f"{count / 1e6:.4g}") == variant.parameters
        assert (float(giga), int(pixels)) == (variant.multiply_adds, variant.pixels)


@pytest.mark.parametrize("name", fr.list_models())
def test_constructor_is_a_public_function_under_its_name(name):
    make = getattr(fr, name)
    assert make() == fr.create_model(name)
    assert (make.__name__, inspect.isfunction(make), pickle.loads(pickle.dumps(make))) == (
        name,
        True,
        make,
    )
    variant = VARIANTS[name]
    text = " ".join(make.__doc__.split())
    sizes = (f"{variant.parameters:g} million", f"{variant.multiply_adds:g} * 10^9")
    for said in (variant.paper, *sizes, variant.hub_id() or variant.weights or "none"):
        assert said in text
    for field, parameter in inspect.signature(make).parameters.items():
        if field != "name":
            assert getattr(make(), field) == parameter.default


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("num_class", r"did you mean num_classes\?"),
        ("pretrained", r'write fr\.create_model\("resnet26d", weights="timm/resnet26d\.bt_in1k"\)'),
        ("block", r"write fr\.resnet26d\(\)\.clone\(block=\.\.\.\)"),
        ("colour", r"help\(fr\.resnet26d\) lists its fields"),
    ],
)
def test_field_that_is_none(field, hint):
    fields: dict[str, Any] = {field: 1}
    for make in (fr.resnet26d, partial(fr.create_model, "resnet26d")):
        with pytest.raises(TypeError, match=f"^resnet26d has no field '{field}': {hint}$"):
            make(**fields)


# (height and width, channels) of the lesson's net, of torchvision's, and of He et al.'s.
STAGES = {
    "lab10_resnet50": (32, [(32, 64), (32, 128), (16, 256), (8, 512)]),
    "resnet50": (224, [(56, 256), (28, 512), (14, 1024), (7, 2048)]),
    "cifar_resnet20": (32, [(32, 16), (16, 32), (8, 64)]),
}


@pytest.mark.parametrize("name", STAGES)
def test_shapes_of_the_stages(name):
    size, expected = STAGES[name]
    model = fr.create_model(name)
    shape = (2, size, size, 3)
    variables = init_shapes(model, shape)

    def apply(variables):
        x = jnp.zeros(shape)
        return model.apply(variables, x, train=False, capture_intermediates=True)

    logits, captured = jax.eval_shape(apply, variables)
    outputs = {k: v["__call__"][0] for k, v in captured["intermediates"].items() if "layer" in k}
    lasts = [f"layer{i}_{blocks - 1}" for i, blocks in enumerate(model.layers, start=1)]
    assert [outputs[k].shape for k in lasts] == [(2, s, s, c) for s, c in expected]
    assert logits.shape == (2, model.num_classes)


@pytest.mark.parametrize(
    ("name", "size", "reductions"),
    [
        ("cifar_resnet18", (48, 48), (1, 1, 2, 4, 8)),
        ("cifar_resnet18", (31, 57), (1, 1, 2, 4, 8)),
        ("cifar_resnet20", (64, 40), (1, 1, 2, 4)),
        ("resnet18", (96, 96), (4, 4, 8, 16, 32)),
        ("resnet50", (97, 161), (4, 4, 8, 16, 32)),
        ("resnet18", (1, 1), (4, 4, 8, 16, 32)),
    ],
)
def test_images_of_any_size(name, size, reductions):
    model = fr.create_model(name)
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    apply = partial(model.apply, train=False, features=True)
    outputs = jax.eval_shape(apply, init_shapes(model), images)
    stages = ["stem", *(f"layer{i}" for i in range(1, len(reductions)))]
    for stage, reduction in zip(stages, reductions, strict=True):
        assert outputs[stage].shape[1:3] == tuple(-(-side // reduction) for side in size)
    assert outputs["logits"].shape == (2, model.num_classes)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet18", "lab10_resnet50"])
def test_projection_stands_exactly_where_the_shape_changes(name):
    model = fr.create_model(name)
    params = init_shapes(model)["params"]
    expected, channels = set(), model.widths[0]
    stages = zip(model.layers, model.widths, model.strides, strict=True)
    for stage, (_, planes, stride) in enumerate(stages, start=1):
        if stride != 1 or channels != planes * model.block.expansion:
            expected.add(f"layer{stage}_0")
        channels = planes * model.block.expansion
    assert {k for k, v in params.items() if "downsample_conv" in v} == expected
    assert {k for k, v in params.items() if "downsample_bn" in v} == expected


@pytest.mark.parametrize("block", [fr.BasicBlock(8), fr.Bottleneck(2)])
@pytest.mark.parametrize("train", [False, True])
def test_zero_init_block_starts_as_the_identity(block, train, rng):
    block = block.clone(zero_init_residual=True)
    x = jnp.asarray(np.abs(rng.normal(size=(2, 6, 6, 8))), jnp.float32)
    variables = block.init(jax.random.key(0), x, train=False)
    y, _ = block.apply(variables, x, train=train, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, x)
    # Without it the block does something.
    block = block.clone(zero_init_residual=False)
    y, _ = block.apply(
        block.init(jax.random.key(0), x, train=False), x, train=train, mutable=["batch_stats"]
    )
    assert np.abs(y - x).max() > 0.1


@pytest.mark.parametrize(("block", "last"), [(fr.BasicBlock, "bn2"), (fr.Bottleneck, "bn3")])
def test_zero_init_reaches_the_last_norm_of_each_block_alone(block, last):
    model = fr.ResNet(block, (2, 1), widths=(4, 8), strides=(1, 2), zero_init_residual=True)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)["params"]
    for path, scale in flatten_dict(params).items():
        if path[-1] == "scale":
            expected = 0 if path[0].startswith("layer") and path[-2] == last else 1
            np.testing.assert_array_equal(scale, expected, str(path))


def test_initial_values_are_those_of_torch():
    model = fr.resnet18()
    variables = init(model, jnp.zeros((1, 64, 64, 3)))
    for path, value in flatten_dict(variables["params"]).items():
        value = np.asarray(value)
        if value.ndim == 4:  # Kaiming normal by fan_out
            height, width, _, features = value.shape
            expected = np.sqrt(2 / (height * width * features))
            # The standard error of a deviation is 1 / sqrt(2 n) of it; 5 of them.
            assert abs(value.std() / expected - 1) < 5 / np.sqrt(2 * value.size), path
            assert abs(value.mean()) < 5 * expected / np.sqrt(value.size), path
        elif path[0] == "fc":  # uniform within 1 / sqrt(fan_in)
            limit = 512**-0.5
            assert 0.99 * limit < np.abs(value).max() <= limit, path
            assert abs(value.std() / (limit / np.sqrt(3)) - 1) < 0.1, path
        else:
            np.testing.assert_array_equal(value, path[-1] == "scale", str(path))
    for path, value in flatten_dict(variables["batch_stats"]).items():
        np.testing.assert_array_equal(value, path[-1] == "var", str(path))


def test_initial_biases_of_squeeze_excite_are_those_of_torch():
    params: Any = SqueezeExcite().init(jax.random.key(0), jnp.zeros((1, 1, 1, 512)))["params"]
    for name, fan_in in (("fc1", 512), ("fc2", 32)):
        limit = fan_in**-0.5
        assert 0.9 * limit < np.abs(params[name]["bias"]).max() <= limit


def test_statistics_move_in_training_only(rng):
    model = fr.cifar_resnet8()
    x = jnp.asarray(rng.normal(1.0, 2.0, size=(4, 8, 8, 3)), jnp.float32)
    variables = init(model, x)
    apply = jax.jit(partial(model.apply, mutable=["batch_stats"]), static_argnames="train")
    _, updates = apply(variables, x, train=False)
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])
    _, updates = apply(variables, x, train=True)
    for path, value in flatten_dict(updates["batch_stats"]).items():
        assert (np.asarray(value) != int(path[-1] == "var")).all(), path


def test_stacked_blocks_are_the_same_blocks(rng):
    model = fr.ResNet(
        fr.BasicBlock, (12, 1, 2), 5, widths=(4, 8, 8), strides=(1, 2, 1), scan_blocks=True
    )
    x = jnp.asarray(rng.normal(size=(4, 32, 32, 3)), jnp.float32)
    variables = init(model, x)
    stacked = fr.stack_blocks(variables)
    assert [name for name in stacked["params"] if name.startswith("layer")] == [
        "layer1_0",
        "layer2_0",
        "layer3_0",
        "layer1_rest",
        "layer3_rest",
    ]
    chex.assert_trees_all_equal(fr.unstack_blocks(stacked), variables)
    chex.assert_trees_all_equal(fr.stack_blocks(stacked), stacked)
    with pytest.raises(ValueError, match="the blocks are stacked, for scan_blocks=True"):
        model.clone(scan_blocks=False).apply(stacked, x, train=False)
    deeper = model.clone(layers=(14, 1, 2))
    for variables_of_another in (variables, stacked):
        with pytest.raises(ValueError, match="another model: layer1 has 12 blocks there, not 14"):
            deeper.apply(variables_of_another, x, train=False)
    # As optax.masked has it, a part without arrays beside one that has them.
    none = jax.tree.map(lambda _: None, stacked)
    both = fr.unstack_blocks({"some": stacked, "none": none})
    assert set(both["none"]["params"]) == set(both["some"]["params"]) == set(variables["params"])
    with pytest.raises(ValueError, match="nothing tells how many blocks layer1_rest stands for"):
        fr.unstack_blocks(none)
    with pytest.raises(ValueError, match=r"unstack_blocks\(variables\)"):
        fr.to_torch(model, stacked)

    @partial(jax.jit, static_argnames="train")
    def apply(variables, train):
        return model.apply(variables, x, train=train, mutable=["batch_stats"])

    def params_of(variables):  # training begins without batch_stats, too
        return {"params": variables["params"]}

    calls = [(variables, stacked, train) for train in (False, True)]
    for one, other, train in [*calls, (params_of(variables), params_of(stacked), True)]:
        logits, updates = apply(one, train=train)
        stacked_logits, stacked_updates = apply(other, train=train)
        chex.assert_trees_all_close(
            (stacked_logits, fr.unstack_blocks(stacked_updates)), (logits, updates), rtol=1e-6
        )


@pytest.mark.parametrize("stacked", [False, True])
def test_scanned_blocks_do_not_grow_the_program(stacked):
    def size(blocks, scan_blocks):
        model = fr.ResNet(fr.BasicBlock, (blocks,) * 4, cifar_stem=True, scan_blocks=scan_blocks)
        apply = partial(model.apply, train=False)
        x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        variables = init_shapes(model)
        if stacked and scan_blocks:
            variables = jax.eval_shape(fr.stack_blocks, variables)
        text = jax.jit(apply).lower(variables, x).as_text()
        return text.count(" = ") if stacked else text.count("stablehlo.rsqrt")

    assert size(9, False) > 2 * size(4, False)
    assert size(9, True) == size(4, True)


@pytest.mark.parametrize("splits", [1, 2])
def test_every_split_of_a_batch_is_normalised_by_itself(splits, rng):
    x = rng.normal(1.0, 2.0, size=(6, 4, 3, 5)).astype(np.float32)
    norm = BatchNorm(train=True, splits=splits)
    variables = BatchNorm(train=False).init(jax.random.key(0), x)
    y, updates = norm.apply(variables, x, mutable=["batch_stats"])
    running: Any = updates["batch_stats"]
    parts = np.split(np.float64(x), splits)
    means, variances = (np.stack([f(p, axis=(0, 1, 2)) for p in parts]) for f in (np.mean, np.var))
    expected = [
        (p - m) / np.sqrt(v + 1e-5) for p, m, v in zip(parts, means, variances, strict=True)
    ]
    np.testing.assert_allclose(y, np.concatenate(expected), atol=1e-5)
    np.testing.assert_allclose(running["mean"], 0.1 * means.mean(0), rtol=1e-5)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * variances.mean(0), rtol=1e-5)


def test_bfloat16_computes_near_float32_and_keeps_float32_variables(rng):
    x = jnp.asarray(rng.normal(size=(8, 32, 32, 3)), jnp.float32)
    model, half = fr.cifar_resnet8(), fr.cifar_resnet8(dtype=jnp.bfloat16)
    variables, initial = (init(net, x) for net in (model, half))
    chex.assert_trees_all_equal(initial, variables)
    apply = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    expected, expected_updates = apply(variables, x)
    options: Any = {"mutable": ["batch_stats", "intermediates"], "capture_intermediates": True}
    logits, updates = jax.jit(partial(half.apply, train=True, **options))(variables, x)
    assert logits.dtype == jnp.float32
    blocks = {k: v["__call__"][0] for k, v in updates["intermediates"].items() if "layer" in k}
    assert {v.dtype for v in blocks.values()} == {jnp.dtype(jnp.bfloat16)}
    # bfloat16 keeps 8 bits; 8 layers of it.
    assert np.linalg.norm(logits - expected) < 0.03 * np.linalg.norm(expected)
    for ours, theirs in zip(
        jax.tree.leaves(updates["batch_stats"]),
        jax.tree.leaves(expected_updates["batch_stats"]),
        strict=True,
    ):
        assert ours.dtype == jnp.float32
        assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


def test_identity_shortcut_subsamples_and_pads_with_zeros(rng):
    block = fr.BasicBlock(8, stride=2, shortcut="identity", zero_init_residual=True)
    x = jnp.asarray(np.abs(rng.normal(size=(1, 5, 6, 4))), jnp.float32)
    y = block.apply(block.init(jax.random.key(0), x, train=False), x, train=False)
    expected = np.zeros((1, 3, 3, 8), np.float32)
    expected[..., 2:6] = x[:, ::2, ::2]
    np.testing.assert_array_equal(y, expected)


class Unpadded(fr.BasicBlock):
    """A block whose author forgot the padding."""

    @nn.compact
    def __call__(self, x, train):
        branch = nn.Conv(self.planes, (3, 3), padding="VALID")(x)
        return self.join(branch, self.downsample(x, train), train)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (fr.cifar_resnet8(), (32, 32, 3), r"\[N, H, W, C\]"),
        (fr.cifar_resnet8(strides=(1, 2)), (1, 32, 32, 3), "one entry a stage"),
        (fr.cifar_resnet8(shortcut="A"), (1, 32, 32, 3), "not 'A'"),
        (fr.cifar_resnet8(widths=(16, 8, 64)), (1, 32, 32, 3), "from 16 to 8 channels"),
        (fr.resnetaa50(), (1, 48, 48, 3), r"2, 2048\]: with antialias='average' an image's sides"),
        (
            fr.cifar_resnet8().clone(block=Unpadded),
            (1, 8, 8, 3),
            r"the shortcut \[1, 8, 8, 16\](\n|$)",
        ),
    ],
)
def test_what_cannot_be_built_says_why(model, shape, message):
    with pytest.raises(ValueError, match=message):
        init_shapes(model, shape)


def test_unknown_names_are_refused_with_a_hint():
    with pytest.raises(ValueError, match="'resnet19': did you mean resnet18"):
        fr.create_model("resnet19")
    with pytest.raises(ValueError, match=r"'resnet20': did you mean cifar_resnet20\?$"):
        fr.create_model("resnet20")
    with pytest.raises(TypeError, match="num_clases"):
        fr.create_model("resnet18", num_clases=10)


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("models", ("flax_resnet.models",)),
        (
            "data",
            (
                *("flax_resnet.data", "flax_resnet.errors", "flax_resnet.progress"),
                "flax_resnet.models.caches",
            ),
        ),
    ],
)
def test_dependencies_point_one_way(folder, allowed):
    for path in (Path(fr.__file__).parent / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names]
                ours = [n for n in names if n and n.startswith("flax_resnet")]
                assert all(n.startswith(allowed) for n in ours), path
