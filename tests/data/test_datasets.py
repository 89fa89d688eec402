"""Reading, preparing, splitting and caching of data sets, and what can go wrong."""

import http.server
import io
import json
import tarfile
import threading
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from tensorboard.summary.writer.record_writer import RecordWriter

from flax_resnet.data import channel_statistics, datasets, load_dataset
from flax_resnet.data.builders import Digits
from flax_resnet.errors import InputError


def forbid_decoding(monkeypatch):
    def decode(builder, split):
        raise AssertionError("decoded again")

    monkeypatch.setattr(datasets, "_decode", decode)


def assert_same(ours, theirs):
    np.testing.assert_array_equal(ours.images, theirs.images)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert ours.class_names == theirs.class_names


def cache_file(folder, split):
    return folder / "digits" / "1.0.0-flax_resnet" / f"digits-1.0.0-{split}.npz"


# Digits.


def test_digits_are_those_of_scikit_learn(digits_dir):
    digits: Any = load_digits()
    is_test = np.arange(len(digits.target)) % 5 == 0
    for split, chosen in (("train", ~is_test), ("test", is_test)):
        dataset = load_dataset("digits", split, str(digits_dir))
        assert dataset.images.shape == (chosen.sum(), 32, 32, 3)
        assert dataset.images.dtype == np.uint8
        assert dataset.labels.dtype == np.int32
        assert dataset.class_names == tuple("0123456789")
        assert (dataset.images == dataset.images[..., :1]).all()
        # TFDS shuffles; each image is told by its means over 4x4 pixels, near the 8x8 ones.
        ours = dataset.images[..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4)) * 16 / 255
        theirs, labels = digits.images[chosen], digits.target[chosen]
        distance = np.abs(ours[:, None] - theirs[None]).mean((2, 3))
        nearest = distance.argmin(1)
        assert sorted(nearest) == list(range(len(theirs)))
        np.testing.assert_array_equal(dataset.labels, labels[nearest])
        assert distance.min(1).max() < 1.5  # of 16 levels


def test_order_is_that_of_tfds(digits_dir):
    builder: Any = Digits(data_dir=str(digits_dir))
    source = builder.as_data_source("train[5:9]")
    ours = load_dataset("digits", "train[5:9]", str(digits_dir))
    np.testing.assert_array_equal(ours.images, [example["image"] for example in source])
    np.testing.assert_array_equal(ours.labels, [example["label"] for example in source])


@pytest.mark.parametrize(
    ("split", "parts"),
    [
        ("train[:90%]", [("train", slice(0, 1293))]),
        ("train[-10%:]", [("train", slice(1293, 1437))]),
        ("train[10:20]+test", [("train", slice(10, 20)), ("test", slice(0, 360))]),
        ("all", [("train", slice(0, 1437)), ("test", slice(0, 360))]),
    ],
)
def test_split_strings(digits_dir, split, parts):
    ours = load_dataset("digits", split, str(digits_dir))
    whole = {name: load_dataset("digits", name, str(digits_dir)) for name, _ in parts}
    images = np.concatenate([whole[name].images[part] for name, part in parts])
    np.testing.assert_array_equal(ours.images, images)
    assert len(ours) == len(images)


@pytest.mark.parametrize("split", ["trian", "train[:x]", "train[90%", "all[:50%]", ""])
def test_unknown_split(digits_dir, split):
    with pytest.raises(InputError, match=r"has no split .*; it has: train, test"):
        load_dataset("digits", split, str(digits_dir))


@pytest.mark.parametrize("split", ["train[7:7]", "train[50:10]", "train[90%:10%]"])
def test_empty_split(digits_dir, split):
    with pytest.raises(InputError, match="is empty"):
        load_dataset("digits", split, str(digits_dir))


def test_examples_without_a_label(digits_dir, monkeypatch):
    load_whole = datasets._load_whole

    def without_the_third(builder, split):
        images, labels = load_whole(builder, split)
        return images, np.where(np.arange(len(labels)) == 3, -1, labels)

    monkeypatch.setattr(datasets, "_load_whole", without_the_third)
    with pytest.raises(InputError, match="digits has examples without a label in this split"):
        load_dataset("digits", "test", str(digits_dir))
    assert len(load_dataset("digits", "test[4:]", str(digits_dir))) == 356


# The cache.


def test_second_read_comes_from_the_cache(own_digits, monkeypatch):
    first = load_dataset("digits", "train", str(own_digits))
    forbid_decoding(monkeypatch)
    assert_same(load_dataset("digits", "train", str(own_digits)), first)
    # The folder of TFDS itself holds nothing of ours.
    assert {p.suffix for p in (own_digits / "digits" / "1.0.0").iterdir()} <= {
        ".json",
        ".array_record-00000-of-00001",
    }


def test_cache_goes_to_the_user_where_the_folder_cannot_be_written(
    own_digits, monkeypatch, user_cache
):
    cache_file(own_digits, "train").parent.write_text("in the way")
    first = load_dataset("digits", "train", str(own_digits))
    assert len(list(user_cache.rglob("*.npz"))) == 1
    forbid_decoding(monkeypatch)
    assert_same(load_dataset("digits", "train", str(own_digits)), first)


@pytest.mark.parametrize("place", ["user_cache", "no_home"])
def test_no_place_for_a_cache_is_no_error(place, own_digits, request):
    cache_file(own_digits, "train").parent.write_text("in the way")
    if user_cache := request.getfixturevalue(place):
        user_cache.write_text("in the way")
    assert len(load_dataset("digits", "train", str(own_digits))) == 1437


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_damaged_cache_is_made_anew(own_digits, damage, monkeypatch):
    first = load_dataset("digits", "test", str(own_digits))
    path = cache_file(own_digits, "test")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "empty":
        content.clear()
    else:
        buffer = io.BytesIO()
        np.savez(buffer, other=np.zeros(3))
        content = buffer.getvalue()
    path.write_bytes(content)
    assert_same(load_dataset("digits", "test", str(own_digits)), first)
    forbid_decoding(monkeypatch)
    assert_same(load_dataset("digits", "test", str(own_digits)), first)


def test_stale_cache_is_made_anew(own_digits, tmp_path):
    load_dataset("digits", "test", str(own_digits))
    # The same folder, prepared again with other examples.
    folder = own_digits / "digits" / "1.0.0"
    train, test = (
        folder / f"digits-{split}.array_record-00000-of-00001" for split in ("train", "test")
    )
    test.write_bytes(train.read_bytes())
    info = json.loads((folder / "dataset_info.json").read_text())
    for split in info["splits"]:
        split["shardLengths"] = ["1437"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    again = load_dataset("digits", "test", str(own_digits))
    assert_same(again, load_dataset("digits", "train", str(own_digits)))


# Folders of TFDS.


def as_tfrecord(folder):
    """Rewrites the digits of a folder as TFRecord, as tfds.load would leave them."""
    version = folder / "digits" / "1.0.0"
    builder: Any = Digits(data_dir=str(folder))
    for split in ("train", "test"):
        source = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        with (version / f"digits-{split}.tfrecord-00000-of-00001").open("wb") as file:
            writer = RecordWriter(file)
            for record in source:
                writer.write(record)
    for path in version.glob("*.array_record*"):
        path.unlink()
    info = version / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    return version


def test_tfrecord_folder_is_read_too(own_digits, digits_dir):
    as_tfrecord(own_digits)
    assert_same(
        load_dataset("digits", "train", str(own_digits)),
        load_dataset("digits", "train", str(digits_dir)),
    )


@pytest.mark.parametrize("bytes_left", [-1, 7, 100_000])
def test_tfrecord_file_that_was_cut_off(own_digits, bytes_left):
    path = as_tfrecord(own_digits) / "digits-test.tfrecord-00000-of-00001"
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(InputError, match=r"of digits is damaged: .* ends inside a record"):
        load_dataset("digits", "test", str(own_digits))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_info.json", None),
        ("dataset_info.json", b"{"),
        ("digits-test.array_record-00000-of-00001", None),
        ("digits-test.array_record-00000-of-00001", b""),
        ("digits-test.array_record-00000-of-00001", b"no record" * 10_000),
    ],
)
def test_damaged_folder(own_digits, name, content):
    path = own_digits / "digits" / "1.0.0" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"folder .* of digits is damaged: .*start again") as error:
        load_dataset("digits", "test", str(own_digits))
    assert "\n" not in str(error.value)


def test_unknown_data_set(tmp_path):
    with pytest.raises(InputError, match="unknown data set 'cifra10': use cifar10, digits"):
        load_dataset("cifra10", "train")
    for name in ("cifar-10", "mnist:9.9.9", "mnist/large"):  # nothing there is to be deleted
        with pytest.raises(InputError, match=f"cannot open data set '{name}'"):
            load_dataset(name, "train", str(tmp_path))


@pytest.mark.parametrize("label", [tfds.features.Text(), tfds.features.Scalar(np.int64)])
def test_data_that_has_no_classes(own_digits, label):
    folder = own_digits / "others" / "1.0.0"
    (own_digits / "digits").rename(own_digits / "others")
    for path in (folder / "dataset_info.json", *folder.glob("digits-*")):
        path.rename(folder / path.name.replace("digits", "others"))
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("digits", "others"))
    assert len(load_dataset("others", "test", str(own_digits))) == 360
    tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label}).save_config(folder)
    with pytest.raises(InputError, match="'others' has no 8-bit `image` with a class"):
        load_dataset("others", "test", str(own_digits))


# CIFAR-10 without a network.


def cifar10_archive(path, rng, train=20, test=4):
    """Writes random images in the layout of CIFAR-10's binary archive; returns them."""
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    splits = []
    with tarfile.open(path, "w:gz") as tar:

        def add(name, content):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        add("batches.meta.txt", ("\n".join(names) + "\n\n").encode())
        for count, files in (
            (train, [f"data_batch_{i}.bin" for i in range(1, 6)]),
            (test, ["test_batch.bin"]),
        ):
            images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            labels = rng.integers(0, 10, count, dtype=np.uint8)
            planes = images.transpose(0, 3, 1, 2).reshape(count, -1)
            records = np.concatenate([labels[:, None], planes], 1)
            for name, part in zip(files, np.split(records, len(files)), strict=True):
                add(name, part.tobytes())
            splits.append((images, labels))
    return names, *splits


def test_cifar10_from_a_manual_archive(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(datasets, "_reachable", lambda url: pytest.fail("asked the network"))
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    names, *splits = cifar10_archive(manual / "cifar-10-binary.tar.gz", rng)
    for split, (images, labels) in zip(("train", "test"), splits, strict=True):
        dataset = load_dataset("cifar10", split, str(tmp_path))
        assert dataset.class_names == tuple(names)
        # TFDS shuffles them.
        ours = {x.tobytes(): y for x, y in zip(dataset.images, dataset.labels, strict=True)}
        assert ours == {x.tobytes(): y for x, y in zip(images, labels, strict=True)}
        assert len(dataset) == len(images)


@pytest.mark.parametrize("damage", ["cut", "other", "short"])
def test_damaged_archive(tmp_path, rng, damage):
    archive = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir(parents=True)
    cifar10_archive(archive, rng)
    if damage == "cut":
        archive.write_bytes(archive.read_bytes()[:30_000])
    elif damage == "other":
        archive.write_bytes(b"<html>not found</html>")
    else:
        with tarfile.open(archive, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("cifar-10-batches-bin/batches.meta.txt"))
    with pytest.raises(InputError, match="is not CIFAR-10's binary archive, or is damaged"):
        load_dataset("cifar10", "train", str(tmp_path))
    # Nothing half-made is left in the way of a sound archive.
    cifar10_archive(archive, rng)
    assert len(load_dataset("cifar10", "train", str(tmp_path))) == 20


def test_no_data_and_no_network_names_three_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_reachable", lambda url: False)
    with pytest.raises(InputError, match="no data and no network") as error:
        load_dataset("cifar10", "train", str(tmp_path))
    manual = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    for way in ("--config.data_dir", str(manual), "configs/digits_resnet8.py"):
        assert way in str(error.value)
    assert not any(tmp_path.iterdir())
    with pytest.raises(InputError, match="no data and no network: mnist"):
        load_dataset("mnist", "train", str(tmp_path))


def test_another_process_that_prepares_the_same_and_is_faster(tmp_path, monkeypatch):
    prepare = datasets._prepare

    def be_late(builder):
        prepare(datasets.Digits(data_dir=str(tmp_path)))
        raise InputError("digits cannot be prepared: it is there")

    monkeypatch.setattr(datasets, "_prepare", be_late)
    assert len(load_dataset("digits", "test", str(tmp_path))) == 360


def test_preparing_in_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="digits cannot be prepared in "):
        load_dataset("digits", "train", str(tmp_path / "file"))


def test_reachable_means_that_a_server_answers():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, format, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        assert datasets._reachable(url)
        server.shutdown()
    assert not datasets._reachable(url)


def test_a_name_server_that_never_answers_is_not_waited_for(monkeypatch):
    asked, answer = threading.Event(), threading.Event()

    def getaddrinfo(*arguments, **names):
        asked.set()
        answer.wait()
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr(datasets, "_SECONDS_TO_ANSWER", 0.5)
    assert not datasets._reachable("http://example.invalid/")
    assert asked.is_set()
    answer.set()


# Statistics.


@pytest.mark.parametrize("shape", [(1, 3, 2, 3), (2500, 4, 5, 1)])
def test_channel_statistics_are_those_of_numpy(rng, shape):
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    mean, std = channel_statistics(np.array_split(images, 2))
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)


def test_channel_statistics_of_one_colour():
    images = np.full((10, 2, 2, 3), 77, np.uint8)
    mean, std = channel_statistics(np.array_split(images, 2))
    np.testing.assert_allclose(mean, 77 / 255, rtol=1e-15)
    assert std == (0, 0, 0)
