"""The order of the examples, and reading them from disk as they are asked for."""

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flax_resnet as fr
from flax_resnet.data import EvalBatches, Source, TrainBatches, epoch_order, load_dataset, stream
from flax_resnet.data import batches as module
from tests.data.test_datasets import as_tfrecord

ALL = slice(None)


def test_an_epoch_takes_every_example_once():
    orders = [epoch_order(seed, epoch, 50) for seed in (0, 1) for epoch in range(3)]
    for order in orders:
        assert order.dtype == np.int32
        assert sorted(order) == list(range(50))
    assert len({order.tobytes() for order in orders}) == 6
    np.testing.assert_array_equal(orders[0], epoch_order(0, 0, 50))


@pytest.mark.parametrize("split", ["train", "test[10:50]", "train[-20:]+test[:30]+train[5:9]"])
def test_source_has_the_examples_of_the_data_set(split, digits_dir):
    dataset = load_dataset("digits", split, str(digits_dir))
    source = pickle.loads(pickle.dumps(Source("digits", split, str(digits_dir))))
    assert len(source) == len(dataset)
    assert source.image_shape == dataset.image_shape == (32, 32, 3)
    assert source.class_names == dataset.class_names
    assert source.nbytes == dataset.images.nbytes + dataset.labels.nbytes
    index = np.random.default_rng(0).permutation(len(source))
    images, labels = source.read(index)
    np.testing.assert_array_equal(images, dataset.images[index])
    np.testing.assert_array_equal(labels, dataset.labels[index])
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streamed_batches_come_in_the_order_of_the_steps(workers, digits_dir):
    source = Source("digits", "train[:70]", str(digits_dir))
    dataset = load_dataset("digits", "train[:70]", str(digits_dir))
    batches = TrainBatches(source, 3, 16, ALL, first=2, stop=11)
    with contextlib.closing(stream(batches, workers)) as read:
        seen = list(read)
    assert len(seen) == 9
    for step, batch in enumerate(seen, start=2):
        epoch, position = divmod(step, 4)  # the last 6 of 70 are left out
        index = epoch_order(3, epoch, 70)[16 * position : 16 * position + 16]
        np.testing.assert_array_equal(batch["index"], index)
        np.testing.assert_array_equal(batch["image"], dataset.images[index])
        np.testing.assert_array_equal(batch["label"], dataset.labels[index])


def test_hosts_share_a_batch(digits_dir):
    source = Source("digits", "train", str(digits_dir))
    whole, *shares = (
        TrainBatches(source, 0, 12, share, first=0, stop=1)[0]
        for share in (ALL, slice(0, 6), slice(6, 12))
    )
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), values)


def test_evaluation_reads_every_example_once(digits_dir):
    source = Source("digits", "test[:41]", str(digits_dir))
    dataset = load_dataset("digits", "test[:41]", str(digits_dir))
    batches = [EvalBatches(source, 16, ALL)[i] for i in range(3)]
    assert len(EvalBatches(source, 16, ALL)) == 3
    assert all(batch["image"].shape == (16, 32, 32, 3) for batch in batches)
    mask = np.concatenate([batch["mask"] for batch in batches])
    images = np.concatenate([batch["image"] for batch in batches])
    assert mask.tolist() == [True] * 41 + [False] * 7
    np.testing.assert_array_equal(images[mask], dataset.images)


SCRIPT = """
import contextlib, os, signal, sys

from flax_resnet.data import Source, TrainBatches, batches as module, stream

module._NAME = sys.argv[3]
if __name__ == "__main__":
    batches = TrainBatches(Source("digits", "train", sys.argv[1]), 0, 32, slice(None), 0, 1000)
    with contextlib.closing(stream(batches, 2)) as read:
        for i, _ in enumerate(read):
            if i == 10 and sys.argv[2] == "kill":
                os.killpg(0, signal.SIGKILL)
            if i == 60:
                break
"""


NAME = f"test-{os.getpid()}"  # other programs may look for the usual one


def run_script(tmp_path, *arguments):
    """(exit code, standard error, what it leaves in /dev/shm) of SCRIPT, in its own group."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", *arguments, NAME]
    root = str(Path(fr.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        _, said = process.communicate(timeout=120)
    left = {name for name in os.listdir("/dev/shm") if f"-{process.pid}-" in name}
    return process.returncode, said, left


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="shared memory has no files")
def test_memory_that_a_killed_program_leaves_is_removed_by_the_next(
    digits_dir, tmp_path, monkeypatch
):
    code, _, left = run_script(tmp_path, digits_dir, "kill")
    assert code == -signal.SIGKILL
    assert {name.startswith("sem.") for name in left} == {True, False}
    namespace = re.findall(rf"{NAME}-(\d+)-", min(left))[0]
    # Of a program that is alive, and of one in another container.
    others = [f"{NAME}-{namespace}-{os.getpid()}-test", f"{NAME}-1-999999999-test"]
    for name in others:
        Path("/dev/shm", name).touch()
    monkeypatch.setattr(module, "_NAME", NAME)
    monkeypatch.setattr(module, "_read", lambda *arguments: iter(()))
    assert not list(stream(EvalBatches(Source("digits", "test", str(digits_dir)), 8, ALL), 1))
    there = set(os.listdir("/dev/shm"))
    for name in others:
        Path("/dev/shm", name).unlink()
    assert not left & there
    assert set(others) <= there


@pytest.mark.slow
def test_damaged_data_leaves_no_memory_behind(own_digits, tmp_path):
    (path,) = (own_digits / "digits" / "1.0.0").glob("digits-train*")
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(3000) + content[half + 3000 :])
    code, said, left = run_script(tmp_path, own_digits, "go on")
    assert code == 1
    assert "of digits is damaged" in said
    assert "leaked" not in said
    assert not left


def test_tfrecord_cannot_be_streamed(own_digits):
    as_tfrecord(own_digits)
    assert not Source("digits", "train", str(own_digits)).can_be_streamed


def test_size_that_tfds_does_not_tell_is_that_of_the_first_image(own_digits):
    path = own_digits / "digits" / "1.0.0" / "features.json"
    features = json.loads(path.read_text())
    image = features["featuresDict"]["features"]["image"]["image"]
    image["shape"]["dimensions"] = ["-1", "-1", "3"]
    path.write_text(json.dumps(features))
    assert Source("digits", "train", str(own_digits)).image_shape == (32, 32, 3)


def test_damaged_file_is_named(own_digits):
    source = Source("digits", "test", str(own_digits))
    for path in (own_digits / "digits" / "1.0.0").glob("digits-test*"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(fr.InputError, match=r"the TFDS folder .* of digits is damaged"):
        source.read(np.array([0]))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import flax_resnet", "would run it: put what it does under if __name__ =="),
        (None, "<stdin> is no file: write it to one, or set stream_workers=0"),
    ],
)
def test_a_script_that_processes_cannot_import_is_refused(
    monkeypatch, tmp_path, digits_dir, script, message
):
    path = tmp_path / "script.py"
    if script is not None:
        path.write_text(script)
    name = "<stdin>" if script is None else str(path)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", name, raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    batches = EvalBatches(Source("digits", "test[:4]", str(digits_dir)), 2, ALL)
    with pytest.raises(fr.InputError, match=message):
        next(stream(batches, 1))
    assert len(list(stream(batches, 0))) == 2
