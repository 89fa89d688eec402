"""Whole runs on the digits, and what they leave behind."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.layout import Format, Layout
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import flax_resnet as fr
from flax_resnet.data import Source, channel_statistics, epoch_order, normalize
from flax_resnet.progress import Progress
from flax_resnet.training import (
    check_config,
    checkpoint,
    create_state,
    data,
    feeds,
    files,
    mesh,
    plan,
    programs,
    tensorboard,
    writers,
)
from flax_resnet.training.history import History, best_of
from flax_resnet.training.loop import Loop
from tests.data.test_datasets import as_tfrecord

TIMING = ("seconds", "images_per_second")


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_timing(records):
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]


def steps_kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_metrics_have_a_line_an_epoch(finished, config):
    records = read_metrics(finished[0])
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert [record["step"] for record in records] == [8, 16, 24, 32]
    for record in records:
        assert set(record) == {
            "epoch",
            "step",
            "train_loss",
            "train_accuracy",
            "test_loss",
            "test_accuracy",
            "gradient_norm",
            "learning_rate",
            "images_per_second",
            "seconds",
        }
        assert record["images_per_second"] > 0
        assert record["gradient_norm"] > 0
        # Of 101 test images, and of 8 batches of 32.
        assert record["test_accuracy"] * 101 == pytest.approx(round(record["test_accuracy"] * 101))
        assert record["train_accuracy"] * 256 == pytest.approx(
            round(record["train_accuracy"] * 256)
        )
    assert records[0]["learning_rate"] == pytest.approx(0.1 * 8 / 9)
    assert records[-1]["train_loss"] < 0.8 * records[0]["train_loss"]


def test_run_describes_itself(finished, config):
    folder, _ = finished
    stored = json.loads((folder / "config.json").read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(check_config(config))))
    dataset = json.loads((folder / "dataset.json").read_text())
    images = fr.load_dataset("digits", "train[:264]", config.data_dir).images / 255
    np.testing.assert_allclose(dataset["mean"], images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset["std"], images.std((0, 1, 2)), rtol=1e-6)
    assert dataset["class_names"] == list("0123456789")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def read_events(folder):
    everything = {kind: 0 for kind in ("scalars", "images", "histograms", "tensors")}
    return EventAccumulator(str(folder), everything).Reload()


def assert_tensorboard_shows_the_metrics(folder):
    names = {
        (".", "epoch/loss"): "train_loss",
        ("test", "epoch/loss"): "test_loss",
        ("test", "epoch/accuracy"): "test_accuracy",
        (".", "run/gradient_norm"): "gradient_norm",
        (".", "run/learning_rate"): "learning_rate",
    }
    events = {part: read_events(folder / part) for part in (".", "test")}
    for (part, tag), name in names.items():
        shown = [(event.step, event.value) for event in events[part].Scalars(tag)]
        stored = [(r["step"], r[name]) for r in read_metrics(folder)]
        np.testing.assert_allclose(shown, stored, rtol=1e-6)


def test_tensorboard_compares_runs_by_their_config(finished, config):
    events = read_events(finished[0])
    (text,) = events.Tensors("config")[0].tensor_proto.string_val
    assert f"| `batch_size` | `{config.batch_size}` |" in text.decode()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    kind = plugin_data_pb2.HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]
    values = kind.FromString(content).session_start_info.hparams
    assert values["batch_size"].number_value == config.batch_size
    assert values["model"].string_value == config.model


def test_tensorboard_shows_the_metrics(finished):
    assert_tensorboard_shows_the_metrics(finished[0])


def test_tensorboard_shows_a_resumed_run_whose_clock_went_back(tmp_path, monkeypatch):
    for i, time_ns in enumerate((2_000, 1_000)):
        monkeypatch.setattr(tensorboard.time, "time_ns", lambda now=time_ns: now)
        with contextlib.closing(tensorboard.open_writer(tmp_path, 8 * i)) as writer:
            tensorboard.write_scalars(writer, 8 * i + 8, "epoch", {"loss": 0.5, "accuracy": None})
    assert [event.step for event in read_events(tmp_path).Scalars("epoch/loss")] == [8, 16]


def test_tensorboard_shows_layers(finished):
    folder, state = finished
    events, records = read_events(folder), read_metrics(folder)
    convolutions = [f"layer{stage}.0.conv{i}" for stage in (1, 2, 3) for i in (1, 2)] + ["conv1"]
    gradients = {f"weights/gradient/{layer}" for layer in (*convolutions, "fc")}
    scales = {f"weights/scale/{layer.replace('conv', 'bn')}" for layer in convolutions}
    assert set(events.Tags()["histograms"]) == gradients | scales

    squares = np.zeros(len(records))
    for tag in gradients:
        histograms = events.Histograms(tag)
        assert [histogram.step for histogram in histograms] == [8, 16, 24, 32]
        for histogram in histograms:
            value = histogram.histogram_value
            assert value.num == sum(value.bucket) == 8  # steps
        squares += [histogram.histogram_value.sum_squares / 8 for histogram in histograms]
    # The kernels have most of the gradient, and not more than all; but the mean of squares is
    # above the square of the mean, by the variance over the steps.
    assert (squares < 1.3 * np.square([r["gradient_norm"] for r in records])).all()

    scale = np.asarray(state.params["layer2_0"]["bn1"]["scale"])
    value = events.Histograms("weights/scale/layer2.0.bn1")[-1].histogram_value
    assert (value.num, value.min, value.max) == (len(scale), scale.min(), scale.max())
    np.testing.assert_allclose(value.sum_squares, np.square(scale).sum(), rtol=1e-6)


def test_tensorboard_shows_inputs(finished, config):
    (event,) = read_events(finished[0]).Images("inputs")
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    images = fr.load_dataset("digits", "train[:64]", config.data_dir).images
    height, width = images.shape[1:3]
    assert shown.shape == (8 * height + 14, 8 * width + 14, 3)
    assert event.step == 0
    others = 0
    for i, image in enumerate(images):
        top, left = i // 8 * (height + 2), i % 8 * (width + 2)
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))  # crop_padding
        crops = [padded[y : y + height, x : x + width] for y in range(5) for x in range(5)]
        tile = shown[top : top + height, left : left + width]
        assert any((tile == crop).all() for crop in crops), i
        others += bool((tile != image).any())
    assert others > 32


def test_newest_and_best_state_are_kept(finished):
    folder, _ = finished
    records = read_metrics(folder)
    best = max(record["test_accuracy"] for record in records)
    bests = {record["step"] for record in records if record["test_accuracy"] == best}
    kept = steps_kept(folder)
    assert kept[-1] == records[-1]["step"]
    assert bests & set(kept)
    assert {16, 24, 32} <= set(kept)
    assert len(kept) <= 4


def test_final_state_gives_the_final_metrics(finished, config):
    folder, state = finished
    test = fr.load_dataset("digits", "test[:101]", config.data_dir)
    dataset = json.loads((folder / "dataset.json").read_text())
    images = (test.images / 255 - np.array(dataset["mean"])) / np.array(dataset["std"])
    variables = jax.device_get(state.variables)
    model = fr.cifar_resnet8()
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, np.float32(images))
    accuracy = (np.asarray(logits).argmax(1) == test.labels).mean()
    assert accuracy == read_metrics(folder)[-1]["test_accuracy"]


def test_streaming_gives_the_same_bits(finished, config, tmp_path):
    folder, expected = finished
    streaming = changed(config, data_feed="stream", stream_workers=1)
    chex.assert_trees_all_equal(
        jax.device_get(fr.train(streaming, tmp_path)), jax.device_get(expected)
    )
    assert without_timing(read_metrics(tmp_path)) == without_timing(read_metrics(folder))


def test_what_does_not_fit_is_streamed(config, tmp_path, monkeypatch):
    devices = mesh.make_mesh(config.batch_size)
    # The images and labels are 365 * 3,076 bytes, just above a quarter of this.
    monkeypatch.setattr(data, "host_memory", lambda: 4 << 20)
    room = data.find_room(devices)
    # The test split alone does fit.
    for data_feed, kind, test_kind in (
        ("auto", Source, fr.Dataset),
        ("resident", fr.Dataset, fr.Dataset),
        ("stream", Source, Source),
    ):
        run = check_config(changed(config, data_feed=data_feed, stream_workers=0))
        splits = data.open_data(run, tmp_path, room)
        assert (type(splits.train), type(splits.test)) == (kind, test_kind)
    monkeypatch.undo()
    room = data.find_room(devices)
    assert type(data.open_data(check_config(config), tmp_path, room).train) is fr.Dataset


def test_memory_is_divided_among_devices_and_processes(monkeypatch, eight_devices):
    # The other process is on the same machine, and sees a little less.
    monkeypatch.setattr(data.hosts, "_of_all", lambda value: np.stack([value, value - 1]))
    monkeypatch.setattr(data.hosts, "count_here", lambda: 2)
    monkeypatch.setattr(data, "host_memory", lambda: 64 << 20)
    assert data.find_room(mesh.make_mesh(8)) == data.Room((3 << 20) // 4, (31 << 20) // 4)
    monkeypatch.undo()
    monkeypatch.setattr(data.hosts, "_of_all", lambda value: np.stack([value, value, value + 1]))
    assert data.hosts.count_here.__wrapped__() == 2


@pytest.mark.slow
def test_a_run_goes_on_with_the_other_feed(finished, config, tmp_path, monkeypatch):
    resident, streamed = (
        changed(config, data_feed=name, stream_workers=0) for name in ("resident", "stream")
    )
    train_until(11, resident, tmp_path, monkeypatch)
    train_until(21, streamed, tmp_path, monkeypatch)
    state = fr.train(resident, tmp_path)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(finished[1]))


def test_tfrecord_that_would_have_to_be_streamed(config, own_digits, tmp_path):
    as_tfrecord(own_digits)
    with pytest.raises(fr.InputError, match="digits cannot be streamed from TFRecord files"):
        fr.train(changed(config, data_dir=str(own_digits), data_feed="stream"), tmp_path / "run")


class StopError(Exception):
    pass


def train_until(step, config, folder, monkeypatch, kept=None):
    """Trains to that step, with checkpoints after these: by default 8, a whole epoch, and it."""

    def stop(self):
        if int(self.state.step) in ({8, step} if kept is None else kept):
            save(self)
        if self.state.step >= step:
            raise StopError

    save = Loop._save
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_save", stop)
        patch.setattr(checkpoint.Checkpoints, "is_due", lambda self: True)
        with pytest.raises(StopError):
            fr.train(config, folder)


@pytest.mark.parametrize(
    ("step", "kept"),
    [(16, {8, 16}), (16, {8, 13}), (11, {8, 11}), (11, {8}), (3, set())],
    ids=["epoch", "before its checkpoint", "inside an epoch", "before that one", "before all"],
)
def test_stopped_run_goes_on_to_the_same_bits(finished, config, tmp_path, monkeypatch, step, kept):
    train_until(step, config, tmp_path, monkeypatch, kept)
    assert set(steps_kept(tmp_path)) == kept
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')  # torn off
    state = fr.train(config, tmp_path)

    folder, expected = finished
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))
    assert without_timing(read_metrics(tmp_path)) == without_timing(read_metrics(folder))
    assert_tensorboard_shows_the_metrics(tmp_path)
    assert steps_kept(tmp_path)[-1] == steps_kept(folder)[-1]


def test_weights_and_batches_are_those_of_the_seed(config, tmp_path):
    """Without augmentation and learning the epoch's mean is over the order's examples."""
    still = changed(config, seed=3, num_steps=1, crop_padding=0, learning_rate=1e-9)
    state = fr.train(changed(still, warmup_epochs=0.0), tmp_path)
    key = programs.random_keys(3).init
    fresh = create_state(fr.cifar_resnet8(), optax.sgd(0.0), key, (32, 32, 3))
    assert fresh.ema == fr.TrainState.create(fresh.variables, optax.sgd(0.0)).ema == {}
    chex.assert_trees_all_close(jax.device_get(state.params), fresh.params, atol=1e-6)
    train = fr.load_dataset("digits", "train[:264]", config.data_dir)
    index = epoch_order(3, 0, 264)[:32]
    mean, std = channel_statistics([train.images])
    images = normalize(train.images[index], mean, std)
    apply = partial(fr.cifar_resnet8().apply, train=True, mutable=["batch_stats"])
    logits, _ = jax.jit(apply)(jax.device_get(state.variables), images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, train.labels[index])
    (record,) = read_metrics(tmp_path)
    assert record["train_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_records_are_means_of_their_epoch(config, monkeypatch, tmp_path):
    seen = []
    steps = writers.ProgressBar.steps

    def noted(self, history, metrics):
        epoch = len(history.records) + 1
        seen.append((epoch, metrics["loss"].item(), metrics["accuracy"].item()))
        steps(self, history, metrics)

    monkeypatch.setattr(writers.ProgressBar, "steps", noted)
    fr.train(config, tmp_path)
    for record in read_metrics(tmp_path):
        epoch = [values for number, *values in seen if number == record["epoch"]]
        assert len(epoch) == 8
        expected = np.mean(epoch, axis=0)
        np.testing.assert_allclose([record["train_loss"], record["train_accuracy"]], expected)
        # The seconds are those of the evaluation too.
        assert record["images_per_second"] * record["seconds"] > 256


def test_progress_shows_the_means_of_the_epoch_after_a_resume_too(config, monkeypatch, tmp_path):
    train_until(11, config, tmp_path, monkeypatch)
    shown = {}
    monkeypatch.setattr(
        Progress, "step", lambda self, epoch, images, *means: shown.update({epoch: means})
    )
    fr.train(config, tmp_path)
    _, *records = read_metrics(tmp_path)
    assert shown == {r["epoch"]: (r["train_loss"], r["train_accuracy"]) for r in records}


# Few shapes, each of which is compiled.
SCANNED = {"layers": (1, 3), "widths": (16, 16), "strides": (1, 2)}
SCANNED |= {"scan_blocks": True, "stochastic_depth": 0.2, "eca": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"model_fields": SCANNED, "optimizer": "muon"},
        {"model": "vgg11", "model_fields": {"widths": (8,) * 5, "hidden": 16}},
    ],
    ids=["scanned blocks", "vgg"],
)
def test_other_nets_stop_and_go_on_to_the_same_bits(config, tmp_path, monkeypatch, fields):
    config = changed(config, **fields, num_steps=6, learning_rate=0.01, warmup_epochs=0.0)
    expected = fr.train(config, tmp_path / "whole")
    train_until(4, config, tmp_path / "stopped", monkeypatch)
    state = fr.train(config, tmp_path / "stopped")
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))


@pytest.mark.slow
def test_eight_devices_stop_and_eight_or_two_go_on(config, tmp_path, monkeypatch, eight_devices):
    """Eight to the same bits, two with the same batches."""
    # A small learning rate: rounding, which differs, does not grow.
    config = changed(config, learning_rate=0.005, num_steps=10)
    whole, stopped, two = tmp_path / "whole", tmp_path / "stopped", tmp_path / "two"
    expected = fr.train(config, whole)
    assert len(expected.step.sharding.device_set) == 8
    train_until(5, config, stopped, monkeypatch)
    shutil.copytree(stopped, two)
    state = fr.train(changed(config, data_feed="stream", stream_workers=0), stopped)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))
    assert without_timing(read_metrics(stopped)) == without_timing(read_metrics(whole))

    make_mesh = partial(mesh.make_mesh, devices=jax.devices()[:2])
    monkeypatch.setattr(plan, "make_mesh", make_mesh)
    state = fr.train(config, two)
    assert len(state.step.sharding.device_set) == 2
    losses = [
        [(record["train_loss"], record["test_loss"]) for record in read_metrics(folder)]
        for folder in (two, whole)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def reversed_formats(state, devices):
    return jax.tree.map(
        lambda leaf: Format(Layout(tuple(range(leaf.ndim))[::-1]), mesh.replicated(devices)), state
    )


def test_many_steps_a_call(config, tmp_path, monkeypatch):
    """As on a GPU, where three steps a call and two more by themselves make an epoch, and weights
    lie in another order.
    """
    monkeypatch.setattr(feeds, "platform", lambda mesh: "gpu")
    monkeypatch.setattr(feeds, "STEPS_A_CALL", 3)
    calls = []
    make = programs.make_train_steps
    monkeypatch.setattr(
        programs, "make_train_steps", lambda *a, **o: calls.append(o) or make(*a, **o)
    )
    monkeypatch.setattr(programs, "state_formats", reversed_formats)
    config = changed(config, learning_rate=0.005, num_epochs=2)
    state = fr.train(config, tmp_path / "many")
    monkeypatch.undo()
    assert state.params["conv1"]["kernel"].format.layout.major_to_minor == (3, 2, 1, 0)
    kept = fr.load_run(tmp_path / "many", "newest").variables["params"]
    chex.assert_trees_all_equal(jax.device_get(kept), jax.device_get(state.params))
    fr.train(config, tmp_path / "one by one")
    assert [call["steps"] for call in calls] == [3]
    for name, tolerance in (("train_loss", 1e-4), ("gradient_norm", 1e-2), ("test_loss", 1e-3)):
        many, single = (
            [record[name] for record in read_metrics(tmp_path / folder)]
            for folder in ("many", "one by one")
        )
        np.testing.assert_allclose(many, single, rtol=tolerance)


def test_memory_that_is_not_enough_is_one_line(config, tmp_path, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(Loop, "run", fail)
    with pytest.raises(
        fr.InputError,
        match=r"the memory is not enough: set data_feed=stream .*accumulation_steps=2",
    ):
        fr.train(config, tmp_path)


def test_best_state_outlives_later_ones(tmp_path, finished, config):
    _, state = finished
    run = check_config(changed(config, keep_checkpoints=1))
    checkpoints = checkpoint.Checkpoints(tmp_path, run)
    history = History()
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.6), (5, None)):
        if accuracy is not None:
            history.end_epoch({"step": step, "test_accuracy": accuracy})
        checkpoints.save(state.replace(step=jnp.int32(step)), history)
        if step == 3:  # also across two starts
            checkpoints.close()
            checkpoints = checkpoint.Checkpoints(tmp_path, run)
    checkpoints.close()
    assert steps_kept(tmp_path) == [2, 5]
    assert best_of(history.records) == {"step": 2, "test_accuracy": 0.9}


def test_finished_run_stays_as_it_is(finished, config, tmp_path):
    folder, state = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    chex.assert_trees_all_equal(jax.device_get(fr.train(config, copy)), jax.device_get(state))
    assert (copy / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()
    assert steps_kept(copy) == steps_kept(folder)


def test_num_steps_ends_a_run_inside_an_epoch(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.num_steps = 11
    assert int(fr.train(config, tmp_path).step) == 11
    assert [record["step"] for record in read_metrics(tmp_path)] == [8, 11]
    assert int(fr.train(config, tmp_path).step) == 11
    assert len(read_metrics(tmp_path)) == 2


def changed(config, **values):
    config = config.copy_and_resolve_references()
    config.update(values)
    return config


def test_folder_with_a_run_of_another_config_is_refused(finished, config):
    folder, _ = finished
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        fr.InputError, match=r"holds a run of another config: batch_size \(32 there\), seed \(0"
    ):
        fr.train(changed(config, seed=1, batch_size=64), folder)
    assert sorted(folder.rglob("*")) == before


def test_what_computes_nothing_may_change(config, run_copy):
    free = {
        "stream_workers": 0,
        "checkpoint_minutes": 1.0,
        "keep_checkpoints": 7,
        "on_nan": "rollback",
        "data_feed": "resident",
    }
    fr.train(changed(config, **free), run_copy)
    with pytest.raises(fr.InputError, match=r"label_smoothing \(0.0 there\)"):
        fr.train(changed(config, label_smoothing=0.1), run_copy)


def test_checkpoint_is_due_after_its_minutes(config, tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    run = check_config(changed(config, checkpoint_minutes=2.0))
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, run)) as checkpoints:
        now += 119
        assert not checkpoints.is_due()
        now += 2
        assert checkpoints.is_due()


def test_hosts_agree_after_every_so_many_calls_that_a_checkpoint_is_due(
    config, tmp_path, monkeypatch
):
    run = check_config(config)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, run)) as checkpoints:
        monkeypatch.setattr(checkpoint.jax, "process_count", lambda: 2)
        monkeypatch.setattr(checkpoint.hosts, "from_first_host", lambda due: not due)
        calls = [checkpoints.is_due() for _ in range(64)]
    assert calls == 2 * [*31 * [False], True]  # as the first says, and not this one's clock


def test_data_may_move_but_not_change(finished, config, digits_dir, tmp_path):
    folder, _ = finished
    copy, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(folder, copy)
    shutil.copytree(digits_dir, data)
    fr.train(changed(config, data_dir=str(data)), copy)
    description = json.loads((copy / "dataset.json").read_text())
    mean = [description["mean"][0] + 1e-3, *description["mean"][1:]]
    for other in ({"mean": mean}, {"test_examples": 100}):
        (copy / "dataset.json").write_text(json.dumps(description | other))
        with pytest.raises(fr.InputError, match=r"the data is not what the run .* began with"):
            fr.train(config, copy)
    del description["test_examples"]  # as an earlier version left it
    (copy / "dataset.json").write_text(json.dumps(description))
    fr.train(config, copy)


@pytest.mark.parametrize("name", ["config.json", "dataset.json"])
def test_damaged_file_is_named(finished, config, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    (copy / name).write_text('{"model":\n[')
    with pytest.raises(fr.InputError, match=name):
        fr.train(config, copy)


def test_workdir_that_is_a_file(config, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(fr.InputError, match=r"cannot write workdir .* is a file"):
            fr.train(config, folder)
    with pytest.raises(fr.InputError, match=r"cannot write workdir .*: File name too long"):
        fr.train(config, tmp_path / (300 * "x"))


@pytest.mark.parametrize("denied", [os.W_OK, os.X_OK])
def test_workdir_that_cannot_be_written(config, tmp_path, monkeypatch, denied):
    monkeypatch.setattr(files.os, "access", lambda path, mode: not mode & denied)
    with pytest.raises(fr.InputError, match=r"cannot write workdir .* is not writable"):
        fr.train(config, tmp_path / "run")


def test_sizes_that_do_not_fit(config, tmp_path, eight_devices):
    with pytest.raises(fr.InputError, match="batch_size=36 cannot be divided among 8 devices"):
        fr.train(changed(config, batch_size=36), tmp_path)
    with pytest.raises(fr.InputError, match="batch_size=512 is more than the 264 training"):
        fr.train(changed(config, batch_size=512), tmp_path)
    for key in ("crop_padding", "cutout"):
        with pytest.raises(fr.InputError, match=f"{key}=33 is more than the 32 pixels"):
            fr.train(changed(config, **{key: 33}), tmp_path)
    per_replica = changed(config, batch_norm="per_replica", model_fields={"norm": "group"})
    with pytest.raises(fr.InputError, match="is for BatchNorm, and this cifar_resnet8 has none"):
        fr.train(per_replica, tmp_path)
    assert not any(tmp_path.iterdir())


def test_images_of_one_colour(config, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "channel_statistics", lambda chunks: ((0.5,) * 3, (0.0,) * 3))
    with pytest.raises(fr.InputError, match="all training images of digits are of one colour"):
        fr.train(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_infinite_loss_stops_the_run(config, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"the (loss|gradient norm) is (nan|inf) after step \d+"
    ):
        fr.train(changed(config, learning_rate=1e30, warmup_epochs=0.0), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "values", [[0.0], [1.0, np.nextafter(np.float32(1), 2)], [1e-45, 3e38], [1e17, 1e17]]
)
def test_histogram_of_any_numbers(tmp_path, values):
    values = np.array(values, np.float32)
    writer = tensorboard.open_writer(tmp_path, 0)
    unknown = np.array([np.inf, 0])
    tensorboard.write_histograms(
        writer, 3, {"bn1": {"scale": values}}, {"conv1": {"kernel": unknown}}
    )
    writer.close()
    events = read_events(tmp_path)
    assert events.Tags()["histograms"] == ["weights/scale/bn1"]
    (event,) = events.Histograms("weights/scale/bn1")
    shown = event.histogram_value
    assert (event.step, shown.num, sum(shown.bucket)) == (3, len(values), len(values))
    assert (shown.min, shown.max) == (values.min(), values.max())
