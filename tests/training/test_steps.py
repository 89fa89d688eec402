"""A training step and an evaluation, on one device and on several."""

import contextlib
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_resnet as fr
from flax_resnet.data import Dataset, augment, channel_statistics, epoch_order, erase, mix
from flax_resnet.data.augment import keys_of_each
from flax_resnet.models import native
from flax_resnet.models.dialects import torch_name
from flax_resnet.training import (
    create_state,
    cross_entropy,
    eval_step,
    make_optimizer,
    programs,
    train_step,
)
from flax_resnet.training.config import Config
from flax_resnet.training.feeds import open_feed
from flax_resnet.training.mesh import by_example, make_mesh, replicated
from flax_resnet.training.plan import build_model, fastest_dtype
from flax_resnet.training.steps import split_layers
from tests.training.plans import MODEL, planned

SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def random_dataset(rng, count=40, size=8) -> Dataset:
    return Dataset(
        rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
        rng.integers(0, 10, count, dtype=np.int32),
        tuple("abcdefghij"),
    )


def make_state(optimizer, size=8):
    create = partial(create_state, MODEL, optimizer, image_shape=(size, size, 3))
    # Compiling the random numbers would take many times longer than drawing them.
    options = {"xla_backend_optimization_level": "0"}
    return jax.jit(create, compiler_options=options)(jax.random.key(0))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_step_is_that_of_torch(rng, label_smoothing):
    torch = pytest.importorskip("torch")
    from tests.models import torch_resnet

    twin = torch_resnet.ResNet(
        torch_resnet.BasicBlock, (1, 1), 10, widths=(8, 16), strides=(1, 2), cifar_stem=True
    )
    torch_resnet.randomize(twin).train()
    optimizer = make_optimizer(Config(**SGD), optax.constant_schedule(0.1))
    variables = fr.from_torch(MODEL, twin.state_dict())
    state = make_state(optimizer).replace(**variables)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, **SGD)
    step = jax.jit(
        partial(
            train_step,
            model=MODEL,
            optimizer=optimizer,
            loss=partial(cross_entropy, label_smoothing=label_smoothing),
        )
    )
    for _ in range(3):
        images = rng.normal(size=(8, 8, 8, 3)).astype(np.float32)
        labels = rng.integers(0, 10, 8, dtype=np.int32)
        state, metrics = step(state, {"image": images, "label": labels})
        loss, logits = torch_resnet.train_step(
            twin, theirs, images, labels, label_smoothing=label_smoothing
        )
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
        correct = (logits.argmax(1) == labels).mean()
        np.testing.assert_allclose(metrics["accuracy"], correct)

        norms = {n: torch.linalg.vector_norm(p.grad).item() for n, p in twin.named_parameters()}
        total = np.linalg.norm(list(norms.values()))
        np.testing.assert_allclose(metrics["gradient_norm"], total, rtol=1e-4)
        layers = split_layers(np.asarray(metrics["layer_gradient_norms"])[None], state.params)
        layers = jax.tree.leaves_with_path(layers)
        assert len(layers) == 7  # 6 convolutions and fc
        for path, norm in layers:
            name = torch_name(("params", *(key.key for key in path)))
            np.testing.assert_allclose(norm, [norms[name]], rtol=1e-3, err_msg=name)

    assert state.step == 3
    expected = fr.from_torch(MODEL, twin.state_dict())["params"]
    chex.assert_trees_all_close(state.params, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_gradient_norms_of_blocks_on_top_of_each_other(rng):
    model = MODEL.clone(layers=(1, 3), eca=True)
    optimizer = make_optimizer(Config(**SGD), optax.constant_schedule(0.1))
    state = jax.jit(partial(create_state, model, optimizer, image_shape=(8, 8, 3)))(
        jax.random.key(0)
    )
    batch = {
        "image": jnp.asarray(rng.normal(size=(8, 8, 8, 3)), jnp.float32),
        "label": jnp.arange(8),
    }
    totals, layers = [], []
    scanned = (fr.stack_blocks(state), model.clone(scan_blocks=True))
    for start, net in ((state, model), scanned):
        _, metrics = jax.jit(partial(train_step, model=net, optimizer=optimizer))(start, batch)
        totals.append(metrics["gradient_norm"])
        norms = np.stack([metrics["layer_gradient_norms"]] * 3)  # as of three steps
        layers.append(split_layers(norms, start.params))
    np.testing.assert_allclose(*totals, rtol=1e-4)
    assert layers[1]["layer2_rest"]["conv1"]["kernel"].shape == (2, 3)
    chex.assert_trees_all_close(layers[0], fr.unstack_blocks(layers[1]), rtol=1e-3)


@pytest.mark.slow
def test_what_is_frozen_costs_nothing(monkeypatch, optimized):
    monkeypatch.setattr(native, "load", lambda: None)  # whose arithmetic XLA would not count

    def arithmetic_and_metrics(frozen):
        optimizer = make_optimizer(Config(freeze=frozen, **SGD), optax.constant_schedule(0.1))
        state = make_state(optimizer)
        batch = {"image": jnp.ones((8, 8, 8, 3)), "label": jnp.arange(8)}
        model = MODEL.clone(frozen=frozen)
        step = partial(train_step, model=model, optimizer=optimizer, frozen=frozen)
        program = jax.jit(step).lower(state, batch).compile()
        cost = program.cost_analysis()
        assert cost is not None
        return cost["flops"], program(state, batch)[1]

    everything, _ = arithmetic_and_metrics(())
    only_fc, metrics = arithmetic_and_metrics(("conv1", "bn1", "layer*"))
    assert only_fc < 0.4 * everything  # forward alone
    (norm,) = metrics["layer_gradient_norms"]
    assert metrics["gradient_norm"] >= norm > 0


def test_one_batch_can_be_learnt_by_heart(rng):
    optimizer = make_optimizer(Config(**SGD), optax.constant_schedule(0.05))
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
    mask = np.array([True, False, True, True, False, False])
    # Of what the mask leaves out a picture is NaN, and the others are classified rightly.
    right = jax.jit(partial(MODEL.apply, train=False))(state.variables, images).argmax(-1)
    labels = np.where(mask, np.arange(6), right)
    batch = {"image": images.at[1].set(jnp.nan), "label": labels, "mask": mask}
    sums = jax.jit(partial(eval_step, model=MODEL))(state.variables, batch)
    apply = jax.jit(partial(MODEL.apply, train=False))
    logits = np.asarray(apply(state.variables, images), np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), labels]
    np.testing.assert_allclose(sums["loss"], losses[mask].sum(), rtol=1e-5)
    assert sums["correct"] == (logits.argmax(1) == labels)[mask].sum()
    assert sums["count"] == 3


@contextlib.contextmanager
def feed_of(config, dataset, devices, test_set=None, bn_splits=1):
    """(feed, state) of a run on the first devices."""
    plan = planned(
        config, dataset, test_set, model=MODEL.clone(bn_splits=bn_splits), devices=devices
    )
    state = jax.device_put(make_state(plan.optimizer), replicated(plan.mesh))
    with contextlib.closing(open_feed(plan, state, 0)) as feed:
        yield feed, state


def run_steps(config, dataset, devices, steps, bn_splits=1):
    """Trains for some steps; returns state and losses."""
    losses = []
    with feed_of(config, dataset, devices, bn_splits=bn_splits) as (feed, state):
        for step in range(steps):
            state, metrics = feed.advance(state, step, 1)
            losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize(
    ("devices", "accumulation_steps", "bn_splits"),
    [
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        (8, 1, 1),
        pytest.param(8, 2, 1, marks=pytest.mark.slow),
        (8, 1, 8),
    ],
)
def test_several_devices_train_like_one(rng, devices, accumulation_steps, bn_splits):
    config = Config(
        batch_size=32,
        learning_rate=0.02,
        random_erasing=0.5,
        mixup=0.4,
        cutmix=1.0,
        accumulation_steps=accumulation_steps,
    )
    dataset = random_dataset(rng, count=100)
    one, losses = run_steps(config, dataset, 1, 20, bn_splits)
    several, several_losses = run_steps(config, dataset, devices, 20, bn_splits)
    assert len(several.step.sharding.device_set) == devices
    np.testing.assert_allclose(several_losses, losses, rtol=1e-4)
    chex.assert_trees_all_close(several.params, one.params, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(several.batch_stats, one.batch_stats, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_per_replica_statistics_cross_no_devices():
    """What is left to sum over devices are the gradients, once a step, and the metrics."""
    mesh = make_mesh(16, devices=jax.devices())
    everywhere = replicated(mesh)
    state = jax.device_put(make_state(make_optimizer(Config(), lambda step: 0.1)), everywhere)
    batch = {
        "image": np.zeros((16, 8, 8, 3), np.uint8),
        "label": np.zeros(16, np.int32),
        "index": np.arange(16, dtype=np.int32),
    }
    batch = jax.device_put(batch, by_example(mesh))
    texts = []
    for bn_splits in (1, 8):
        step = programs.make_train_step(planned(Config(), model=MODEL.clone(bn_splits=bn_splits)))
        program = jax.jit(step, out_shardings=everywhere).lower(state, batch).compile()
        texts.append(program.as_text())
    of_all, of_each = (text.count(" all-reduce(") for text in texts)
    assert 0 < of_each < of_all


def test_accumulation_is_the_mean_over_the_parts(rng):
    """Against the same arithmetic by hand: parts i::k, one after the other."""
    optimizer = optax.sgd(0.1)
    state = make_state(optimizer)
    batch = {
        "image": jnp.asarray(rng.normal(size=(12, 8, 8, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, 12), jnp.int32),
    }
    step = partial(train_step, model=MODEL, optimizer=optimizer)
    accumulated, metrics = jax.jit(partial(step, accumulation_steps=3))(state, batch)

    one, states, losses = jax.jit(step), [], []
    batch_stats = state.batch_stats
    for i in range(3):
        part = {name: values[i::3] for name, values in batch.items()}
        after, result = one(state.replace(batch_stats=batch_stats), part)
        batch_stats = after.batch_stats
        states.append(after.params)
        losses.append(float(result["loss"]))
    mean = jax.tree.map(lambda *p: sum(p) / 3, *states)  # SGD is linear in the gradient
    chex.assert_trees_all_close(accumulated.params, mean, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(accumulated.batch_stats, batch_stats, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert accumulated.step == 1


def test_many_steps_a_call_are_the_same_steps(rng):
    config = Config(batch_size=16, learning_rate=0.02)
    dataset = random_dataset(rng, count=100)
    one, losses = run_steps(config, dataset, 2, steps=6)

    plan = planned(config, dataset, devices=2)
    program = programs.make_train_steps(
        programs.make_train_step(plan),
        programs.make_pick(plan.mesh, 16, (8, 8, 3)),
        steps_per_epoch=6,
        steps=3,
    )
    everywhere = replicated(plan.mesh)
    program = jax.jit(program, out_shardings=everywhere)
    data = {"image": dataset.images.reshape(100, -1), "label": dataset.labels}
    state, data, order = jax.device_put(
        (make_state(plan.optimizer), data, epoch_order(config.seed, 0, 100)), everywhere
    )
    state, first = program(state, data, order)
    state, second = program(state, data, order)
    np.testing.assert_allclose([*first["loss"], *second["loss"]], losses, rtol=1e-4)
    chex.assert_trees_all_close(state, one, rtol=1e-3, atol=1e-4)


def test_two_runs_are_the_same_to_the_bit(rng):
    dataset = random_dataset(rng)
    first, losses = run_steps(Config(batch_size=16), dataset, 1, steps=3)
    second, again = run_steps(Config(batch_size=16), dataset, 1, steps=3)
    assert losses == again
    chex.assert_trees_all_equal(first, second)


def test_every_seed_has_keys_of_its_own():
    keys = [key for seed in range(3) for key in programs.random_keys(seed)]
    keys += programs.random_keys(0, rollbacks=1)[1:]  # the weights stay
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 19


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_step_trains_on_its_batch_of_the_order_augmented(rng, accumulation_steps):
    """Step k of an epoch: order[k * batch : (k + 1) * batch], as they are in that epoch."""
    config = Config(
        seed=3,
        batch_size=8,
        crop_padding=2,
        learning_rate=0.05,
        label_smoothing=0.1,
        random_erasing=0.5,
        mixup=0.4,
        cutmix=1.0,
        accumulation_steps=accumulation_steps,
    )
    dataset = random_dataset(rng, count=20)
    _, losses = run_steps(config, dataset, 1, steps=4)

    mean, std = channel_statistics([dataset.images])
    keys = programs.random_keys(3)
    erase_some = jax.jit(partial(erase, probability=0.5))
    mix_all = jax.jit(partial(mix, mixup=0.4, cutmix=1.0))
    crop_and_flip = jax.jit(partial(augment, crop_padding=2, flip=True))
    optimizer = make_optimizer(config, optax.constant_schedule(0.05))
    state = make_state(optimizer)
    loss = partial(cross_entropy, label_smoothing=0.1)
    step = partial(train_step, model=MODEL, optimizer=optimizer, loss=loss)
    step = jax.jit(partial(step, accumulation_steps=accumulation_steps))
    expected = []
    for epoch in range(2):
        order = epoch_order(config.seed, epoch, 20)
        for start in (0, 8):
            index = order[start : start + 8]
            augmentation, erasing, mixing = (
                jax.random.fold_in(key, epoch)
                for key in (keys.augmentation, keys.erasing, keys.mixing)
            )
            images = crop_and_flip(dataset.images[index], index, augmentation)
            images = ((np.asarray(images) / 255 - mean) / std).astype(np.float32)
            images = erase_some(images, keys_of_each(erasing, index))
            labels = dataset.labels[index]
            images, other, share = mix_all(images, labels, keys_of_each(mixing, index))
            batch = {"image": images, "label": labels, "other_label": other, "share": share}
            state, metrics = step(state, batch)
            expected.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_cutout_hides_pixels_behind_the_mean(rng):
    config = Config(cutout=3, crop_padding=0, horizontal_flip=False)
    dataset = random_dataset(rng, count=20)
    plan, images = planned(config, dataset), dataset.images
    out = np.asarray(programs.make_augment(plan)(images, np.arange(20), 0))
    changed = (out != images).any(-1)
    assert ((changed.sum((1, 2)) >= 4) & (changed.sum((1, 2)) <= 9)).all()
    colours = np.unique(out[changed], axis=0)
    np.testing.assert_array_equal(colours, np.round(255 * np.array([plan.data.mean])))


def test_parts_of_pictures_are_not_cropped_again(rng):
    config = Config(crop="resized", image_size=8, horizontal_flip=False)
    dataset = random_dataset(rng, count=20)
    out = programs.make_augment(planned(config, dataset))(dataset.images, np.arange(20), 0)
    np.testing.assert_array_equal(out, dataset.images)


def test_flips_alternate_from_epoch_to_epoch(rng):
    config = Config(crop_padding=0, alternating_flip=True)
    dataset = random_dataset(rng, count=200)
    images, index = dataset.images, np.arange(200)
    augment = programs.make_augment(planned(config, dataset))
    first, second, third = (np.asarray(augment(images, index, epoch)) for epoch in range(3))
    is_mirrored = (first == images[:, :, ::-1]).all((1, 2, 3))
    assert 70 < is_mirrored.sum() < 130  # outside once in 40,000
    expected = np.where(is_mirrored[:, None, None, None], images[:, :, ::-1], images)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected[:, :, ::-1])
    np.testing.assert_array_equal(third, first)
    some = rng.permutation(200)[:8]
    np.testing.assert_array_equal(augment(images[some], some, 0), first[some])


@pytest.mark.parametrize(("count", "batch_size", "devices"), [(40, 16, 1), (41, 8, 8), (5, 64, 2)])
def test_evaluation_counts_every_example_once(rng, count, batch_size, devices):
    dataset = random_dataset(rng, count)
    train_set = random_dataset(rng, count=16)
    config = Config(batch_size=16, eval_batch_size=batch_size)
    with feed_of(config, train_set, devices, test_set=dataset) as (feed, state):
        result = feed.evaluate(state, lambda: False)
        assert result is not None

    statistics = channel_statistics([train_set.images])
    images = (dataset.images / 255 - statistics[0]) / statistics[1]
    apply = jax.jit(partial(MODEL.apply, train=False))
    logits = np.asarray(apply(state.variables, jnp.float32(images)), np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(count), dataset.labels]
    assert result["accuracy"] == (logits.argmax(1) == dataset.labels).mean()
    np.testing.assert_allclose(result["loss"], losses.mean(), rtol=1e-4)


def test_devices_must_divide_the_batch(eight_devices):
    with pytest.raises(fr.InputError, match="batch_size=12 cannot be divided among 8 devices"):
        make_mesh(12)


def test_parts_must_divide_the_batch(eight_devices):
    with pytest.raises(
        fr.InputError, match=r"8 devices with accumulation_steps=3: take a multiple"
    ):
        make_mesh(32, 3)


def test_dtype_on_a_cpu_is_float32():
    mesh = make_mesh(8)
    assert build_model(Config(), 10, mesh).dtype == jnp.float32
    assert build_model(Config(dtype="bfloat16"), 10, mesh).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("gpu", "7.5", "float32"),  # a T4, whose convolutions of bfloat16 XLA does in float32
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "10.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),  # AMD's
        ("tpu", None, "bfloat16"),
    ],
)
def test_fastest_dtype(platform, capability, dtype):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert fastest_dtype(device) == dtype


def test_per_replica_is_a_split_a_device(eight_devices):
    mesh = make_mesh(8)
    assert build_model(Config(), 10, mesh).bn_splits == 1
    assert build_model(Config(batch_norm="per_replica"), 10, mesh).bn_splits == 8
