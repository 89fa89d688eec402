"""A model, data, a loss, an optimizer and augmentation of a script's own, in the trainer."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import flax_resnet as fr
from flax_resnet import evaluate, predict
from flax_resnet.data import ExampleSource, epoch_order
from flax_resnet.report import write_report
from flax_resnet.training import check_config, cross_entropy, plan
from flax_resnet.training.checkpoint_files import steps_in
from flax_resnet.training.data import find_room, open_data
from flax_resnet.training.mesh import make_mesh
from flax_resnet.training.own import Own
from tests.training.test_train import read_metrics, train_until, without_timing

CLASSES = ("dark", "bright", "red")
CONFIG = {"batch_size": 16, "num_epochs": 2, "learning_rate": 0.01, "crop_padding": 0}


class CNN(nn.Module):
    """Two convolutions, without BatchNorm."""

    features: int = 4

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(self.features, (3, 3))(x))
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Conv(4, (3, 3), 2)(x)))
        return nn.Dense(len(CLASSES))(x.mean((1, 2)))


def focal_loss(logits, labels):
    """T.-Y. Lin et al., arXiv:1708.02002, section 3.2, with gamma 2."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (1 - jnp.exp(-losses)) ** 2 * losses


def brighter(images, keys):
    """Each image times a number of its own."""
    factors = jax.vmap(partial(jax.random.uniform, minval=0.8, maxval=1.0))(keys)
    return images * factors[:, None, None, None]


def arrays(count, size=8):
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 100, (count, size, size, 3), dtype=np.uint8)
    images[labels == 1] += 120
    images[labels == 2, ..., 0] += 120
    return fr.Dataset(images, labels, CLASSES)


class Listed:
    """As a map-style data set of PyTorch or Hugging Face, with an adapter."""

    class_names = CLASSES

    def __init__(self, dataset):
        self.examples = list(zip(dataset.images, dataset.labels, strict=True))

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        image, label = self.examples[i]
        return {"image": Image.fromarray(image), "label": label}


DATA = arrays(50), arrays(20)
SCANNING = fr.ResNet(
    *(fr.BasicBlock, (2, 1), 3), widths=(4, 8), strides=(1, 2), cifar_stem=True, scan_blocks=True
)
OWN: dict[str, Any] = {
    "model": CNN(),
    "data": DATA,
    "loss": focal_loss,
    "optimizer": optax.adamw,
    "augment": brighter,
}


def own_but(**others: Any) -> dict[str, Any]:
    return OWN | others


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """(folder, state) of a run in which everything is its script's own."""
    folder = tmp_path_factory.mktemp("own")
    return folder, fr.train(CONFIG, folder, **OWN)


def test_all_of_ones_own_is_the_same_training_by_hand(own_run):
    """Against Flax, Optax and NumPy alone, from the first weights on."""
    from flax_resnet.training.programs import random_keys

    folder, state = own_run
    train, test = DATA
    keys = random_keys(0)
    model = CNN()
    x = train.images / 255
    mean, std = x.mean((0, 1, 2)), x.std((0, 1, 2))
    params = model.init(keys.init, jnp.zeros((1, 8, 8, 3)), train=False)["params"]
    total, step = 6, 0
    schedule = optax.cosine_decay_schedule(0.01, total)
    optimizer = optax.adamw(schedule)
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, opt_state, images, labels, step):
        def loss(params):
            rngs = {"dropout": jax.random.fold_in(keys.dropout, step)}
            logits = model.apply({"params": params}, images, train=True, rngs=rngs)
            return focal_loss(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    losses = []
    for epoch in range(2):
        order = epoch_order(0, epoch, 50)
        epoch_key = jax.random.fold_in(keys.augmentation, epoch)
        for start in (0, 16, 32):
            index = order[start : start + 16]
            of_each = jax.vmap(partial(jax.random.fold_in, epoch_key))(index)
            images = brighter(jnp.float32(train.images[index]), of_each)
            images = jnp.float32((np.asarray(images) / 255 - mean) / std)
            params, opt_state, value = update(
                params, opt_state, images, jnp.asarray(train.labels[index]), step
            )
            losses.append(float(value))
            step += 1
    chex.assert_trees_all_close(jax.device_get(state.params), params, rtol=1e-4, atol=1e-5)
    records = read_metrics(folder)
    np.testing.assert_allclose(
        [r["train_loss"] for r in records], np.reshape(losses, (2, 3)).mean(1), rtol=1e-4
    )
    pixels = jnp.float32((test.images / 255 - mean) / std)
    logits: Any = model.apply({"params": params}, pixels, train=False)
    losses = np.asarray(focal_loss(logits, test.labels))
    assert records[-1]["test_loss"] == pytest.approx(losses.mean(), rel=1e-4)
    accuracy = (np.asarray(logits).argmax(-1) == test.labels).mean()
    assert records[-1]["test_accuracy"] == pytest.approx(accuracy)
    assert records[-1]["learning_rate"] == pytest.approx(float(jnp.asarray(schedule(5))))


def test_config_says_by_name_what_was_brought(own_run):
    stored = json.loads((own_run[0] / "config.json").read_text())
    assert stored["brought"] == {
        "model": "CNN",
        "data": "Dataset, Dataset",
        "loss": "focal_loss",
        "optimizer": "adamw",
        "augment": "brighter",
    }
    # What these took the place of would say what is not so.
    assert not {"model", "dataset", "momentum", "crop_padding", "label_smoothing"} & set(stored)


def test_stopped_run_goes_on_to_the_same_bits(own_run, tmp_path, monkeypatch):
    folder, expected = own_run
    monkeypatch.setattr(fr, "train", partial(fr.train, **OWN))
    train_until(2, CONFIG, tmp_path, monkeypatch)
    state = fr.train(CONFIG, tmp_path)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))
    assert without_timing(read_metrics(tmp_path)) == without_timing(read_metrics(folder))


SCRIPT = """
    import sys
    import flax.linen as nn, jax.numpy as jnp, numpy as np, optax
    import flax_resnet as fr
    from flax_resnet.report import write_report

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Conv(8, (3, 3), 2)(x))
            x = nn.relu(nn.Conv(16, (3, 3), 2)(x))
            return nn.Dense(2)(x.mean((1, 2)))

    def focal_loss(logits, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (1 - jnp.exp(-losses)) ** 2 * losses

    def make(count):
        images = np.random.default_rng(count).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        return fr.Dataset(images, (images.mean((1, 2, 3)) > 127.5).astype(int), ("dark", "bright"))

    if __name__ == "__main__":
        config = {"batch_size": 32, "num_epochs": int(sys.argv[2]), "learning_rate": 0.01}
        own = {"data": (make(320), make(64)), "loss": focal_loss, "optimizer": optax.adamw}
        fr.train(config, sys.argv[1], model=CNN(), **own)
        write_report([sys.argv[1]], model=CNN(), data=make(64))
"""


@pytest.mark.slow
def test_script_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    assert len([line for line in script.read_text().splitlines() if line]) <= 25

    def start(folder) -> Any:
        command = [sys.executable, script, tmp_path / folder, "6"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    with start("killed") as process:
        for line in process.stderr:
            if line.startswith("epoch 3/"):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    for folder in ("killed", "whole"):
        with start(folder) as process:
            said = process.stderr.read()
        assert process.returncode == 0, said
        assert ("0 of them done" in said) == (folder == "whole")
    whole, killed = (
        fr.load_run(tmp_path / name, "newest", model=_cnn()) for name in ("whole", "killed")
    )
    chex.assert_trees_all_equal(whole.variables, killed.variables)
    assert without_timing(whole.records) == without_timing(killed.records)
    report = (tmp_path / "killed" / "report.html").read_text()
    for shown in ("CNN, of its own", "focal_loss, of its own", "bright", "64 images"):
        assert shown in report


def _cnn():
    scope: dict[str, Any] = {"__name__": "script"}
    exec(textwrap.dedent(SCRIPT), scope)
    return scope["CNN"]()


# Data.


@pytest.mark.parametrize(
    ("feed", "workers"), [("auto", 0), pytest.param("stream", 1, marks=pytest.mark.slow)]
)
def test_examples_by_number_give_the_same_bits_as_arrays(own_run, tmp_path, feed, workers):
    _, expected = own_run
    config = CONFIG | {"data_feed": feed, "stream_workers": workers}
    state = fr.train(config, tmp_path, **own_but(data=tuple(map(Listed, DATA))))
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))


def test_arrays_can_be_streamed(own_run, tmp_path):
    config = CONFIG | {"data_feed": "stream"}
    room = find_room(make_mesh(16))
    assert not open_data(check_config(config), tmp_path, room, DATA).is_resident
    state = fr.train(config, tmp_path, **OWN)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(own_run[1]))


def test_grey_images_get_an_axis_of_channels():
    grey = listed(_0=(np.zeros((8, 8), np.uint8), 1))
    assert ExampleSource(grey).image_shape == (8, 8, 1)


IMAGES = DATA[0].images


def listed(**changes):
    examples = Listed(DATA[0])
    for i, change in changes.items():
        examples.examples[int(i[1:])] = change
    return examples


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (
            listed(_7=(np.zeros((9, 8, 3), np.uint8), 0)),
            r"differ in shape: \[8, 8, 3\] .* example 7",
        ),
        (
            listed(_7=(IMAGES[0], 3)),
            "label 3 of example 7 in Listed is not from 0 to 2, for 3 class_names",
        ),
        (listed(_7=(IMAGES[0], -1)), "label -1 of example 7"),
        (listed(_7=(IMAGES[0], 1.5)), r"a label is an int; example 7 of Listed has float64 \[\]"),
        (listed(_7=(IMAGES[0],)), "example 7 of Listed cannot be read: ValueError: not enough"),
    ],
)
@pytest.mark.parametrize("feed", ["resident", "stream"])
def test_examples_that_are_none(examples, message, feed, tmp_path):
    config = CONFIG | {"data_feed": feed, "stream_workers": 0}
    with pytest.raises(fr.InputError, match=message):
        fr.train(config, tmp_path / "run", model=CNN(), data=(examples, DATA[1]))
    assert not (tmp_path / "run").exists()


class Numbered(Listed):
    class_names: Any = (0, 1, 2)


@pytest.mark.parametrize("feed", ["resident", "stream"])
def test_names_of_classes_are_strings(feed, tmp_path):
    config = CONFIG | {"data_feed": feed, "stream_workers": 0}
    with pytest.raises(fr.InputError, match=r"class_names must be strings, .*not \(0, 1, 2\)"):
        fr.train(config, tmp_path / "run", model=CNN(), data=(Numbered(DATA[0]), DATA[1]))


def test_a_split_keeps_its_length():
    examples = Listed(DATA[0])
    source = ExampleSource(examples)
    examples.examples += examples.examples[:7]
    assert len(source) == 50
    del examples.examples[20:]
    with pytest.raises(fr.InputError, match="example 20 of Listed cannot be read: IndexError"):
        source.read(np.array([20]))


class Opened(Listed):
    """With what cannot be given to another process."""

    lock = None

    def __init__(self, split):
        super().__init__(split)
        self.lock = threading.Lock()


class Dying(Listed):
    """Whose process is killed as it reads for the seventh epoch."""

    reads = 0

    def __getitem__(self, i):
        self.reads += 1
        if self.reads > 6 * 48 and multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_data_that_cannot_be_given_to_processes(tmp_path):
    config = CONFIG | {"data_feed": "stream", "stream_workers": 1}
    with pytest.raises(fr.InputError, match=r"cannot be given it: .*lock.*; open files when"):
        fr.train(config, tmp_path, model=CNN(), data=(Opened(DATA[0]), DATA[1]))


@pytest.mark.slow
def test_a_process_that_is_killed_as_it_reads_loses_nothing(tmp_path):
    normalize = "0.5,0.5,0.5/0.2,0.2,0.2"  # which nothing is read for
    config = CONFIG | {"data_feed": "stream", "stream_workers": 1, "normalize": normalize}
    config["num_epochs"] = 9
    with pytest.raises(fr.InputError, match=r"has died \(exit code -9\), mostly of too little"):
        fr.train(config, tmp_path, model=CNN(), data=(Dying(DATA[0]), DATA[1]))
    assert 3 <= max(steps_in(tmp_path)) <= 18


def test_splits_that_do_not_belong_together(tmp_path):
    train, test = DATA
    others = [
        (fr.Dataset(test.images[:, 1:], test.labels, CLASSES), "image_shape of Dataset"),
        (fr.Dataset(test.images, test.labels, ("a", "b", "c")), "class_names of Dataset"),
    ]
    for other, message in others:
        with pytest.raises(fr.InputError, match=message):
            fr.train(CONFIG, tmp_path, data=(train, other))


# What cannot be used is refused before anything is computed.


class Unpooled(CNN):
    @nn.compact
    def __call__(self, x, train):
        return nn.Conv(3, (3, 3))(x)


class Counting(CNN):
    @nn.compact
    def __call__(self, x, train):
        self.variable("counts", "calls", lambda: jnp.zeros(()))
        return nn.Dense(3)(x.mean((1, 2)))


class WithoutTrain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.mean((1, 2)))


class Noisy(CNN):
    """With a name for its random numbers that the trainer does not know."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.1, deterministic=not train, rng_collection="noise")(x)
        return nn.Dense(3)(x.mean((1, 2)))


class Auxiliary(CNN):
    @nn.compact
    def __call__(self, x, train):
        logits = nn.Dense(3)(x.mean((1, 2)))
        return (logits, logits) if train else logits


class LateNorm(CNN):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=False)(x) if train else x
        return nn.Dense(3)(x.mean((1, 2)))


class Boxed(CNN):
    @nn.compact
    def __call__(self, x, train):
        ones = nn.with_partitioning(nn.initializers.ones, ("features", None))
        return nn.Dense(3, kernel_init=ones)(x.mean((1, 2)))


def looping_loss(logits, labels):
    """Which can be computed, but has no gradient."""
    losses = focal_loss(logits, labels)
    return jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x + 1, losses)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"model": CNN}, "model is a flax.linen.Module, not a type"),
        (
            {"model": Unpooled()},
            r"Unpooled gives float32\[16, 8, 8, 3\] for 16 .*not logits \[16, 3\]",
        ),
        (
            {"model": Counting()},
            "model Counting has the collections counts; params and batch_stats",
        ),
        ({"model": WithoutTrain()}, "model cannot be used: TypeError: .*'train'"),
        ({"model": Noisy()}, "Noisy in training cannot be used: InvalidRngError: .*noise"),
        ({"model": Auxiliary()}, "Auxiliary in training gives a tuple, not an array"),
        ({"model": LateNorm()}, "LateNorm in training cannot be used: .*BatchNorm"),
        ({"model": Boxed()}, "model cannot be used: TypeError: .*Partitioned"),
        ({"loss": looping_loss}, "loss cannot be used: ValueError: Reverse-mode"),
        ({"loss": 3}, "loss is a function, not a int"),
        (
            {"loss": lambda *a: focal_loss(*a).mean()},
            r"loss gives float32\[\] for 16 examples, not",
        ),
        ({"loss": lambda logits: logits}, "loss cannot be used: TypeError: .*2 were given"),
        ({"optimizer": "adam"}, "optimizer is an optax.GradientTransformation, .*, not a str"),
        (
            {"optimizer": lambda rate: rate},
            "gives a function for a learning rate, not an optax.Grad",
        ),
        (
            {"optimizer": optax.contrib.reduce_on_plateau()},
            "optimizer cannot be used: TypeError: .*'value'",
        ),
        (
            {"augment": lambda images, keys: images[0]},
            r"augment gives uint8\[8, 8, 3\], not images",
        ),
        (
            {"augment": lambda images, keys: images[..., :1]},
            r"augment gives uint8\[16, 8, 8, 1\], not images \[16, H, W, 3\]",
        ),
        (
            {"model": SCANNING, "optimizer": optax.adafactor},
            "optimizer cannot be used: ValueError: its state does not keep .*scan_blocks=False",
        ),
        ({"model": SCANNING, "optimizer": optax.novograd}, "optimizer cannot be used: TypeError"),
        ({"augment": lambda images: images}, "augment cannot be used: TypeError"),
        ({"data": DATA[0]}, r"data is \(train, test\), .*, not a Dataset"),
        ({"data": (DATA[0], [1, 2])}, r"not \(a Dataset, a list\)|not \(a Dataset, \(a int"),
    ],
)
def test_what_cannot_be_used_is_refused(own, message, tmp_path):
    with pytest.raises(fr.InputError, match=message) as refused:
        fr.train(CONFIG, tmp_path / "run", **{"model": CNN(), "data": DATA} | own)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_run_that_is_too_long_to_count(tmp_path):
    with pytest.raises(fr.InputError, match="steps is too long"):
        fr.train(CONFIG | {"num_epochs": 2**30}, tmp_path / "run", model=CNN(), data=DATA)
    assert not (tmp_path / "run").exists()


class Halves(nn.Module):
    """Weights of 16 bits, and a counter."""

    @nn.compact
    def __call__(self, x, train):
        count = self.variable("batch_stats", "count", lambda: jnp.int32(0))
        if train:
            count.value += 1
        x = nn.Conv(4, (3, 3), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x).mean((1, 2))
        return nn.Dense(3, param_dtype=jnp.bfloat16)(x)


def test_average_has_the_types_of_the_weights(tmp_path):
    config = CONFIG | {"num_epochs": 1, "ema_decay": 0.9}
    state = fr.train(config, tmp_path, model=Halves(), data=DATA)
    chex.assert_trees_all_equal_dtypes(state.ema, state.variables)
    assert state.ema["batch_stats"]["count"] == state.step > 1


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"batch_norm": "per_replica"}, "batch_norm has no effect with model="),
        ({"freeze": ("conv1",)}, "freeze has no effect with model="),
        ({"image_size": 8, "crop": "resized"}, "image_size has no effect with data="),
        ({"channels": 1}, "channels has no effect with data="),
    ],
)
def test_keys_without_effect_on_ones_own_are_refused(key, message, tmp_path):
    with pytest.raises(fr.InputError, match=message):
        fr.train(CONFIG | key, tmp_path / "run", model=CNN(), data=DATA)


def test_own_optimizer_leaves_alone_what_is_frozen():
    params = {"conv1": {"kernel": jnp.ones(3)}, "fc": {"kernel": jnp.ones(3)}}
    config = check_config({"model": "cifar_resnet8", "freeze": ("conv1",)})
    for own in (optax.sgd(0.5), lambda rate: optax.sgd(0.5)):
        optimizer, _ = plan._choose_optimizer(config, Own(optimizer=own), lambda step: 0.1)
        updates: Any = optimizer.update(params, optimizer.init(params), params)[0]
        np.testing.assert_array_equal(updates["conv1"]["kernel"], np.zeros(3))
        np.testing.assert_array_equal(updates["fc"]["kernel"], np.full(3, -0.5))


@pytest.mark.slow
def test_optimizer_with_a_random_key_goes_on_to_the_same_bits(tmp_path):
    own = {"model": CNN(), "data": DATA, "optimizer": lambda rate: optax.noisy_sgd(rate, key=0)}
    whole = fr.train(CONFIG, tmp_path, **own)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    resumed = fr.train(CONFIG, tmp_path, **own)
    chex.assert_trees_all_equal(resumed.params, whole.params)


def test_norms_of_layers_would_be_those_of_many(tmp_path):
    model = fr.cifar_resnet8(num_classes=3, scan_blocks=True)
    with pytest.raises(fr.InputError, match="'lars' goes by the norm of each array"):
        fr.train(CONFIG | {"optimizer": "lars"}, tmp_path, model=model, data=DATA)


class Frozen(CNN):
    """A field that means nothing to the trainer."""

    frozen: bool = True


def test_model_with_a_field_called_frozen(tmp_path):
    state = fr.train(CONFIG | {"num_epochs": 1}, tmp_path, model=Frozen(), data=DATA)
    assert state.step == 3


def test_model_of_ours_with_frozen_parts(tmp_path):
    model = fr.cifar_resnet8(num_classes=3, frozen=("conv1", "bn1", "layer1"))
    state = fr.train(CONFIG | {"num_epochs": 1}, tmp_path, model=model, data=DATA)
    assert state.step == 3


def test_dataset_of_lists(tmp_path):
    lists: Any = list(CLASSES)
    train, test = (fr.Dataset(d.images, d.labels.tolist(), lists) for d in DATA)
    fr.train(CONFIG | {"num_epochs": 1}, tmp_path, model=CNN(), data=(train, test))
    run = fr.load_run(tmp_path, model=CNN())
    assert evaluate.open_test_set(run, own=test).class_names == CLASSES


@pytest.mark.parametrize("empty", [0, 1])
def test_dataset_without_examples(empty, tmp_path):
    splits: Any = [
        d if i != empty else dataclasses.replace(d, images=d.images[:0], labels=d.labels[:0])
        for i, d in enumerate(DATA)
    ]
    with pytest.raises(fr.InputError, match=r"an fr\.Dataset has no examples"):
        fr.train(CONFIG, tmp_path, model=CNN(), data=tuple(splits))


def test_picture_with_a_palette_has_its_colours():
    red = Image.new("RGB", (8, 8), (200, 10, 20)).convert("P", palette=Image.Palette.ADAPTIVE)

    class Palettes(Listed):
        def __getitem__(self, i):
            return {"image": red, "label": 0}

    images, _ = ExampleSource(Palettes(DATA[0])).read(np.array([1]))
    np.testing.assert_allclose(images, np.broadcast_to([200, 10, 20], (1, 8, 8, 3)), atol=1)


@pytest.mark.parametrize("missing", OWN)
def test_resume_without_what_was_brought_is_refused(own_run, missing):
    folder, _ = own_run
    own = {name: value for name, value in OWN.items() if name != missing}
    if missing == "data":
        own["model"] = OWN["model"]
    with pytest.raises(
        fr.InputError,
        match=rf"run with a {missing} of its own, .*: give it to fr.train as {missing}=",
    ):
        fr.train(CONFIG, folder, **own)


def test_resume_with_another_is_refused(own_run, tmp_path):
    folder, _ = own_run
    with pytest.raises(fr.InputError, match="with focal_loss for its loss, not cross_entropy"):
        fr.train(CONFIG, folder, **own_but(loss=cross_entropy))
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(
        fr.InputError,
        match=r"of another model: .*Conv_0.bias float32\[4\], expected float32\[5\].* and \d+ more",
    ):
        fr.train(CONFIG, copy, **own_but(model=CNN(features=5)))


def test_what_was_brought_to_a_run_without_is_refused(finished, config):
    with pytest.raises(
        fr.InputError, match="a run whose loss is that of its config, not focal_loss"
    ):
        fr.train(config, finished[0], loss=focal_loss)


def test_optimizer_with_a_rate_of_its_own(tmp_path):
    fr.train(CONFIG, tmp_path, model=CNN(), data=DATA, optimizer=optax.adam(0.01))
    assert [record["learning_rate"] for record in read_metrics(tmp_path)] == [None, None]
    assert fr.load_run(tmp_path, model=CNN()).records[0]["learning_rate"] is None


# Its folder.


def test_programs_say_what_is_missing(own_run, call, tmp_path):
    folder, _ = own_run
    for module, arguments in ((evaluate, ()), (predict, ["x.png"])):
        code, _, said = call(module, "--workdir", folder, *arguments)
        assert code == 2
        assert "has a model of its own, CNN: in Python fr.load_run(workdir, model=...)" in said
    path = write_report([folder], tmp_path / "without.html")
    assert "its model, CNN, is its script&#39;s own" in path.read_text()
    path = write_report([folder], tmp_path / "with.html", model=CNN(), data=DATA[1])
    assert "20 images" in path.read_text()


def test_run_is_opened_and_evaluated_with_its_model(own_run):
    folder, state = own_run
    run = fr.load_run(folder, "newest", model=CNN())
    chex.assert_trees_all_equal(run.variables["params"], jax.device_get(state.params))
    result = evaluate.evaluate(run, evaluate.open_test_set(run, own=DATA[1]))
    assert result.correct.mean() == pytest.approx(read_metrics(folder)[-1]["test_accuracy"])
    with pytest.raises(fr.InputError, match="data of its own, Dataset, Dataset"):
        evaluate.open_test_set(run)
    model: Any
    for model, message in (
        (CNN(features=5), "is of another model"),
        (CNN, "model is a flax.linen.Module, not a type"),
        (WithoutTrain(), "no run has such a model: TypeError: .*'train'"),
    ):
        with pytest.raises(fr.InputError, match=message):
            fr.load_run(folder, model=model)


class Named(nn.Module):
    """Whose layers have names that stacked blocks of ours have too."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), name="layer1_0")(x).mean((1, 2))
        return nn.Dense(3, name="layer2_rest")(nn.Dense(8, name="head_rest")(x))


def test_layers_of_ones_own_may_have_our_names(tmp_path):
    state = fr.train(CONFIG, tmp_path, model=Named(), data=DATA)
    run = fr.load_run(tmp_path, "newest", model=Named())
    chex.assert_trees_all_equal(run.variables["params"], jax.device_get(state.params))
    assert int(fr.train(run.config, tmp_path, model=Named(), data=DATA).step) == int(state.step)


def test_run_by_name_takes_no_model(finished):
    with pytest.raises(fr.InputError, match="has its model by name, cifar_resnet8"):
        fr.load_run(finished[0], model=CNN())


@pytest.mark.slow
def test_memory_is_kept_by_one_line_of_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from flax_resnet.memory import keep_memory\n"
        "if __name__ == '__main__':\n"
        "    keep_memory()\n"
        "    import jax\n"
        "    values = jax.config.values\n"
        "    print(os.environ['GLIBC_TUNABLES'], values['jax_cpu_enable_async_dispatch'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    run = partial(subprocess.run, capture_output=True, text=True, env=environment, check=True)
    printed = run([sys.executable, script]).stdout
    assert re.fullmatch(r"glibc\.malloc\.hugetlb=1:\S+ False\n", printed)
    # What has no file is not started again: there may be nothing left to read.
    program = "from flax_resnet.memory import *; keep_memory(); print('went on')"
    assert run([sys.executable, "-"], input=program).stdout == "went on\n"
