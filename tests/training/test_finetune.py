"""Runs that start from weights, and of which a part is frozen."""

import json
import shutil
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import flax_resnet as fr
from flax_resnet.models.freezing import is_frozen
from flax_resnet.training import check_config, create_state, make_optimizer, train_step
from flax_resnet.training.checkpoint_files import choose_checkpoint, read_variables
from flax_resnet.training.config import Config
from flax_resnet.training.initial import fit_initial, start_from
from tests.training.test_train import changed, read_metrics, train_until

FREEZE = ("conv1", "bn1", "layer1", "layer2.*.bn?")
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


def split(tree, patterns=FREEZE):
    """(frozen, other) leaves of variables."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    parts = {True: [], False: []}
    for path, leaf in leaves:
        parts[is_frozen(tuple(key.key for key in path), patterns)].append(np.asarray(leaf))
    return parts[True], parts[False]


def assert_only_others_changed(before, after):
    frozen, others = zip(split(before), split(after), strict=True)
    assert frozen[0]
    chex.assert_trees_all_equal(*frozen)
    assert all((a != b).any() for a, b in zip(*others, strict=True))


def test_steps_are_those_of_torch(rng):
    """Whose frozen modules are in eval(), without gradients."""
    torch = pytest.importorskip("torch")
    from tests.models import torch_resnet

    shape = {"num_classes": 10, "widths": (8, 16), "strides": (1, 2), "cifar_stem": True}
    twin: Any = torch_resnet.ResNet(torch_resnet.BasicBlock, (1, 2), **shape)
    torch_resnet.randomize(twin).train()
    for part in (twin.conv1, twin.bn1, twin.layer1, *(block.bn1 for block in twin.layer2)):
        part.eval().requires_grad_(False)
    for block in twin.layer2:
        block.bn2.eval().requires_grad_(False)
    theirs = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1, **SGD)

    model = fr.ResNet(fr.BasicBlock, (1, 2), **shape, frozen=FREEZE)
    optimizer = make_optimizer(Config(**SGD, freeze=FREEZE), optax.constant_schedule(0.1))
    variables = fr.from_torch(model, twin.state_dict())
    state = fr.TrainState.create(variables, optimizer)
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer))
    for _ in range(3):
        images = rng.normal(size=(8, 8, 8, 3)).astype(np.float32)
        labels = rng.integers(0, 10, 8, dtype=np.int32)
        state, metrics = step(state, {"image": images, "label": labels})
        loss, _ = torch_resnet.train_step(twin, theirs, images, labels)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)

    expected = fr.from_torch(model, twin.state_dict())
    chex.assert_trees_all_close(state.params, expected["params"], rtol=1e-4, atol=1e-4)
    assert_only_others_changed(variables, state.variables)


def test_the_optimizer_begins_with_the_weights_too():
    optimizer = optax.contrib.schedule_free(optax.sgd(0.1), 0.1)
    model = fr.ResNet(fr.BasicBlock, (1,), 10, widths=(8,), strides=(1,))
    state = create_state(model, optimizer, jax.random.key(0), (8, 8, 3), ema=True)
    ones = jax.tree.map(jnp.ones_like, state.variables)
    weights: Any = flatten_dict(ones)
    started: Any = start_from(weights, state, optimizer)
    chex.assert_trees_all_equal(started.opt_state.z, ones["params"])
    chex.assert_trees_all_equal(started.variables, ones)
    chex.assert_trees_all_equal(started.ema, ones)


def test_frozen_layers_have_no_momentum():
    model = fr.ResNet(fr.BasicBlock, (1,), 10, widths=(8,), strides=(1,), frozen=("conv1",))
    config = Config(freeze=("conv1", "bn1", "layer1"))
    optimizer = make_optimizer(config, optax.constant_schedule(0.1))
    create = partial(create_state, model, optimizer, image_shape=(8, 8, 3))
    state = jax.eval_shape(create, jax.random.key(0))
    momentum = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(momentum) == [(8, 10), (10,)]


def test_statistics_are_frozen_in_a_part_of_another_model(rng):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            net = fr.ResNet(
                fr.BasicBlock, (2,), 4, widths=(8,), strides=(1,), frozen=("layer1.1",), name="net"
            )
            return net(x, train=train)

    model = Outer()
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    variables = jax.tree.map(lambda s: jnp.ones(s.shape), shapes)
    apply = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    _, updates = apply(variables, x)
    before, after = (v["batch_stats"]["net"] for v in (variables, updates))
    for name in before:
        moved = any(
            (a != b).any()
            for a, b in zip(*map(jax.tree.leaves, (before[name], after[name])), strict=True)
        )
        assert moved == (name != "layer1_1")


@pytest.fixture(scope="module")
def tuned(finished, config, tmp_path_factory):
    """(config, folder, state) of a run from the best of `finished`."""
    folder = tmp_path_factory.mktemp("tuned")
    config = changed(config, init_from=str(finished[0]), freeze=FREEZE, num_epochs=2)
    config.learning_rate = 0.01
    return config, folder, fr.train(config, folder)


def test_run_goes_on_from_the_best_of_another(finished, tuned):
    best = max(read_metrics(finished[0]), key=lambda record: record["test_accuracy"])
    assert (finished[0] / "checkpoints" / str(best["step"])).exists()
    assert_only_others_changed(
        read_variables(choose_checkpoint(finished[0], "best")), tuned[2].variables
    )
    assert read_metrics(tuned[1])[0]["train_loss"] < read_metrics(finished[0])[0]["train_loss"]


def test_resume_needs_the_other_run_no_more(finished, tuned, tmp_path, monkeypatch):
    config, _, state = tuned
    source, workdir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(finished[0], source)
    config = changed(config, init_from=str(source))
    train_until(8, config, workdir, monkeypatch)
    shutil.rmtree(source)
    resumed = fr.train(config, workdir)
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(state))


def test_file_of_other_classes_gives_all_but_the_classifier(config, tmp_path, capsys):
    model = fr.cifar_resnet8(num_classes=4)
    shapes = jax.eval_shape(
        partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    )
    weights = jax.tree.map(lambda s: np.full(s.shape, 0.5, s.dtype), shapes)
    path = tmp_path / "four.safetensors"
    fr.save_weights(model, weights, path)
    everything = ("conv1", "bn1", "layer?")
    config = changed(config, init_from=str(path), freeze=everything, num_steps=1)
    config.warmup_epochs = 0.0
    state = fr.train(config, tmp_path / "run")
    assert "its 4 classes are not our 10: the classifier starts anew" in capsys.readouterr().err
    frozen, head = split(state.variables, everything)
    assert all((leaf == 0.5).all() for leaf in frozen)
    assert [leaf.shape for leaf in head] == [(10,), (64, 10)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_from": ""}, "name the weights to start from: --config.init_from=SOURCE"),
        ({"init_from": "nothing"}, "nothing is neither a file nor the id of a Hub repository"),
        ({"init_from": "gone.pth"}, "there is no file gone.pth"),
        ({"init_from": 300 * "x"}, "x is neither a file nor the id of a Hub repository"),
        ({"init_from": "."}, r"\. holds no checkpoint of a run"),
        ({"model": "cifar_resnet20"}, "for cifar_resnet20: .* missing layer1.1.bn1.bias"),
        ({"model": "vgg11"}, "for vgg11: .* other names .* where the model has classifier.0.bias"),
        ({"freeze": ("layr1",)}, "freeze: nothing in cifar_resnet8 is called 'layr1': did you me"),
        ({"freeze": ("layer1_0",)}, "did you mean layer1.0"),
        ({"freeze": ("x", "fc")}, "called 'x': it has bn1, layer1, layer2, layer3, conv1, fc"),
        ({"freeze": ("*",)}, "freeze leaves nothing to train"),
        ({"freeze": ("bn1",), "model_fields": {"scan_blocks": True}}, "scan_blocks=True runs"),
        ({"model_fields": {"frozen": ("bn1",)}}, "model_fields cannot set frozen"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_a_line(
    finished, config, tmp_path, monkeypatch, values, message
):
    monkeypatch.chdir(tmp_path)
    values = {"init_from": str(finished[0])} | values
    with pytest.raises(fr.InputError, match=message) as refused:
        fr.train(check_config(config).__dict__ | values, tmp_path / "run")
    assert len(str(refused.value)) < 500
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mean", [[float("nan")] * 3, [10**400, 0, 0], [0.5], "0.5", None])
def test_mean_that_no_run_writes(config, run_copy, tmp_path, mean):
    path = run_copy / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean": mean}))
    with pytest.raises(fr.InputError, match=r"dataset\.json is damaged: it does not hold mean and"):
        fr.train(changed(config, init_from=str(run_copy)), tmp_path / "run")


def test_weights_for_colours_are_summed_for_gray_images(finished):
    model, variables = fr.cifar_resnet8(), read_variables(choose_checkpoint(finished[0], "best"))
    state_dict = fr.to_torch(model, variables)
    weights = fit_initial(Config(init_from="run"), model, state_dict, (8, 8, 1))
    kernel = variables["params"]["conv1"]["kernel"]
    np.testing.assert_allclose(
        weights["params", "conv1", "kernel"], kernel.sum(2, keepdims=True), rtol=1e-6
    )


def test_run_of_an_earlier_version_goes_on(finished, config, tmp_path):
    """One whose config.json has none of the keys for this."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    del written["init_from"], written["freeze"]
    path.write_text(json.dumps(written))
    assert fr.train(config, folder).step == finished[1].step
