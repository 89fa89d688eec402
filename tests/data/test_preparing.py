"""TFDS's own builders, which prepare small archives of their layouts without TensorFlow."""

import functools
import gzip
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import download
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.core.features import image_feature
from tensorflow_datasets.core.utils import lazy_imports_utils
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as imagenet
from tensorflow_datasets.image_classification import mnist

from flax_resnet.data import Source, load_dataset, preparing
from flax_resnet.errors import InputError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CIFAR10_NAMES = [f"class {i}" for i in range(10)]


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(preparing, "reachable", lambda url: False)


@pytest.fixture
def manual(tmp_path):
    """DIR/downloads/manual of the data folder `tmp_path`."""
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    return folder


def tar(path, files, mode: Any = "w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def assert_holds(dataset, images, labels):
    """The data set is made of these examples; TFDS shuffles them."""
    assert dataset.images.shape == images.shape
    ours = {x.tobytes(): y for x, y in zip(dataset.images, dataset.labels, strict=True)}
    assert ours == {x.tobytes(): y for x, y in zip(images, labels, strict=True)}


# Archives in the layouts of their publishers.


def cifar_records(rng, count, *classes):
    """(images, one array of labels for each number of classes, the records of both)."""
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = [rng.integers(0, n, (count, 1), dtype=np.uint8) for n in classes]
    planes = images.transpose(0, 3, 1, 2).reshape(count, -1)
    return images, [x[:, 0] for x in labels], np.concatenate([*labels, planes], 1)


def cifar10_archive(path, rng):
    """Writes 20 and 4 random images; returns (images, labels) of "train" and "test"."""
    names = "\n".join(CIFAR10_NAMES) + "\n\n"
    train, test = cifar_records(rng, 20, 10), cifar_records(rng, 4, 10)
    files = {f"data_batch_{i + 1}.bin": x for i, x in enumerate(np.split(train[2], 5))}
    files = {name: x.tobytes() for name, x in (files | {"test_batch.bin": test[2]}).items()}
    files["batches.meta.txt"] = names.encode()
    tar(path, {f"cifar-10-batches-bin/{name}": content for name, content in files.items()})
    return {"train": (train[0], train[1][0]), "test": (test[0], test[1][0])}


def idx_files(folder, rng, monkeypatch, train=7, test=3, size=28, classes=10):
    """Writes the four files of MNIST with random images, and has TFDS expect so few."""
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", train)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", test)
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, name, count in (("train", "train", train), ("test", "t10k", test)):
        images = rng.integers(0, 256, (count, size, size, 1), dtype=np.uint8)
        labels = rng.integers(0, classes, count, dtype=np.uint8)
        for kind, head, array in (
            ("images-idx3", [0x803, count, size, size], images),
            ("labels-idx1", [0x801, count], labels),
        ):
            content = np.array(head, ">i4").tobytes() + array.tobytes()
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
        splits[split] = images, labels
    return splits


# From files that were put there by hand.


def test_cifar10(tmp_path, manual, rng, monkeypatch):
    monkeypatch.setattr(preparing, "reachable", lambda url: pytest.fail("asked the network"))
    splits = cifar10_archive(manual / "cifar-10-binary.tar.gz", rng)
    for split, (images, labels) in splits.items():
        dataset = load_dataset("cifar10", split, str(tmp_path))
        assert dataset.class_names == tuple(CIFAR10_NAMES)
        assert_holds(dataset, images, labels)
    builder: Any = tfds.builder("cifar10", data_dir=str(tmp_path))
    ids = {example["id"].decode() for example in builder.as_data_source("test")}
    assert ids == {f"test_{i:05d}" for i in range(4)}
    # What was unpacked is not kept.
    assert sorted(x.name for x in (tmp_path / "downloads").iterdir()) == ["manual"]


def test_cifar100_has_two_labels(tmp_path, manual, rng, offline):
    train, test = cifar_records(rng, 12, 20, 100), cifar_records(rng, 5, 20, 100)
    coarse, fine = ([f"{n} classes, {i}" for i in range(n)] for n in (20, 100))
    files = {
        "train.bin": train[2].tobytes(),
        "test.bin": test[2].tobytes(),
        "coarse_label_names.txt": "\n".join(coarse).encode(),
        "fine_label_names.txt": "\n".join(fine).encode(),
    }
    tar(
        manual / "cifar-100-binary.tar.gz",
        {f"cifar-100-binary/{name}": content for name, content in files.items()},
    )
    for split, (images, labels, _) in (("train", train), ("test", test)):
        for i, (key, names) in enumerate((("coarse_label", coarse), ("label", fine))):
            dataset = load_dataset("cifar100", split, str(tmp_path), label_key=key)
            assert dataset.class_names == tuple(names)
            assert_holds(dataset, images, labels[i])
            source = Source("cifar100", split, str(tmp_path), label_key=key)
            np.testing.assert_array_equal(source.read(np.arange(4))[1], dataset.labels[:4])
    message = "has no class label 'id'; it has: label, coarse_label"
    with pytest.raises(InputError, match=message):
        load_dataset("cifar100", "test", str(tmp_path), label_key="id")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_idx_files(name, tmp_path, manual, rng, offline, monkeypatch):
    splits = idx_files(manual, rng, monkeypatch)
    for split, (images, labels) in splits.items():
        assert_holds(load_dataset(name, split, str(tmp_path)), images, labels)
    gray, rgb = (load_dataset(name, "train", str(tmp_path), channels=n) for n in (1, 3))
    np.testing.assert_array_equal(rgb.images, np.repeat(gray.images, 3, -1))
    source = Source(name, "train", str(tmp_path), channels=3)
    assert source.image_shape == rgb.image_shape == (28, 28, 3)
    assert source.nbytes == rgb.images.nbytes + rgb.labels.nbytes
    np.testing.assert_array_equal(source.read(np.arange(7))[0], rgb.images)
    for channels in (0, -1, 2, 4):
        with pytest.raises(InputError, match=f"channels={channels} does not fit .* have 1:"):
            load_dataset(name, "train", str(tmp_path), channels=channels)


def test_colours_do_not_become_gray(digits_dir):
    with pytest.raises(
        InputError, match="channels=1 does not fit digits, whose images have 3: only 1 can"
    ):
        load_dataset("digits", "train", str(digits_dir), channels=1)


def test_emnist(tmp_path, manual, rng, offline, monkeypatch):
    (config,) = (c for c in mnist.EMNIST.BUILDER_CONFIGS if c.name == "letters")
    monkeypatch.setattr(config, "train_examples", 7)
    monkeypatch.setattr(config, "test_examples", 3)
    splits = idx_files(tmp_path / "idx", rng, monkeypatch, classes=37)
    with zipfile.ZipFile(manual / "gzip.zip", "w") as archive:
        for path in (tmp_path / "idx").iterdir():
            name = path.name.replace("t10k", "test")
            archive.write(path, f"gzip/emnist-letters-{name}")
    for split, (images, labels) in splits.items():
        assert_holds(load_dataset("emnist/letters", split, str(tmp_path)), images, labels)


def test_svhn_cropped(tmp_path, manual, rng, offline):
    splits = {}
    for split, count in (("train", 6), ("test", 4), ("extra", 2)):
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        ones_to_tens = np.where(labels == 0, 10, labels)[:, None]
        matrices = {"X": images.transpose(1, 2, 3, 0), "y": ones_to_tens}
        scipy.io.savemat(manual / f"{split}_32x32.mat", matrices)
        splits[split] = images, labels
    for split, (images, labels) in splits.items():
        assert_holds(load_dataset("svhn_cropped", split, str(tmp_path)), images, labels)


def test_stl10(tmp_path, manual, rng, offline):
    files = {"class_names.txt": "\n".join(CIFAR10_NAMES).encode()}
    splits = {}
    for split, count in (("train", 3), ("test", 2), ("unlabeled", 2)):
        images = rng.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        files[f"{split}_X.bin"] = images.transpose(0, 3, 2, 1).tobytes()
        files[f"{split}_y.bin"] = (labels + 1).astype(np.uint8).tobytes()
        splits[split] = images, labels
    tar(
        manual / "stl10_binary.tar.gz",
        {f"stl10_binary/{name}": content for name, content in files.items()},
    )
    for split in ("train", "test"):
        assert_holds(load_dataset("stl10", split, str(tmp_path)), *splits[split])
    with pytest.raises(InputError, match="stl10 has examples without a label in this split"):
        load_dataset("stl10", "unlabelled", str(tmp_path))


def test_builders_that_yield_paths(tmp_path, manual, rng, offline):
    images = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    names = ("Forest", "River")
    with zipfile.ZipFile(manual / "EuroSAT.zip", "w") as archive:
        for i, image in enumerate(images):
            name = names[i % 2]
            archive.writestr(f"2750/{name}/{name}_{i}.png", png(image))
    dataset = load_dataset("eurosat", "train", str(tmp_path))
    labels = [dataset.class_names.index(names[i % 2]) for i in range(4)]
    assert_holds(dataset, images, labels)


def test_builders_that_yield_open_files(tmp_path, manual, rng, offline):
    splits = {}
    for split, file in (("train", "horse-or-human"), ("test", "validation-horse-or-human")):
        images = rng.integers(0, 256, (2, 300, 300, 4), dtype=np.uint8)
        with zipfile.ZipFile(manual / f"{file}.zip", "w") as archive:
            for name, image in zip(("horses/horse01-1", "humans/human01-1"), images, strict=True):
                archive.writestr(f"{name}.png", png(image))
        splits[split] = images
    for split, images in splits.items():
        dataset = load_dataset("horses_or_humans", split, str(tmp_path))
        assert_holds(dataset, images[..., :3], [0, 1])  # as TensorFlow, without the alpha


@pytest.mark.fashion_mnist
@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="no package dataset-fashion-mnist")
def test_real_fashion_mnist(tmp_path, manual, offline, monkeypatch, capsys):
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 3000)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 1000)
    for path in FASHION_MNIST.glob("*.gz"):
        (manual / path.name).symlink_to(path)
    for split, name, count in (("train", "train", 3000), ("test", "t10k", 1000)):
        dataset = load_dataset("fashion_mnist", split, str(tmp_path))
        images, labels = (
            np.frombuffer(gzip.decompress((manual / f"{name}-{kind}-ubyte.gz").read_bytes()), "u1")
            for kind in ("images-idx3", "labels-idx1")
        )
        images = images[16:].reshape(-1, 28, 28, 1)[:count]
        assert_holds(dataset, images, labels[8:][:count])
        assert dataset.class_names[:2] == ("T-shirt/top", "Trouser")
    # Debian compressed them anew.
    said = capsys.readouterr().err
    assert said.count("is not byte for byte the published file") == 1


# Which file is taken.


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def publish(monkeypatch, folder, url):
    """Has TFDS know the files of a folder as those of a URL."""
    for path in folder.iterdir():
        info = checksums.UrlInfo(path.stat().st_size, sha256(path), path.name)
        for infos in (checksums.get_all_url_infos(), mnist.KMNIST.url_infos):
            monkeypatch.setitem(infos, url + path.name, info)


def test_a_file_of_another_data_set_is_not_taken(tmp_path, manual, rng, offline, monkeypatch):
    theirs = idx_files(manual, rng, monkeypatch)
    publish(monkeypatch, manual, mnist.KMNIST.URL)
    with pytest.raises(InputError, match="no data and no network: fashion_mnist") as error:
        load_dataset("fashion_mnist", "train", str(tmp_path))
    assert f"put into {manual} fashion_mnist/t10k-images-idx3-ubyte.gz" in str(error.value)
    ours = idx_files(manual / "fashion_mnist", rng, monkeypatch)
    assert_holds(load_dataset("fashion_mnist", "train", str(tmp_path)), *ours["train"])
    assert_holds(load_dataset("kmnist", "train", str(tmp_path)), *theirs["train"])


def test_only_another_file_than_the_published_one_is_told(
    tmp_path, manual, rng, offline, monkeypatch, capsys
):
    idx_files(manual, rng, monkeypatch)
    load_dataset("mnist", "train", str(tmp_path))
    assert capsys.readouterr().err.count("not byte for byte the published file") == 1
    publish(monkeypatch, manual, mnist.KMNIST.URL)
    load_dataset("kmnist", "train", str(tmp_path))
    assert "not byte for byte" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "other", "short"])
def test_damaged_archive(damage, tmp_path, manual, rng, offline):
    archive = manual / "cifar-10-binary.tar.gz"
    cifar10_archive(archive, rng)
    if damage == "cut":
        archive.write_bytes(archive.read_bytes()[:30_000])
    elif damage == "other":
        archive.write_bytes(b"<html>not found</html>")
    else:
        tar(archive, {"cifar-10-batches-bin/batches.meta.txt": b""})
    with pytest.raises(InputError, match="cifar10 cannot be prepared in ") as error:
        load_dataset("cifar10", "train", str(tmp_path))
    assert "\n" not in str(error.value)
    # Nothing half-made is left in the way of a sound archive.
    splits = cifar10_archive(archive, rng)
    assert_holds(load_dataset("cifar10", "train", str(tmp_path)), *splits["train"])


# From the network.


@pytest.fixture
def server(tmp_path):
    """(folder that is served, URL)."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    serve = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_download(tmp_path, server, rng, monkeypatch):
    folder, url = server
    monkeypatch.setattr(mnist.MNIST, "URL", url)
    splits = idx_files(folder, rng, monkeypatch)
    publish(monkeypatch, folder, url)
    data_dir = str(tmp_path / "data")
    for split, (images, labels) in splits.items():
        assert_holds(load_dataset("mnist", split, data_dir), images, labels)


def test_download_of_something_else(tmp_path, server, rng, monkeypatch):
    folder, url = server
    monkeypatch.setattr(mnist.MNIST, "URL", url)
    idx_files(folder, rng, monkeypatch)
    publish(monkeypatch, folder, url)
    idx_files(folder, rng, monkeypatch)
    with pytest.raises(InputError, match=r"mnist cannot be prepared in .*: a wrong checksum"):
        load_dataset("mnist", "train", str(tmp_path / "data"))


def test_no_data_and_no_network_names_three_ways_out(tmp_path, offline):
    with pytest.raises(InputError, match="no data and no network") as error:
        load_dataset("cifar10", "train", str(tmp_path))
    manual = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    for way in ("--config.data_dir", str(manual), "configs/digits_resnet8.py"):
        assert way in str(error.value)
    assert not any(tmp_path.iterdir())


def test_what_is_missing_is_named_with_its_place(tmp_path, manual, rng, offline, monkeypatch):
    idx_files(manual, rng, monkeypatch)
    (manual / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InputError, match="no data and no network: mnist") as error:
        load_dataset("mnist", "train", str(tmp_path))
    assert f"put that file at {manual}/t10k-images-idx3-ubyte.gz" in str(error.value)
    (manual / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match="the 2 files that it is made of cannot") as error:
        load_dataset("mnist", "train", str(tmp_path))
    assert f"put into {manual} t10k-images-idx3-ubyte.gz (https://" in str(error.value)
    with pytest.raises(InputError, match=r"345 files .* and 340 more") as error:
        load_dataset("quickdraw_bitmap", "train", str(tmp_path))
    assert len(str(error.value)) < 2000


def test_reachable_means_that_a_server_answers(server):
    _, url = server
    assert preparing.reachable(url)
    assert preparing.reachable(f"{url}nothing/here")  # 404
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        port = other.server_port
    assert not preparing.reachable(f"http://127.0.0.1:{port}/")


def test_a_name_server_that_never_answers_is_not_waited_for(monkeypatch):
    asked, answer = threading.Event(), threading.Event()

    def getaddrinfo(*arguments, **names):
        asked.set()
        answer.wait()
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr(preparing, "_SECONDS_TO_ANSWER", 0.5)
    assert not preparing.reachable("http://example.invalid/")
    assert asked.wait(60)
    answer.set()


# What TFDS takes from TensorFlow.


@pytest.mark.parametrize(
    ("channels", "encoding_format"),
    [(1, None), (2, None), (3, None), (4, None), (1, "png"), (3, "png"), (1, "jpeg"), (3, "jpeg")],
)
def test_arrays_are_encoded_without_loss(channels, encoding_format, rng):
    shape = (5, 7, channels)
    feature: Any = tfds.features.Image(shape=shape, encoding_format=encoding_format)
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    for array in (image, np.asfortranarray(image), image[::-1, ::-1]):
        with preparing._without_tensorflow():
            encoded = feature.encode_example(array)
        assert encoded.startswith(b"\x89PNG")
        np.testing.assert_array_equal(feature.decode_example_np(encoded), array)


def test_arrays_of_16_bits_and_floats(rng):
    for dtype in (np.uint16, np.float32):
        feature: Any = tfds.features.Image(shape=(5, 7, 1), dtype=dtype)
        image = (rng.random((5, 7, 1)) * 65535).astype(dtype)
        with preparing._without_tensorflow():
            encoded = feature.encode_example(image)
        if dtype == np.float32:
            np.testing.assert_array_equal(feature.decode_example_np(encoded), image)
        else:
            with Image.open(io.BytesIO(encoded)) as decoded:
                np.testing.assert_array_equal(np.asarray(decoded), image[..., 0])


def test_an_array_of_another_shape_is_refused_as_by_tfds():
    feature: Any = tfds.features.Image(shape=(5, 7, 3))
    with (
        preparing._without_tensorflow(),
        pytest.raises(ValueError, match="are incompatible"),
    ):
        feature.encode_example(np.zeros((5, 7, 1), np.uint8))


def test_tfds_is_left_as_it_was():
    lazy = lazy_imports_utils.tensorflow
    before = image_feature._ImageEncoder._encode_image, download.DownloadManager
    with preparing._without_tensorflow():
        assert lazy.compat.as_text(b"text") == "text"
        for module in (lazy, lazy.io):
            with pytest.raises(ImportError, match="TensorFlow's nothing is not here"):
                module.nothing  # noqa: B018
    assert (image_feature._ImageEncoder._encode_image, download.DownloadManager) == before
    assert "_module" not in vars(lazy)


def test_files_are_opened_as_by_tensorflow(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("ä\r\nb\n".encode())
    with preparing._without_tensorflow():
        gfile = lazy_imports_utils.tensorflow.io.gfile
        with gfile.GFile(str(path)) as file:
            assert list(file) == ["ä\r\n", "b\n"]
        with gfile.GFile(str(path), "rb") as file:
            assert file.read() == path.read_bytes()
        assert gfile.glob(f"{tmp_path}/t*") == [str(path)]
        assert gfile.listdir(str(tmp_path)) == ["text"]


def test_a_builder_that_needs_more_of_tensorflow(tmp_path, manual, rng, offline, monkeypatch):
    idx_files(manual, rng, monkeypatch)
    monkeypatch.setattr(
        mnist,
        "_extract_mnist_images",
        lambda path, count: lazy_imports_utils.tensorflow.io.parse_single_example(path, {}),
    )
    command = "run `tfds build mnist --file_format=array_record`"
    with pytest.raises(InputError, match=f"TFDS needs TensorFlow to prepare mnist: {command}"):
        load_dataset("mnist", "train", str(tmp_path))


def test_pictures_of_imagenet_that_tfds_would_convert(tmp_path, manual):
    """In CMYK, and a PNG: they are stored as they are, and read as any other."""
    classes, red = {}, Image.new("RGB", (24, 20), (200, 40, 40))
    for names, mode, kind in (
        (imagenet.CMYK_IMAGES, "CMYK", "JPEG"),
        (imagenet.PNG_IMAGES, "RGB", "PNG"),
    ):
        file, name = io.BytesIO(), min(names)
        red.convert(mode).save(file, kind)
        path = tmp_path / f"{name.split('_')[0]}.tar"
        tar(path, {name: file.getvalue()}, "w")
        classes[path.name] = path.read_bytes()
    tar(manual / "ILSVRC2012_img_train.tar", classes, "w")
    validation = {"ILSVRC2012_val_00000001.JPEG": file.getvalue()}
    tar(manual / "ILSVRC2012_img_val.tar", validation, "w")
    images, _ = Source("imagenet2012", "train", str(tmp_path)).read(np.arange(2))
    assert np.abs(images - np.array([200.0, 40, 40])).max() < 4


def test_a_tfds_that_is_built_in_another_way(tmp_path, monkeypatch):
    monkeypatch.delattr(image_feature._ImageEncoder, "_encode_image")
    with pytest.raises(InputError, match=r"TFDS .* lacks _encode_image, .*: install") as error:
        load_dataset("mnist", "train", str(tmp_path))
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())
