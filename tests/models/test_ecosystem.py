"""The models under JAX's and Flax's own tools, in code that knows nothing of this package."""

import subprocess
import sys
from functools import partial
from importlib import resources
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_resnet as fr

MODEL = fr.ResNet(fr.BasicBlock, (1, 1), num_classes=3, widths=(8, 16), strides=(1, 2))
SHAPE = (2, 16, 16, 3)
predict: Any = partial(MODEL.apply, train=False)


def draw(model):
    images = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    shapes = jax.eval_shape(lambda: model.lazy_init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(0)
    # Not drawn by `init`: XLA takes seconds to compile that for a CPU.
    return jax.tree.map(lambda s: jnp.array(rng.uniform(0, 0.3, s.shape), s.dtype), shapes)


@pytest.fixture(scope="module")
def variables():
    return draw(MODEL)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def expected(variables, images):
    return predict(variables, images)


def test_jit(variables, images, expected):
    chex.assert_trees_all_close(jax.jit(predict)(variables, images), expected, rtol=1e-4)


def test_vmap_over_models_and_over_images(variables, images, expected):
    models = jax.tree.map(lambda *v: jnp.stack(v), variables, variables)
    logits = jax.jit(jax.vmap(predict, (0, None)))(models, images)
    chex.assert_trees_all_close(logits, jnp.stack([expected, expected]), rtol=1e-4)

    one_by_one = jax.jit(jax.vmap(lambda image: predict(variables, image[None])[0]))
    chex.assert_trees_all_close(one_by_one(images), expected, rtol=1e-4)


def test_gradient_for_each_example(variables, images):
    """vmap of grad, which differential privacy is made of; their sum is the batch's."""

    def loss(params, images):
        return jnp.square(predict({**variables, "params": params}, images)).sum()

    gradient = jax.grad(loss)
    each = jax.jit(jax.vmap(gradient, (None, 0)))(variables["params"], images[:, None])
    chex.assert_trees_all_close(
        jax.tree.map(lambda g: g.sum(0), each),
        jax.jit(gradient)(variables["params"], images),
        rtol=1e-3,
        atol=1e-2,
    )


@pytest.mark.slow
def test_remat_of_blocks_and_vmap_of_classes(variables, images, expected):
    def loss(model, variables):
        return jnp.square(model.apply(variables, images, train=True, mutable=True)[0]).mean()

    frugal = MODEL.clone(block=nn.remat(fr.BasicBlock, static_argnums=(2,)))
    gradients = [jax.jit(jax.grad(partial(loss, model))) for model in (MODEL, frugal)]
    assert "remat" in str(gradients[1].trace(variables).jaxpr)
    for ours, theirs in zip(*(jax.tree.leaves(g(variables)) for g in gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())

    axes: Any = {"params": 0, "batch_stats": 0}
    vmap: Any = nn.vmap
    several = vmap(fr.ResNet, in_axes=None, axis_size=2, variable_axes=axes)
    two = jax.tree.map(lambda v: jnp.stack([v, v]), variables)
    fields = {f: getattr(MODEL, f) for f in ("block", "layers", "num_classes", "widths", "strides")}
    logits = several(**fields).apply(two, images, False)
    chex.assert_trees_all_close(logits, jnp.stack([expected, expected]), rtol=1e-4)


def test_debugging_aids(variables, images, expected):
    with jax.disable_jit():
        chex.assert_trees_all_close(predict(variables, images), expected, rtol=1e-4)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        predict(variables, np.full_like(images, np.nan))


def test_precision_is_that_of_its_place(variables, images):
    def precise(variables, images):
        with jax.default_matmul_precision("highest"):
            return predict(variables, images)

    def asked_for(function):
        program = jax.jit(function).trace(variables, images).lower(lowering_platforms=("cuda",))
        lines = [line for line in program.as_text().splitlines() if "stablehlo.convolution" in line]
        return [line.count("HIGHEST") for line in lines]

    def gradient(variables, images):
        return jax.grad(lambda v: precise(v, images).sum())(variables)

    assert set(asked_for(predict)) == {0}
    assert set(asked_for(precise)) == {2}  # of both operands
    assert set(asked_for(gradient)) == {2}


@pytest.mark.parametrize("kind", ["shard_map", "explicit"])
@pytest.mark.parametrize(
    "model",
    [MODEL, pytest.param(fr.ResNet9(3, widths=(8, 8, 8, 8)), marks=pytest.mark.slow)],
    ids=["ResNet", "ResNet9"],
)
def test_gradient_on_two_devices(model, kind, images, optimized):
    variables = draw(model)

    def loss(variables, images):
        # Training in shard_map, each device would have BatchNorm statistics of its own.
        apply = partial(model.apply, train=kind == "explicit", mutable=["batch_stats"])
        return jnp.square(apply(variables, images)[0]).mean()

    def on_each(variables, images):
        return jax.value_and_grad(lambda *a: jax.lax.pmean(loss(*a), "data"))(variables, images)

    expected = jax.jit(jax.value_and_grad(loss))(variables, images)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        variables = jax.device_put(variables, NamedSharding(mesh, P()))
        images = jax.device_put(images, NamedSharding(mesh, P("data")))
        step = jax.value_and_grad(loss)
        if kind == "shard_map":
            step = jax.shard_map(on_each, in_specs=(P(), P("data")), out_specs=P())
        result = jax.jit(step)(variables, images)
    for ours, theirs in zip(*map(jax.tree.leaves, (result, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_eval_shape_and_tabulate(variables, images):
    logits = jax.eval_shape(predict, variables, images)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
    table = MODEL.tabulate(jax.random.key(0), images, train=False, console_kwargs={"width": 200})
    values = sum(v.size for v in jax.tree.leaves(variables))
    assert f"Total Parameters: {values:,}" in table


WITHOUT_US = """
import sys
sys.modules["flax_resnet"] = None  # an import of it fails
import numpy as np
from jax import export

folder = sys.argv[1]
exported = export.deserialize(bytearray(open(folder + "/exported", "rb").read()))
np.save(folder + "/logits.npy", exported.call(np.load(folder + "/images.npy")))
"""


def test_exported_program_runs_without_this_package(variables, images, expected, tmp_path):
    pytest.importorskip("flatbuffers")
    (n,) = export.symbolic_shape("n")
    spec = jax.ShapeDtypeStruct((n, *SHAPE[1:]), jnp.float32)
    function = jax.jit(partial(predict, variables))
    function(images)  # compiled for this machine before, with our own convolution
    exported = export.export(function, platforms=("cpu", "cuda", "tpu"))(spec)
    (tmp_path / "exported").write_bytes(exported.serialize())
    np.save(tmp_path / "images.npy", images)
    subprocess.run([sys.executable, "-c", WITHOUT_US, tmp_path], check=True, cwd=tmp_path)
    logits = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(logits, expected, rtol=1e-4)


def test_export_of_any_number_of_images():
    pytest.importorskip("flatbuffers")
    (n,) = export.symbolic_shape("n")
    spec = jax.ShapeDtypeStruct((n, *SHAPE[1:]), jnp.float32)
    for model in (fr.VGG((1, 1), 3, widths=(8, 8), hidden=8), fr.ResNet9(3, widths=(8, 8, 8, 8))):
        exported = export.export(jax.jit(partial(model.apply, draw(model), train=False)))(spec)
        assert exported.out_avals[0].shape == (n, 3)


def test_types_are_for_others_too():
    assert (resources.files("flax_resnet") / "py.typed").is_file()
