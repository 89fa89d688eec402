"""TFDS builders that prepare their data without TensorFlow.

TFDS encodes NumPy images through TensorFlow, and PIL images through PIL. So these
builders yield PIL images.
"""

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered
from tensorflow_datasets.image_classification import cifar

from flax_resnet.errors import InputError

CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR10_URL = f"https://www.cs.toronto.edu/~kriz/{CIFAR10_ARCHIVE}"

Example = tuple[int, dict[str, Any]]


with registered.skip_registration():

    class Cifar10(cifar.Cifar10):
        """TFDS's own cifar10: its name, version, features and order.

        Attributes:
          archive: CIFAR-10's binary archive on disk; downloaded when None.
        """

        archive: Path | None = None
        url_infos = cifar.Cifar10.url_infos

        def _split_generators(self, dl_manager) -> Any:
            archive = self.archive or Path(dl_manager.download(CIFAR10_URL))
            names, train, test = _read_cifar10(archive)
            features: Any = self.info.features
            features["label"].names = names
            return {
                "train": _cifar10_examples("train", train),
                "test": _cifar10_examples("test", test),
            }


def _read_cifar10(archive: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(class names, training records, test records) of the archive, which is not unpacked.

    A record is uint8 [3073]: the label, then the red, green and blue planes row by row.

    Raises:
      InputError: if the archive is damaged, or another one.
    """
    try:
        with tarfile.open(archive) as tar:
            files = {Path(member.name).name: member for member in tar if member.isfile()}

            def read(name: str) -> bytes:
                file = tar.extractfile(files[name])
                assert file is not None  # isfile() above
                return file.read()

            names = read("batches.meta.txt").decode().split()
            batches = [read(f"data_batch_{i}.bin") for i in range(1, 6)]
            train, test = (
                np.frombuffer(records, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
                for records in (b"".join(batches), read("test_batch.bin"))
            )
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as error:
        raise InputError(
            f"{archive} is not CIFAR-10's binary archive, or is damaged: {error!r}"
        ) from error
    return names, train, test


def _cifar10_examples(split: str, records: np.ndarray) -> Iterator[Example]:
    for i, record in enumerate(records):
        image = Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
        yield i, {"id": f"{split}_{i:05d}", "image": image, "label": int(record[0])}


class Digits(tfds.core.GeneratorBasedBuilder):
    """The 1,797 handwritten digits that scikit-learn ships, as 32x32 RGB images.

    They are 8x8 pixels of 17 grey levels, the test part of "Optical Recognition of
    Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI, 1998). Every fifth, from the
    first on, is a test image: 1,437 for training and 360 for testing, by the same
    13 writers.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of scikit-learn, as 32x32 RGB images.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(32, 32, 3)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[Example]:
        from sklearn.datasets import load_digits  # a second of import, needed once

        digits: Any = load_digits()
        for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            if (i % 5 == 0) == (split == "test"):
                grey = Image.fromarray(np.uint8(np.round(pixels * 255 / 16)))
                large = grey.resize((32, 32), Image.Resampling.BICUBIC)
                yield i, {"image": large.convert("RGB"), "label": int(label)}
