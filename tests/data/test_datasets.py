"""Reading, preparing, splitting and caching of data sets, and what can go wrong."""

import io
import json
from typing import Any, ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
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

    def without_the_third(*arguments):
        images, labels = load_whole(*arguments)
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
    with pytest.raises(InputError, match="'others' has no class as its `label`; those"):
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
