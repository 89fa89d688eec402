"""A training step and an evaluation, on one device and on several."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_resnet as fr
from flax_resnet.data import Dataset, channel_statistics
from flax_resnet.training import create_state, eval_step, programs, sgd, train_step
from flax_resnet.training.config import Config

# Small, so that it compiles fast: a block that keeps the shape and one that changes it.
MODEL = fr.ResNet(
    fr.BasicBlock, (1, 1), num_classes=10, widths=(8, 16), strides=(1, 2), cifar_stem=True
)
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def random_dataset(rng, count=40, size=8) -> Dataset:
    return Dataset(
        rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
        rng.integers(0, 10, count, dtype=np.int32),
        tuple("abcdefghij"),
    )


def make_state(optimizer, size=8):
    create = partial(create_state, MODEL, optimizer, image_shape=(size, size, 3))
    return jax.jit(create)(jax.random.key(0))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_step_is_that_of_torch(rng, label_smoothing):
    torch = pytest.importorskip("torch")
    from tests.models import torch_resnet

    twin = torch_resnet.ResNet(
        torch_resnet.BasicBlock, (1, 1), 10, widths=(8, 16), strides=(1, 2), cifar_stem=True
    )
    torch_resnet.randomize(twin).train()
    optimizer = sgd(Config(**SGD), optax.constant_schedule(0.1))
    variables = fr.from_torch(MODEL, twin.state_dict())
    state = make_state(optimizer).replace(**variables)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, **SGD)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    step = jax.jit(
        partial(train_step, model=MODEL, optimizer=optimizer, label_smoothing=label_smoothing)
    )
    for _ in range(3):
        images = rng.normal(size=(8, 8, 8, 3)).astype(np.float32)
        labels = rng.integers(0, 10, 8, dtype=np.int32)
        state, metrics = step(state, {"image": images, "label": labels})

        theirs.zero_grad()
        logits = twin(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        loss = criterion(logits, torch.from_numpy(labels).long())
        loss.backward()
        theirs.step()
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-4)
        correct = (logits.argmax(1).numpy() == labels).mean()
        np.testing.assert_allclose(metrics["accuracy"], correct)

    assert state.step == 3
    expected = fr.from_torch(MODEL, twin.state_dict())["params"]
    chex.assert_trees_all_close(state.params, expected, rtol=1e-3, atol=1e-4)


def test_one_batch_can_be_learnt_by_heart(rng):
    optimizer = sgd(Config(**SGD), optax.constant_schedule(0.05))
    state = make_state(optimizer)
    batch = {
        "image": jnp.asarray(rng.normal(size=(16, 8, 8, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, 16), jnp.int32),
    }
    step = jax.jit(partial(train_step, model=MODEL, optimizer=optimizer))
    state, metrics = step(state, batch)
    for _ in range(59):
        state, metrics = step(state, batch)
    assert metrics["accuracy"] == 1
    assert metrics["loss"] < 0.1


def test_eval_step_counts_what_the_mask_says(rng):
    state = make_state(optax.sgd(0.1))
    images = jnp.asarray(rng.normal(size=(6, 8, 8, 3)), jnp.float32)
    labels = jnp.arange(6)
    mask = jnp.array([True, False, True, True, False, False])
    batch = {"image": images.at[1].set(jnp.nan), "label": labels, "mask": mask}
    sums = eval_step(state, batch, model=MODEL)
    logits = np.asarray(MODEL.apply(state.variables, images, train=False), np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), labels]
    np.testing.assert_allclose(sums["loss"], losses[mask].sum(), rtol=1e-5)
    assert sums["correct"] == (logits.argmax(1) == labels)[mask].sum()
    assert sums["count"] == 3


def run_program(config, dataset, devices, steps):
    """Trains for some steps on the first devices; returns state and losses."""
    mesh = programs.make_mesh(config.batch_size, jax.devices()[:devices])
    optimizer = sgd(config, optax.constant_schedule(config.learning_rate))
    data = programs.put_dataset(dataset, mesh)
    steps_per_epoch = len(dataset) // config.batch_size
    program = programs.make_train_program(
        config,
        MODEL,
        optimizer,
        mesh,
        statistics=channel_statistics(dataset.images),
        steps_per_epoch=steps_per_epoch,
    )
    state = jax.device_put(make_state(optimizer), programs.replicated(mesh))
    _, order_key, _ = programs.random_keys(config.seed)
    losses = []
    for step in range(steps):
        order = programs.epoch_order(order_key, step // steps_per_epoch, len(dataset))
        state, metrics = program(state, data, jax.device_put(order, programs.replicated(mesh)))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("devices", [2, 8])
def test_several_devices_train_like_one(rng, devices):
    config = Config(batch_size=16, learning_rate=0.05)
    dataset = random_dataset(rng)
    one, losses = run_program(config, dataset, 1, steps=6)
    several, several_losses = run_program(config, dataset, devices, steps=6)
    assert len(several.step.sharding.device_set) == devices
    np.testing.assert_allclose(several_losses, losses, rtol=1e-4)
    chex.assert_trees_all_close(several.params, one.params, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(several.batch_stats, one.batch_stats, rtol=1e-3, atol=1e-4)


def test_two_runs_are_the_same_to_the_bit(rng):
    dataset = random_dataset(rng)
    first, losses = run_program(Config(batch_size=16), dataset, 1, steps=3)
    second, again = run_program(Config(batch_size=16), dataset, 1, steps=3)
    assert losses == again
    chex.assert_trees_all_equal(first, second)


def test_every_seed_has_keys_of_its_own():
    keys = [jax.random.key_data(k).tolist() for s in range(3) for k in programs.random_keys(s)]
    assert len({tuple(key) for key in keys}) == 9


def test_an_epoch_takes_every_example_once():
    orders = [np.asarray(programs.epoch_order(jax.random.key(0), e, 50)) for e in range(3)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({order.tobytes() for order in orders}) == 3


def test_the_step_picks_its_batch_from_the_order(rng):
    """Step k of an epoch trains on order[k * batch : (k + 1) * batch], not augmented here."""
    config = Config(batch_size=8, crop_padding=0, horizontal_flip=False, learning_rate=0.05)
    dataset = random_dataset(rng, count=20)
    _, losses = run_program(config, dataset, 1, steps=4)

    mean, std = channel_statistics(dataset.images)
    images = ((dataset.images / 255 - mean) / std).astype(np.float32)
    optimizer = sgd(config, optax.constant_schedule(0.05))
    state = make_state(optimizer)
    step = jax.jit(partial(train_step, model=MODEL, optimizer=optimizer))
    _, order_key, _ = programs.random_keys(config.seed)
    expected = []
    for epoch in range(2):
        order = np.asarray(programs.epoch_order(order_key, epoch, 20))
        for start in (0, 8):
            index = order[start : start + 8]
            batch = {"image": images[index], "label": dataset.labels[index]}
            state, metrics = step(state, batch)
            expected.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize(("count", "batch_size", "devices"), [(40, 16, 1), (41, 8, 8), (5, 64, 2)])
def test_evaluation_counts_every_example_once(rng, count, batch_size, devices):
    dataset = random_dataset(rng, count)
    statistics = channel_statistics(dataset.images)
    mesh = programs.make_mesh(batch_size, jax.devices()[:devices])
    data = programs.put_dataset(dataset, mesh)
    program = programs.make_eval_program(MODEL, mesh, batch_size=batch_size, statistics=statistics)
    state = jax.device_put(make_state(optax.sgd(0.1)), programs.replicated(mesh))
    result = programs.evaluate(program, state, data, batch_size=batch_size)

    images = (dataset.images / 255 - statistics[0]) / statistics[1]
    logits = MODEL.apply(state.variables, jnp.float32(images), train=False)
    logits = np.asarray(logits, np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(count), dataset.labels]
    assert result["accuracy"] == (logits.argmax(1) == dataset.labels).mean()
    np.testing.assert_allclose(result["loss"], losses.mean(), rtol=1e-4)


def test_devices_must_divide_the_batch():
    with pytest.raises(fr.InputError, match="batch_size=12 cannot be divided among 8 devices"):
        programs.make_mesh(12)


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_dtype_goes_by_the_platform(platform, dtype):
    assert programs.build_model(Config(), 10, platform).dtype == jnp.dtype(dtype)
    assert programs.build_model(Config(dtype="bfloat16"), 10, platform).dtype == jnp.bfloat16
