"""Reading, preparing, splitting and caching of data sets, and what can go wrong."""

import grp
import io
import json
import os
import pwd
import struct
import time
from typing import Any, ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.summary.writer.record_writer import RecordWriter

from flax_resnet.data import Dataset, Source, channel_statistics, datasets, load_dataset
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
        assert repr(dataset) == f"<Dataset: {len(dataset)} images of 32x32x3, 10 classes>"
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


@pytest.mark.parametrize("split", ["train[3:700]", "train[-9:]+train[:9]"])
def test_a_small_part_is_read_without_the_rest(own_digits, split, monkeypatch):
    expected = load_dataset("digits", split, str(own_digits))
    monkeypatch.setattr(datasets, "_LARGE", 10**6)
    forbid_decoding(monkeypatch)
    assert_same(load_dataset("digits", split, str(own_digits)), expected)


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

    def without_the_third(*arguments):
        images, labels = load_whole(*arguments)
        return images, np.where(np.arange(len(labels)) == 3, -1, labels)

    monkeypatch.setattr(datasets, "_load_whole", without_the_third)
    with pytest.raises(InputError, match="digits has examples without a label in this split"):
        load_dataset("digits", "test", str(digits_dir))
    assert len(load_dataset("digits", "test[4:]", str(digits_dir))) == 356


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": np.zeros((5, 4, 6, 3))},
            r"images must be uint8 .* not float64 of shape \[5, 4",
        ),
        ({"images": np.zeros((5, 4, 6), np.uint8)}, r"not uint8 of shape \[5, 4, 6\]"),
        ({"images": np.zeros((5, 0, 6, 3), np.uint8)}, r"not uint8 of shape \[5, 0, 6, 3\]"),
        ({"images": [[1]]}, "images must be uint8"),
        ({"labels": np.arange(4)}, r"labels must be 5 integers, .* of shape \[4\]"),
        ({"labels": np.eye(5, dtype=int)}, r"of shape \[5, 5\]"),
        ({"labels": np.zeros(5)}, "not float64"),
        ({"labels": np.arange(5) == 1}, "not bool"),
        ({"labels": np.arange(5) + 1}, "labels must be from 0 to 4, for 5 class_names, not 1 to 5"),
        ({"labels": np.arange(5) - 1}, "not -1 to 3"),
        ({"class_names": ()}, "class_names must be strings"),
        ({"class_names": tuple(range(5))}, "class_names must be strings"),
    ],
)
def test_arrays_that_are_no_data_set(changes, message):
    sound = {
        "images": np.zeros((5, 4, 6, 3), np.uint8),
        "labels": np.arange(5),
        "class_names": tuple("abcde"),
    }
    assert len(Dataset(**sound)) == 5
    with pytest.raises(InputError, match=message) as error:
        Dataset(**sound | changes)
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "pickle", "compressed"])
def test_damaged_cache_is_made_anew(own_digits, damage, monkeypatch, caplog):
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
        if damage == "other":
            np.savez(buffer, other=np.zeros(3))
        elif damage == "pickle":
            np.savez(buffer, fingerprint=np.array([{}], dtype=object))
        else:
            np.savez_compressed(buffer, fingerprint=np.zeros(10**6))
        content = buffer.getvalue()
    path.write_bytes(content)
    assert_same(load_dataset("digits", "test", str(own_digits)), first)
    assert "is made anew" in caplog.text
    assert "pickle" not in caplog.text  # NumPy's advice
    forbid_decoding(monkeypatch)
    assert_same(load_dataset("digits", "test", str(own_digits)), first)


@pytest.mark.parametrize("array", ["images", "labels"])
def test_cache_that_is_not_of_this_split(own_digits, array):
    first = load_dataset("digits", "test", str(own_digits))
    path = cache_file(own_digits, "test")
    with np.load(path) as arrays:
        content = dict(arrays)
    np.savez(path, **content | {array: content[array][:100]})
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


def as_tfrecord(folder, made_by: Any = Digits):
    """Rewrites the data set of a folder as TFRecord, as tfds.load would leave it."""
    builder = made_by(data_dir=str(folder))
    version = folder / builder.name / "1.0.0"
    for split in ("train", "test"):
        source = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        with (version / f"{builder.name}-{split}.tfrecord-00000-of-00001").open("wb") as file:
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


class Unsized(tfds.core.GeneratorBasedBuilder):
    """Images of whose size its features tell nothing."""

    VERSION = tfds.core.Version("1.0.0")
    widths = (8, 8)

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in ("train", "test")}

    def _generate_examples(self):
        for i, width in enumerate(self.widths):
            yield i, {"image": Image.new("RGB", (width, 6)), "label": i}


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
@pytest.mark.parametrize("widths", [(8, 8), (8, 9)])
def test_data_set_that_does_not_tell_the_size_of_its_images(tmp_path, monkeypatch, form, widths):
    monkeypatch.setattr(Unsized, "widths", widths)
    Unsized(data_dir=str(tmp_path)).download_and_prepare(file_format="array_record")
    if form == "tfrecord":
        as_tfrecord(tmp_path, Unsized)
    source = Source("unsized", "train", str(tmp_path))
    if widths == (8, 8):
        assert source.image_shape == source.load().images.shape[1:] == (6, 8, 3)
    else:
        with pytest.raises(InputError, match=r"unsized differ in size: .*; --config.image_size="):
            source.load()


@pytest.mark.parametrize("place", ["last byte", "second head", "middle"])
def test_tfrecord_file_that_was_cut_off(own_digits, place):
    path = as_tfrecord(own_digits) / "digits-test.tfrecord-00000-of-00001"
    content = path.read_bytes()
    (first,) = struct.unpack("<Q", content[:8])
    path.write_bytes(
        content[: {"last byte": -1, "second head": 16 + first + 7, "middle": 100_000}[place]]
    )
    with pytest.raises(InputError, match=r"of digits is damaged: .* ends inside a record"):
        load_dataset("digits", "test", str(own_digits))


def test_tfrecord_of_holes(own_digits):
    path = as_tfrecord(own_digits) / "digits-test.tfrecord-00000-of-00001"
    path.write_bytes(struct.pack("<Q", 2**40))
    os.truncate(path, 2**41)
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


# What TFDS tells of its files, where it cannot be.


@pytest.fixture
def others(own_digits):
    """The version folder of `others`, digits of which TFDS knows by its files alone."""
    (own_digits / "digits").rename(own_digits / "others")
    folder = own_digits / "others" / "1.0.0"
    for path in folder.glob("digits-*"):
        path.rename(folder / path.name.replace("digits", "others"))
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("digits", "others"))
    return folder


def change(path, *keys, value):
    """Sets an entry of a JSON file; a list is entered at each of its elements."""

    def visit(content, key, *rest):
        for one in content if isinstance(content, list) else [content]:
            if rest:
                visit(one[key], *rest)
            else:
                one[key] = value

    content = json.loads(path.read_text())
    visit(content, *keys)
    path.write_text(json.dumps(content))


def assert_refused(folder, message):
    """Neither to be loaded nor to be streamed, in one line and at once."""
    for read in (load_dataset, lambda *names: Source(*names).read(np.arange(360))):
        started = time.process_time()
        with pytest.raises(InputError, match=message) as error:
            read(folder.parent.name, "test", str(folder.parents[1]))
        assert "\n" not in str(error.value)
        assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "shape",
    [
        ["1000000", "1000000", "3"],
        ["0", "32", "3"],
        ["-5", "32", "3"],
        ["1" + 30 * "0", "32", "3"],
        ["32", "32", "0"],
        ["32", "32", "-1"],
        ["32", "32", "7"],
        ["32", "32"],
        ["33", "32", "3"],
        ["a", "32", "3"],
    ],
)
def test_images_that_cannot_be(others, shape):
    keys = ("featuresDict", "features", "image", "image", "shape", "dimensions")
    change(others / "features.json", *keys, value=shape)
    assert_refused(others, "the TFDS folder .* of others is damaged|cannot be opened")


@pytest.mark.parametrize(
    "count", [None, "0", "-1", "3", "9", "2000000", "1000000000", "1" + 30 * "0"]
)
def test_classes_that_cannot_be(others, count):
    keys = ("featuresDict", "features", "label", "classLabel", "numClasses")
    change(others / "features.json", *keys, value=count)
    message = "a label is 9, of [39] classes" if count in ("3", "9") else "is damaged"
    assert_refused(others, message)


def test_more_names_than_classes(others):
    (others / "label.labels.txt").write_text("name\n" * 2_000_000)
    assert_refused(others, "it has 2000000 classes")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("filepathTemplate", "{X}"),
        ("filepathTemplate", "{0}"),
        ("filepathTemplate", "\0"),
        ("filepathTemplate", "x" * 10_000),
        ("shardLengths", ["1" + 12 * "0"]),
        ("shardLengths", ["1" + 30 * "0"]),
        ("shardLengths", ["1"] * 1000),
    ],
)
def test_splits_that_cannot_be(others, key, value):
    change(others / "dataset_info.json", "splits", key, value=value)
    assert_refused(others, "the TFDS folder .* of others is damaged")


@pytest.mark.parametrize(
    "name",
    [
        "1.0.0/dataset_info.json",
        "1.0.0/features.json",
        "1.0.0/others-test.array_record-00000-of-00001",
        "1.0.0-flax_resnet/others-1.0.0-test.npz",
        ".config/metadata.json",
    ],
)
def test_pipes_and_devices_are_not_read(others, name):
    path = others.parent / name
    path.parent.mkdir(exist_ok=True)
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        path.unlink(missing_ok=True)
        make(path)
        assert_refused(others, f"of others is damaged: {path} is not a file")


@pytest.mark.parametrize(
    "name", ["dataset_info.json", "features.json", "label.labels.txt", "../.config/metadata.json"]
)
def test_files_beyond_any_size(others, name):
    path = others / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, 2**26)  # holes, of which TFDS would read 2**40 too
    assert_refused(others, rf"of others is damaged: .*/{path.name} has 67,108,864 bytes")


def test_a_pipe_in_the_users_cache(own_digits, user_cache):
    cache_file(own_digits, "test").parent.write_text("in the way")
    first = load_dataset("digits", "test", str(own_digits))
    (path,) = user_cache.rglob("*.npz")
    path.unlink()
    os.mkfifo(path)
    assert_same(load_dataset("digits", "test", str(own_digits)), first)
    assert path.is_file()


@pytest.mark.parametrize("as_files", [lambda folder: None, as_tfrecord])
def test_files_of_nobody(own_digits, monkeypatch, as_files):
    as_files(own_digits)

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert len(load_dataset("digits", "test", str(own_digits))) == 360
    assert len(load_dataset("digits", "test", str(own_digits))) == 360  # from the cache


# Names.


def test_home(own_digits, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for data_dir in ("~/tfds", "tfds"):
        assert len(load_dataset("digits", "test", data_dir)) == 360
    monkeypatch.setenv("TFDS_DATA_DIR", "~/tfds")
    assert len(load_dataset("digits", "test")) == 360
    monkeypatch.delenv("TFDS_DATA_DIR")
    own_digits.rename(tmp_path / "tensorflow_datasets")
    assert len(load_dataset("digits", "test")) == 360


@pytest.mark.parametrize("data_dir", [None, "~/tfds", "~nobody_of_that_name/tfds"])
def test_no_home(data_dir, monkeypatch, tmp_path):
    def unknown(number):
        raise KeyError

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(InputError, match="there is no home folder for ~"):
        load_dataset("digits", "test", data_dir)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("data_dir", ["gs://tfds-data/datasets", "s3://bucket/data", "a\0b"])
def test_folders_of_other_machines(data_dir):
    with pytest.raises(InputError, match="is no folder of this machine: name another by"):
        load_dataset("digits", "test", data_dir)


@pytest.mark.parametrize("name", ["huggingface:mnist", "kaggle:mnist", "someone:mnist"])
def test_collections_of_others_are_not_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("asked the network"))
    with pytest.raises(InputError, match=f"'{name}' is not one of TFDS's own: .* there, mnist"):
        load_dataset(name, "train", str(tmp_path))


def test_long_names_are_shortened(tmp_path):
    for name in ("a" * 10_000, "-" * 10_000):
        with pytest.raises(InputError) as error:
            load_dataset(name, "train", str(tmp_path))
        assert len(str(error.value)) < 500


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
    with pytest.raises(InputError, match="'others' has no class label 'label'; it has:"):
        load_dataset("others", "test", str(own_digits))


def test_another_process_that_prepares_the_same_and_is_faster(tmp_path, monkeypatch):
    prepare = datasets.prepare

    def be_late(builder):
        prepare(datasets.Digits(data_dir=str(tmp_path)))
        raise InputError("digits cannot be prepared: it is there")

    monkeypatch.setattr(datasets, "prepare", be_late)
    assert len(load_dataset("digits", "test", str(tmp_path))) == 360


def test_preparing_in_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="digits cannot be prepared in "):
        load_dataset("digits", "train", str(tmp_path / "file"))


# Pictures as they are found in files.


class MixedPictures(tfds.core.GeneratorBasedBuilder):
    """Pictures in files of several kinds."""

    VERSION = tfds.core.Version("1.0.0")
    files: ClassVar[list[bytes]] = []

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 6, 3)),
            "label": tfds.features.ClassLabel(num_classes=9),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, file in enumerate(self.files):
            yield i, {"image": io.BytesIO(file), "label": i}


def file_of(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_pictures_of_every_kind_get_the_channels_that_tfds_tells(tmp_path, rng, monkeypatch):
    colours = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    gray, alpha, indices = rng.integers(0, 256, (3, 4, 6), dtype=np.uint8)
    palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    with_alpha = Image.merge("RGBA", (*image.split(), Image.fromarray(alpha)))
    indexed = Image.fromarray(indices).convert("P")
    indexed.putpalette(palette.tobytes())
    kinds = [
        (file_of(image), colours),
        (file_of(image, "BMP"), colours),
        (file_of(with_alpha), colours),
        (file_of(Image.fromarray(gray)), np.repeat(gray[..., None], 3, -1)),
        (file_of(indexed), palette[indices]),
    ]
    monkeypatch.setattr(MixedPictures, "files", [file for file, _ in kinds])
    dataset = load_dataset("mixed_pictures", "train", str(tmp_path))
    assert sorted(dataset.labels) == [0, 1, 2, 3, 4]
    for pixels, label in zip(dataset.images, dataset.labels, strict=True):
        np.testing.assert_array_equal(pixels, kinds[label][1])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("RGB", (4, 6)), "an image of 4 x 6 pixels"),
        (Image.new("I;16", (6, 4)), "an image of more than 8 bits"),
    ],
)
def test_pictures_that_are_not_what_tfds_tells(picture, message, tmp_path, monkeypatch):
    monkeypatch.setattr(MixedPictures, "files", [file_of(picture)])
    with pytest.raises(InputError, match=f"mixed_pictures is damaged: {message}"):
        load_dataset("mixed_pictures", "train", str(tmp_path))


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
