"""Runs on folders of photographs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from typing import Any

import chex
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

import flax_resnet as fr
from flax_resnet import demo, evaluate, predict, progress
from flax_resnet.data import Sizing, channel_statistics, epoch_order
from flax_resnet.data.batches import example_random
from flax_resnet.data.pictures import read_for_evaluation
from flax_resnet.training import check_config, data, writers
from flax_resnet.training.data import open_split
from flax_resnet.training.loop import Loop
from flax_resnet.training.own import Own
from flax_resnet.training.plan import make_plan
from tests.data.test_pictures import draw, encoded
from tests.training.test_train import read_metrics, steps_kept, train_until, without_timing

IMAGENET = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder: red and blue pictures of many sizes."""
    root = tmp_path_factory.mktemp("data") / "pictures"
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 9)):
        for channel, name in ((0, "red"), (2, "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shape = (rng.integers(20, 70), rng.integers(20, 70), 3)
                pixels = rng.integers(0, 160, shape, dtype=np.uint8)
                pixels[..., channel] += 90
                kind = "png" if i % 3 else "jpg"
                Image.fromarray(pixels).save(root / split / name / f"{i}.{kind}")
    return root


def config_of(pictures, **changes):
    return {
        "dataset": f"folder:{pictures}",
        "image_size": 16,
        "crop": "resized",
        "model": "cifar_resnet8",
        "model_fields": {"widths": (4, 8, 8)},
        "batch_size": 8,
        "eval_batch_size": 8,
        "num_epochs": 3,
        "learning_rate": 0.05,
        "stream_workers": 0,
    } | changes


@pytest.fixture(scope="module")
def photos_run(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, fr.train(config_of(pictures), folder)


def test_pictures_are_learnt(photos_run):
    assert read_metrics(photos_run[0])[-1]["test_accuracy"] > 0.8


def test_stopped_run_goes_on_to_the_same_bits(photos_run, pictures, tmp_path, monkeypatch):
    folder, expected = photos_run
    train_until(7, config_of(pictures), tmp_path, monkeypatch, kept={5, 7})
    # Read by another process, every epoch anew, and not kept in memory.
    state = fr.train(config_of(pictures, data_feed="stream", stream_workers=1), tmp_path)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))
    assert without_timing(read_metrics(tmp_path)) == without_timing(read_metrics(folder))


def test_run_describes_its_pictures(photos_run, pictures):
    stored = json.loads((photos_run[0] / "dataset.json").read_text())
    assert stored["class_names"] == ["blue", "red"]
    assert (stored["train_examples"], stored["test_examples"]) == (40, 18)
    assert stored["image_shape"] == [16, 16, 3]
    assert stored["train"]["bad_images"] == 0
    # Mean and deviation are of the training pictures as evaluation has them.
    train, _ = open_split(check_config(config_of(pictures)), "train")
    np.testing.assert_allclose(
        [stored["mean"], stored["std"]], channel_statistics([train.load().images])
    )


def test_another_folder_is_refused(photos_run, pictures, tmp_path):
    copy = shutil.copytree(photos_run[0], tmp_path / "run")
    changed = shutil.copytree(pictures, tmp_path / "pictures")
    config = config_of(changed)
    fr.train(config, copy)  # it may move
    changed = changed.rename(tmp_path / "photos")
    config = config_of(changed)
    fr.train(config, copy)  # and have another name
    assert json.loads((copy / "dataset.json").read_text())["name"] == "folder:photos"
    os.unlink(changed / "train" / "red" / "1.png")
    shutil.copy(changed / "train" / "red" / "2.png", changed / "train" / "red" / "99.png")
    with pytest.raises(fr.InputError, match=r"the data is not what the run in .* began with"):
        fr.train(config, copy)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_picture_that_vanishes_loses_nothing(photos_run, pictures, tmp_path, monkeypatch, split):
    _, expected = photos_run
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    gone = copy / split / "red" / "1.png"
    advance, done = Loop._advance, []

    def take_away(self):
        if self._step == 6:
            gone.unlink(missing_ok=True)
        advance(self)
        done.append(self._step)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_advance", take_away)
        with pytest.raises(fr.InputError, match=r"red/1\.png: No such file or directory"):
            fr.train(config_of(copy, data_feed="stream"), tmp_path / "run")
    last = {"train": 14, "val": 15}[split]
    assert 6 <= steps_kept(tmp_path / "run")[-1] == done[-1] <= last
    assert len(read_metrics(tmp_path / "run")) < 3
    shutil.copy(pictures / split / "red" / "1.png", gone)
    state = fr.train(config_of(copy), tmp_path / "run")
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))


def test_prediction_prepares_a_picture_as_evaluation_did(photos_run, pictures, call):
    folder, _ = photos_run
    run = fr.load_run(folder)
    test = evaluate.open_test_set(run)
    probabilities = evaluate.evaluate(run, test).probabilities
    split, _ = open_split(run.config, "test")
    paths = split.pictures.paths  # pyright: ignore[reportAttributeAccessIssue]
    code, out, _ = call(predict, "--workdir", folder, "--json", *paths[:5])
    assert code == 0
    for i, line in enumerate(out.splitlines()):
        shown = {p["class"]: p["probability"] for p in json.loads(line)["predictions"]}
        assert shown["blue"] == pytest.approx(probabilities[i, 0], abs=1e-5)


def test_evaluation_names_the_folder_that_it_reads(photos_run, pictures, tmp_path, call):
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    code, out, said = call(evaluate, "--workdir", photos_run[0], "--data_dir", moved)
    assert (code, f"images of folder:{moved} " in out, "not all" in said) == (0, True, False)
    min((moved / "val" / "red").iterdir()).unlink()
    code, out, said = call(evaluate, "--workdir", photos_run[0], "--data_dir", moved)
    assert (code, f"images of folder:{moved} " in out) == (0, True)
    assert f"the pictures of folder:{moved} are not all the same as in training" in said


def test_tensorboard_shows_the_random_crops(pictures, tmp_path):
    config = check_config(config_of(pictures, horizontal_flip=False))
    plan = make_plan(config, tmp_path / "run", Own())
    index = np.arange(40)
    shown = writers._first_inputs(plan, 0)
    train: Any = plan.data.train
    randoms = (example_random(config.seed, 0, int(i)) for i in index)
    np.testing.assert_array_equal(shown, train.read_crops(index, randoms)[0])
    assert (shown != train.read(index)[0]).mean() > 0.5


def test_examples_of_the_page_are_the_test_images(photos_run, tmp_path):
    run = fr.load_run(photos_run[0])
    test = evaluate.open_test_set(run)
    images, labels = test.read(np.arange(len(test)))
    expected = images[np.unique(labels, return_index=True)[1]]
    read = predict.make_reader(run)
    examples = [read(path) for path in demo.write_examples(run, tmp_path)]
    np.testing.assert_array_equal(examples, expected)


@pytest.mark.slow
def test_small_pictures_may_lie_on_the_device(pictures, tmp_path):
    """Without random crops they are images of one size like any other."""
    config = config_of(pictures, crop="padded", crop_padding=2, num_epochs=1)
    resident, streamed = (
        fr.train(config | {"data_feed": feed}, tmp_path / feed) for feed in ("auto", "stream")
    )
    chex.assert_trees_all_equal(jax.device_get(resident), jax.device_get(streamed))


@pytest.mark.slow
@pytest.mark.parametrize("feed", ["auto", "stream"])
def test_a_long_evaluation_says_how_far_it_is(pictures, tmp_path, monkeypatch, capsys, feed):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    config = config_of(pictures, crop="padded", crop_padding=1, data_feed=feed, num_steps=1)
    fr.train(config, tmp_path)
    assert "evaluating: 2 of 3 batches\n" in capsys.readouterr().err


def test_an_evaluation_has_a_bar(monkeypatch, capsys):
    sums = [{"count": i} for i in range(3)]
    assert list(progress.slow_bar(iter(sums), 3, "evaluating", "batches")) == sums
    assert not capsys.readouterr().err  # of one that is soon done
    at_once = {"mininterval": 0, "delay": 0}
    monkeypatch.setattr(progress, "tqdm", lambda *args, **options: tqdm(*args, **options | at_once))
    monkeypatch.setattr(progress, "shows_bars", lambda: True)
    assert list(progress.slow_bar(iter(sums), 3, "evaluating", "batches")) == sums
    assert re.search(r"evaluating:  67%.* 2/3 ", capsys.readouterr().err)


# What the keys of a config come to.


def test_sizing_is_that_of_the_config():
    config = check_config(
        {
            "image_size": 16,
            "crop": "resized",
            "eval_resize": 20,
            "interpolation": "bicubic",
            "crop_area": (0.2, 0.9),
            "crop_ratio": (0.5, 2.0),
            "auto_augment": "randaugment",
        }
    )
    expected = Sizing(16, 20, "bicubic", 1, (0.2, 0.9), (0.5, 2.0), "randaugment")
    assert data.sizing(config, 1) == expected


def test_label_and_channels_are_those_of_the_config(monkeypatch):
    config = check_config({"dataset": "mnist", "label_key": "parity", "channels": 3})
    monkeypatch.setattr(data, "Source", lambda *names, **keys: (names, keys))
    opened, _ = open_split(config, "train[:9]", data_dir="somewhere")
    assert opened == (
        ("mnist", "train[:9]", "somewhere"),
        {"label_key": "parity", "channels": 3},
    )


# Normalisation.


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("imagenet", IMAGENET),
        pytest.param(
            "0.5,0.4,0.3/0.2,0.2,0.1",
            [[0.5, 0.4, 0.3], [0.2, 0.2, 0.1]],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_normalisation_by_choice(pictures, tmp_path, normalize, expected):
    fr.train(config_of(pictures, normalize=normalize, num_steps=1), tmp_path)
    run = fr.load_run(tmp_path)
    assert [list(run.mean), list(run.std)] == expected


@pytest.mark.slow
def test_normalisation_of_what_a_run_starts_from(photos_run, pictures, tmp_path, capsys):
    source, _ = photos_run
    begun = json.loads((source / "dataset.json").read_text())
    config = config_of(pictures, init_from=str(source), num_steps=2, eval_resize=24)
    fr.train(config, tmp_path / "tuned")
    assert f"mean and standard deviation of the run in {source}" in capsys.readouterr().err
    tuned = json.loads((tmp_path / "tuned" / "dataset.json").read_text())
    assert (tuned["mean"], tuned["std"]) == (begun["mean"], begun["std"])
    # The whole pictures have other numbers than their middles.
    fr.train(config | {"normalize": "data"}, tmp_path / "of data")
    of_data = json.loads((tmp_path / "of data" / "dataset.json").read_text())
    train, _ = open_split(check_config(config), "train")
    statistics = channel_statistics([train.load().images])
    np.testing.assert_allclose([of_data["mean"], of_data["std"]], statistics)
    assert of_data["mean"] != begun["mean"]

    fr.save_weights(
        fr.load_run(source).model, fr.load_run(source).variables, tmp_path / "w.safetensors"
    )
    config |= {"init_from": str(tmp_path / "w.safetensors")}
    fr.train(config, tmp_path / "published")
    assert "mean and standard deviation of ImageNet's" in capsys.readouterr().err
    published = json.loads((tmp_path / "published" / "dataset.json").read_text())
    assert [published["mean"], published["std"]] == IMAGENET
    os.unlink(tmp_path / "w.safetensors")  # it is not read again
    fr.train(config, tmp_path / "published")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": None, "crop": "padded"}, "a folder of pictures needs image_size"),
        ({"dataset": "digits", "image_size": None}, "crop 'resized' needs image_size, such as 224"),
        ({"eval_resize": 15}, "eval_resize must be at least image_size, 16"),
        ({"normalize": "0.5/0.5"}, "numbers for 1 channels, but the images have 3"),
        ({"normalize": "0.5,0.5,0.5/0.5,0.5,0"}, "normalize must be auto, data, imagenet, or"),
        ({"normalize": "imagnet"}, "normalize must be auto, data, imagenet, or a mean and a devi"),
        ({"crop_area": (0.5, 0.1)}, "crop_area must be two shares of the picture"),
        ({"crop_ratio": (0.5,)}, "crop_ratio must be two numbers from 0.01 to 100"),
        ({"auto_augment": "autoaugment"}, "auto_augment must be one of none, randaugment, triv"),
        (
            {"auto_augment": "randaugment", "crop": "padded"},
            "auto_augment 'randaugment' needs crop 'resized' and image_size",
        ),
        ({"bad_images": "ignore"}, "bad_images must be one of stop, skip"),
        ({"channels": 4}, "with image_size pictures have 1 or 3 channels, not 4"),
        ({"dataset": "folder:"}, "name the folder of pictures: dataset=folder:PATH"),
        ({"dataset": "digits", "bad_images": "skip"}, "bad_images='skip' is for a folder"),
    ],
)
def test_what_cannot_be_is_refused(pictures, changes, message, tmp_path):
    with pytest.raises(fr.InputError, match=message):
        fr.train(config_of(pictures, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Data sets of TFDS whose images differ in size.


class Mixed(tfds.core.GeneratorBasedBuilder):
    """Pictures of different sizes, as those of imagenet2012 or food101."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["red", "blue"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        for i in range(24):
            image = draw(20 + i, 40 - i, seed=i + 100 * (split == "test"))
            yield i, {"image": image, "label": i % 2}


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_images_of_tfds_that_differ_in_size(tmp_path, crop):
    data_dir = tmp_path / "data"
    Mixed(data_dir=str(data_dir)).download_and_prepare(file_format="array_record")
    config = config_of(None, dataset="mixed", data_dir=str(data_dir), crop=crop, crop_padding=1)
    if crop == "resized":
        config |= {"auto_augment": "trivialaugment"}
    fr.train(config | {"num_epochs": 1}, tmp_path / "run")
    split, _ = open_split(check_config(config), "test[10:13]")
    images, labels = split.read(np.arange(3))
    files, _ = split.pictures.files(np.arange(3))  # pyright: ignore[reportAttributeAccessIssue]
    for image, file in zip(images, files, strict=True):
        with Image.open(file) as decoded:
            expected = read_for_evaluation(encoded(decoded), Sizing(16, 18))
        np.testing.assert_array_equal(image, expected)
    assert set(labels) <= {0, 1}
    other = {"image_size": None, "crop": "padded", "auto_augment": "none"}
    with pytest.raises(fr.InputError, match=r"image_shape of mixed: .*; --config.image_size=224"):
        fr.train(config | other, tmp_path / "other")


# Two processes, on the loopback address.

HOST = """
import json, sys

import flax_resnet as fr
from flax_resnet.data import Photos
from flax_resnet.training.hosts import connect

config, workdir, port, host, decoded = sys.argv[1:]
image = Photos._image

def noted(self, i, file, random):
    with open(decoded, "a") as out:
        print("train" if random else "test", i, file=out)
    return image(self, i, file, random)

Photos._image = noted
connect(f"127.0.0.1:{port}", 2, int(host))
fr.train(json.loads(config), workdir)
"""


def start_hosts(config, folder):
    """Two processes that write what they decode to folder/0 and folder/1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", HOST, json.dumps(config), folder / "run", str(port)]
    return [
        subprocess.Popen([*command, str(i), folder / str(i)], stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]


def decoded_by(host, split):
    lines = (line.split() for line in host.read_text().splitlines())
    return [int(i) for kind, i in lines if kind == split]


@pytest.mark.slow
def test_two_hosts_decode_their_shares_and_go_on_after_a_kill(pictures, tmp_path):
    # An epoch is a step, and the rate small, so that what float32 rounds does not grow.
    config = config_of(pictures, batch_size=40, num_epochs=5, learning_rate=0.005)
    config |= {"data_feed": "stream", "normalize": "imagenet", "checkpoint_minutes": 0.0001}
    fr.train(config, tmp_path / "alone")

    hosts = start_hosts(config, tmp_path)
    assert hosts[0].stderr
    assert any(line.startswith("epoch 3/") for line in hosts[0].stderr)
    for host in hosts:
        host.kill()
        host.communicate(timeout=60)
    for name in "01":
        (tmp_path / name).unlink()

    hosts = start_hosts(config, tmp_path)
    said = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    done = int(re.search(r"5 epochs, (\d) of them done", said[0])[1])  # pyright: ignore
    assert 1 <= done <= 3
    ours, alone = (read_metrics(tmp_path / name) for name in ("run", "alone"))
    assert [record["epoch"] for record in ours] == [1, 2, 3, 4, 5]
    for name in ("train_loss", "test_loss"):
        losses = [[record[name] for record in run] for run in (ours, alone)]
        np.testing.assert_allclose(*losses, rtol=1e-4)

    steps = range(done, 5)
    orders = [epoch_order(0, step, 40) for step in steps]
    for host, share in ((0, slice(0, 20)), (1, slice(20, 40))):
        expected = [i for order in orders for i in order[share]]
        assert decoded_by(tmp_path / str(host), "train") == expected
        # Of each batch of 8 its half; the last is filled up by the last picture.
        places = np.arange(24).reshape(3, 2, 4)[:, host].ravel().clip(max=17)
        expected = places.tolist() * len(steps)
        tested = decoded_by(tmp_path / str(host), "test")
        assert tested[: len(expected)] == expected  # and some that were read ahead
