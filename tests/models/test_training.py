"""Models in training: PyTorch's trajectory, nets without BatchNorm, and what is drawn."""

import contextlib
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_resnet as fr
from flax_resnet.training import checkpoint, create_state, eval_step, make_optimizer, train_step
from flax_resnet.training.config import Config
from flax_resnet.training.optimizer import learning_rate_schedule

SMALL: dict[str, Any] = {
    "layers": (1, 1),
    "num_classes": 5,
    "widths": (8, 16),
    "strides": (1, 2),
    "cifar_stem": True,
}
NET = fr.ResNet(fr.BasicBlock, **SMALL)
# Everything that a training step treats in a way of its own.
NETS = {
    "group norm": NET.clone(norm="group"),
    "vgg": fr.VGG((1, 1), num_classes=5, widths=(8, 16), hidden=16),
    "stochastic depth": NET.clone(stochastic_depth=0.5),
    "dropout": fr.ResNet(fr.PreActBasicBlock, **SMALL, dropout=0.3),
}
DRAWING = ("vgg", "stochastic depth", "dropout")


@pytest.fixture
def batch(rng):
    return {
        "image": jnp.asarray(rng.normal(size=(16, 8, 8, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 5, 16), jnp.int32),
    }


def state_of(model, optimizer):
    # Compiling the random numbers would take many times longer than drawing them.
    options = {"xla_backend_optimization_level": "0"}
    create = partial(create_state, model, optimizer, image_shape=(8, 8, 3))
    return jax.jit(create, compiler_options=options)(jax.random.key(0))


@pytest.mark.parametrize("kind", [pytest.param("BasicBlock", marks=pytest.mark.slow), "Bottleneck"])
def test_trajectory_is_that_of_torch(kind, rng):
    """50 steps from the same weights on the same batches, with two falls of the rate.

    Losses and parameters differ by some 3e-7 at this rate; at 0.1, where rounding grows
    from step to step, by up to 2e-2.
    """
    torch = pytest.importorskip("torch")
    from tests.models import torch_resnet

    steps = 50
    config = Config(schedule="step", learning_rate=0.02, decay_at=(0.5, 0.8))
    rate = learning_rate_schedule(config, steps_per_epoch=10, total_steps=steps)
    optimizer = make_optimizer(config, rate)
    model = fr.ResNet(getattr(fr, kind), **SMALL)
    torch.manual_seed(0)
    twin = torch_resnet.ResNet(getattr(torch_resnet, kind), **SMALL).train()
    theirs = torch.optim.SGD(
        twin.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(theirs, [25, 40])
    state = state_of(model, optimizer).replace(**fr.from_torch(model, twin.state_dict()))
    initial = state.params
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer))
    images = rng.normal(size=(256, 8, 8, 3)).astype(np.float32)
    labels = rng.integers(0, 5, 256, dtype=np.int32)
    images += rng.normal(size=(5, 1, 1, 3)).astype(np.float32)[labels]  # a colour a class

    losses, expected = [], []
    for _ in range(steps):
        index = rng.permutation(256)[:64]
        state, metrics = step(state, {"image": images[index], "label": labels[index]})
        losses.append(float(metrics["loss"]))
        loss, _ = torch_resnet.train_step(twin, theirs, images[index], labels[index])
        scheduler.step()
        expected.append(loss)

    assert expected[-1] < 0.5 * expected[0]  # it does learn
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    end = fr.from_torch(model, twin.state_dict())

    def relative_error(ours, theirs):
        return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)

    errors = jax.tree.map(relative_error, state.params, end["params"])
    assert max(jax.tree.leaves(errors)) < 1e-2
    errors = jax.tree.map(relative_error, state.batch_stats, end["batch_stats"])
    # The unbiased variance of 64 * 4 * 4 values is 0.1% larger.
    assert max(jax.tree.leaves(errors)) < 1e-2
    moved = jax.tree.map(relative_error, initial, end["params"])
    assert max(jax.tree.leaves(moved)) > 0.1


@pytest.mark.parametrize(
    "name",
    [n if n == "vgg" else pytest.param(n, marks=pytest.mark.slow) for n in NETS],
)
def test_every_net_trains_is_evaluated_and_goes_on_as_it_would_have(name, batch, tmp_path):
    model, optimizer = NETS[name], make_optimizer(Config(), optax.constant_schedule(0.02))
    start = state_of(model, optimizer)
    assert bool(start.batch_stats) == (name in ("stochastic depth", "dropout"))
    step = jax.jit(
        partial(train_step, model=model, optimizer=optimizer, dropout_key=jax.random.key(7))
    )
    two, metrics = step(step(start, batch)[0], batch)
    four, _ = step(step(two, batch)[0], batch)
    assert np.isfinite(metrics["loss"])
    sums = eval_step(four.variables, batch | {"mask": jnp.ones(16, bool)}, model=model)
    assert sums["count"] == 16

    with contextlib.closing(checkpoint.Checkpoints(tmp_path, Config())) as checkpoints:
        checkpoints.save(two, checkpoint.History())
        checkpoints.finish()
        resumed, _ = checkpoints.restore(start)
    chex.assert_trees_all_equal(step(step(resumed, batch)[0], batch)[0], four)


@pytest.mark.parametrize("name", DRAWING)
def test_what_is_drawn_depends_on_key_step_and_part(name, batch):
    model, optimizer = NETS[name], optax.sgd(0.0)
    state = state_of(model, optimizer)
    step = partial(train_step, model=model, optimizer=optimizer)
    one = jax.jit(step)

    def loss(step_number, seed):
        at = state.replace(step=jnp.int32(step_number))
        return float(one(at, batch, dropout_key=jax.random.key(seed))[1]["loss"])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(1, 0), loss(0, 1)}) == 3

    # Two equal parts (examples i::2) are not treated equally.
    twice = {name: jnp.repeat(values, 2, axis=0) for name, values in batch.items()}
    in_parts = jax.jit(partial(step, accumulation_steps=2))
    _, metrics = in_parts(state, twice, dropout_key=jax.random.key(0))
    assert float(metrics["loss"]) != pytest.approx(loss(0, 0), rel=1e-6)
