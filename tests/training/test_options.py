"""The moving average, mixing, seldom evaluations, the log of steps and the profiler in a run."""

import json
import shutil
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import flax_resnet as fr
from flax_resnet import evaluate
from flax_resnet.data import mix, normalize
from flax_resnet.training import (
    TrainState,
    checkpoint_files,
    cross_entropy,
    programs,
    train_step,
    update_ema,
)
from flax_resnet.training.config import Config, check_config
from flax_resnet.training.history import History
from flax_resnet.training.loop import Loop
from flax_resnet.training.optimizer import learning_rate_schedule
from flax_resnet.training.own import Own
from flax_resnet.training.plan import make_plan
from flax_resnet.training.writers import ending
from tests.training.plans import MODEL, planned
from tests.training.test_train import (
    changed,
    read_events,
    read_metrics,
    steps_kept,
    train_until,
    without_timing,
)


@pytest.fixture(scope="module")
def options(config):
    """Everything at once, on a smaller net."""
    return changed(
        config,
        num_epochs=3,
        learning_rate=0.02,
        model_fields={"widths": (4, 4, 4)},
        ema_decay=0.9,
        mixup=0.2,
        cutmix=1.0,
        clip_norm=1.0,
        optimizer="adamw",
        eval_every=2,
        log_every=3,
    )


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    """(workdir, state) of a run with them."""
    folder = tmp_path_factory.mktemp("options")
    return folder, fr.train(options, folder)


def test_stopped_run_goes_on_to_the_same_bits(undisturbed, options, tmp_path, monkeypatch):
    folder, expected = undisturbed
    train_until(11, options, tmp_path, monkeypatch)
    state = fr.train(options, tmp_path)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))
    for name in ("metrics.jsonl", "steps.jsonl"):
        ours, theirs = (
            without_timing(map(json.loads, (f / name).read_text().splitlines()))
            for f in (tmp_path, folder)
        )
        assert ours == theirs


# The moving average.


def test_average_is_that_of_its_formula():
    """tf.train.ExponentialMovingAverage with num_updates, in float64."""
    rng = np.random.default_rng(0)
    state = TrainState.create(
        {"params": {"w": jnp.zeros(5)}, "batch_stats": {"m": jnp.zeros(5)}},
        optax.sgd(0.1),
        ema=True,
    )
    expected = np.zeros((2, 5))
    for step in range(1, 40):
        new = rng.normal(size=(2, 5))
        state = state.replace(step=jnp.int32(step), params={"w": new[0]}, batch_stats={"m": new[1]})
        state = update_ema(state, 0.7)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * new
    average = [state.ema["params"]["w"], state.ema["batch_stats"]["m"]]
    np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)


def test_average_is_what_is_evaluated_kept_and_opened(undisturbed):
    folder, state = undisturbed
    run = fr.load_run(folder, "newest")
    chex.assert_trees_all_equal(run.variables, jax.device_get(state.ema))
    assert not np.array_equal(
        run.variables["params"]["conv1"]["kernel"], state.params["conv1"]["kernel"]
    )
    result = evaluate.evaluate(run, evaluate.open_test_set(run))
    record = read_metrics(folder)[-1]
    assert result.correct.mean() == pytest.approx(record["test_accuracy"])
    assert result.loss == pytest.approx(record["test_loss"], rel=1e-5)


class OlderState(flax.struct.PyTreeNode):
    """What `TrainState` was in versions without an average."""

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any


def test_checkpoint_of_a_version_without_an_average_is_restored(finished, config, run_copy):
    state = finished[1]
    folder = run_copy / "checkpoints" / "32"
    shutil.rmtree(folder / "state")
    older = OlderState(state.step, state.params, state.batch_stats, state.opt_state)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", older)
    checkpoint_files.write_manifest(folder)
    restored = fr.train(config, run_copy)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
    chex.assert_trees_all_equal(
        fr.load_run(run_copy, 32).variables, jax.device_get(state.variables)
    )


# The losses.


def test_labels_are_smoothed_in_training_alone(config, tmp_path, rng):
    plan = make_plan(check_config(changed(config, label_smoothing=0.1)), tmp_path / "run", Own())
    logits, labels = rng.normal(size=(4, 10)), np.array([0, 3, 9, 3])
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    own = -logs[np.arange(4), labels]
    arguments = jnp.float32(logits), jnp.int32(labels)
    np.testing.assert_allclose(plan.test_loss(*arguments), own, rtol=1e-5)
    np.testing.assert_allclose(plan.loss(*arguments), 0.9 * own - 0.1 * logs.mean(1), rtol=1e-5)


# mixup and cutmix.


def test_mixed_step_is_that_of_the_papers():
    """share * loss(own label) + (1 - share) * loss(other label), and its gradient."""
    config = Config(batch_size=8, mixup=0.4, cutmix=1.0, crop_padding=0, horizontal_flip=False)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    dataset = fr.Dataset(images, rng.integers(0, 10, 8, dtype=np.int32), tuple("abcdefghij"))
    plan = planned(config, dataset, optimizer=optax.sgd(0.1))
    variables: Any = MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    state = TrainState.create(variables, plan.optimizer)
    index = rng.permutation(8).astype(np.int32)
    batch = {"image": images[index], "label": dataset.labels[index], "index": index}
    after, metrics = jax.jit(programs.make_train_step(plan))(state, batch)

    key = jax.random.fold_in(programs.random_keys(0).mixing, 0)
    keys = jnp.stack([jax.random.fold_in(key, i) for i in index])
    pixels = normalize(images[index], plan.data.mean, plan.data.std)
    mixed, others, share = mix(pixels, batch["label"], keys, mixup=0.4, cutmix=1.0)
    assert 0 < float(share.min()) < 1

    def loss(params):
        logits, _ = MODEL.apply(
            variables | {"params": params}, mixed, train=True, mutable=["batch_stats"]
        )
        own = jax.nn.one_hot(batch["label"], 10) * share[:, None]
        soft = own + jax.nn.one_hot(others, 10) * (1 - share[:, None])
        return optax.softmax_cross_entropy(logits, soft).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(variables["params"])
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
    chex.assert_trees_all_close(after.params, stepped, rtol=1e-4, atol=1e-6)


def test_accuracy_of_mixed_images_counts_both_labels():
    class Answers(nn.Module):
        def __call__(self, x, train):
            return jax.nn.one_hot(jnp.array([1, 2, 3]), 4)

    batch = {
        "image": jnp.zeros((3, 8, 8, 3)),
        "label": jnp.array([1, 0, 0]),
        "other_label": jnp.array([0, 2, 0]),
        "share": jnp.array([0.7, 0.6, 0.5]),
    }
    state = TrainState.create({"params": {"bias": jnp.zeros(1)}}, optax.sgd(0.1))
    _, metrics = train_step(state, batch, model=Answers(), optimizer=optax.sgd(0.1))
    assert metrics["accuracy"] == pytest.approx((0.7 + 0.4 + 0) / 3)


# Seldom evaluations.


def test_epochs_without_an_evaluation(undisturbed):
    folder, _ = undisturbed
    records = read_metrics(folder)
    evaluated = [record["test_accuracy"] is not None for record in records]
    assert evaluated == [False, True, True]  # the last always
    assert [record["test_loss"] is not None for record in records] == evaluated
    best = max(records[1:], key=lambda record: record["test_accuracy"])
    assert fr.load_run(folder).step == best["step"]
    assert checkpoint_files.choose_checkpoint(folder, "best").name == str(best["step"])
    shown = read_events(folder / "test")
    assert [event.step for event in shown.Scalars("epoch/loss")] == [16, 24]
    assert steps_kept(folder) == [8, 16, 24]


# The log of steps.


def test_steps_are_logged(undisturbed, options):
    folder, _ = undisturbed
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [line["epoch"] for line in lines] == [1, 1, 2, 2, 2, 3, 3, 3]
    for line in lines:
        assert set(line) == {
            "step",
            "epoch",
            "loss",
            "accuracy",
            "gradient_norm",
            "learning_rate",
            "images_per_second",
        }
    # Of the epoch so far: the seconds that belong to the speed grow to those of the epoch.
    for record in read_metrics(folder):
        of_epoch = [line for line in lines if line["epoch"] == record["epoch"]]
        images = [(line["step"] - 1) % 8 + 1 for line in of_epoch]
        speeds = [line["images_per_second"] / options["batch_size"] for line in of_epoch]
        seconds = np.divide(images, speeds)
        assert (np.diff([0, *seconds, record["seconds"]]) >= 0).all()
    # The last epoch has steps 17 to 24, and so the means of steps 17 and 18, 19 to 21, 22 to 24.
    of_epoch = {
        "loss": "train_loss",
        "accuracy": "train_accuracy",
        "gradient_norm": "gradient_norm",
    }
    for name, name_of_epoch in of_epoch.items():
        mean = np.dot([2, 3, 3], [line[name] for line in lines[-3:]]) / 8
        assert read_metrics(folder)[-1][name_of_epoch] == pytest.approx(mean, rel=1e-6)
    rate: Any = learning_rate_schedule(check_config(options), steps_per_epoch=8, total_steps=24)
    for line in lines:
        assert line["learning_rate"] == pytest.approx(float(rate(line["step"] - 1)), rel=1e-6)
    shown = [(event.step, event.value) for event in read_events(folder).Scalars("step/loss")]
    np.testing.assert_allclose(shown, [(line["step"], line["loss"]) for line in lines], rtol=1e-6)


def test_speed_is_of_all_steps_that_took_the_seconds():
    history = History(seconds=2.0)
    history.add_steps(dict.fromkeys(("loss", "accuracy", "gradient_norm"), np.ones(16)))
    unused: Any = None
    plan = planned(Config(batch_size=8))
    loop = Loop(plan, unused, unused, unused, unused, unused, unused, history)
    # One call has done sixteen steps, and the second of them has a line.
    assert loop._record_of_steps(2)["images_per_second"] == 16 * 8 / 2
    loop.writers = []
    loop._end_epoch({"test_loss": None, "test_accuracy": None})
    assert history.records[0]["images_per_second"] == 16 * 8 / 2


def test_how_a_run_has_ended():
    def run(*accuracies):
        return [
            {"epoch": epoch, "seconds": 40.0, "test_accuracy": accuracy}
            for epoch, accuracy in enumerate(accuracies, 1)
        ]

    assert ending(run(None)) == "done in 40 s"
    assert (
        ending(run(0.5, 0.75)) == "done in 1 min 20 s: test accuracy 75.00% after epoch 2, the best"
    )
    assert ending(run(0.75, None, 0.5)) == (
        "done in 2 min 0 s: test accuracy 50.00% after epoch 3, the best 75.00% after epoch 1"
    )


def test_an_epoch_begins_with_nothing_of_the_one_before():
    history = History()
    history.add_steps(dict.fromkeys(("loss", "accuracy", "gradient_norm"), np.ones(2)))
    history.seconds = 7.0
    history.end_epoch({"epoch": 1})
    assert history == History([{"epoch": 1}], [], [], [], seconds=0.0, rollbacks=0)
    assert History() == History([], [], [], [], seconds=0.0, rollbacks=0)


def test_lines_beyond_the_checkpoint_are_taken_back(options, tmp_path, monkeypatch, undisturbed):
    train_until(11, options, tmp_path, monkeypatch, kept={8})
    path = tmp_path / "steps.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 6, 9]
    with path.open("a") as file:
        file.write('{"step": 12, "lo')  # torn off
    fr.train(options, tmp_path)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [3, 6, 9, 12, 15, 18, 21, 24]


# The profiler.


@pytest.mark.slow
def test_profile_of_a_few_steps(config, tmp_path):
    config = changed(config, num_steps=4, warmup_epochs=0.0, profile_steps=(1, 3))
    fr.train(config, tmp_path)
    (trace,) = (tmp_path / "plugins" / "profile").glob("*/*.xplane.pb")
    assert trace.stat().st_size > 1000


@pytest.mark.slow
def test_profile_that_cannot_be_written(config, tmp_path, capfd):
    (tmp_path / "plugins").touch()  # where its folder would be
    config = changed(config, num_steps=4, warmup_epochs=0.0, profile_steps=(1, 3))
    assert int(fr.train(config, tmp_path).step) == 4
    assert "there is no profile: " in capfd.readouterr().err


@pytest.mark.parametrize("steps", [(3,), (3, 3), (-1, 2), (1, 2, 3)])
def test_profile_steps_are_two(config, tmp_path, steps):
    with pytest.raises(fr.InputError, match=r"profile_steps must be \(first, stop\)"):
        fr.train(changed(config, profile_steps=steps), tmp_path / "run")


def test_profile_steps_are_of_the_run(config, tmp_path):
    with pytest.raises(
        fr.InputError, match=r"profile_steps=\(4, 6\) begin after the run, which has 4 steps"
    ):
        fr.train(changed(config, num_steps=4, profile_steps=(4, 6)), tmp_path / "run")


def test_cross_entropy_of_each_example_is_that_of_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 4)), rng.integers(0, 4, 6)
    for smoothing in (0.0, 0.2):
        expected = torch.nn.functional.cross_entropy(
            torch.tensor(logits), torch.tensor(labels), label_smoothing=smoothing, reduction="none"
        )
        ours = cross_entropy(jnp.float32(logits), jnp.asarray(labels), label_smoothing=smoothing)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
