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
from tensorflow_datasets.image_classification import cifar

from flax_resnet.errors import InputError

CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR10_URL = f"https://www.cs.toronto.edu/~kriz/{CIFAR10_ARCHIVE}"

Example = tuple[int, dict[str, Any]]


with tfds.core.registered.skip_registration():

    class Cifar10(cifar.Cifar10):
        """TFDS's own cifar10: its name, version, features, order and checksum.

        Attributes:
          archive: an archive on disk to read; downloaded when None.
        """

        archive: Path | None = None
        url_infos = cifar.Cifar10.url_infos

        def _split_generators(self, dl_manager):
            archive = self.archive or Path(dl_manager.download(CIFAR10_URL))
            try:
                with tarfile.open(archive) as tar:
                    files = {Path(m.name).name: m for m in tar if m.isfile()}

                    def read(name: str) -> bytes:
                        file = tar.extractfile(files[name])
                        assert file is not None  # isfile() above
                        return file.read()

                    names = read("batches.meta.txt").decode().split()
                    train = b"".join(read(f"data_batch_{i}.bin") for i in range(1, 6))
                    test = read("test_batch.bin")
            except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
                raise InputError(
                    f"{archive} is not CIFAR-10's binary archive, or is damaged: {error!r}"
                ) from error
            self.info.features["label"].names = names
            return {
                "train": self._generate_examples("train", train),
                "test": self._generate_examples("test", test),
            }

        def _generate_examples(self, split: str, records: bytes) -> Iterator[Example]:
            # A record is the label and the planes red, green and blue, row by row.
            rows = np.frombuffer(records, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
            for i, row in enumerate(rows):
                image = row[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield (
                    i,
                    {
                        "id": f"{split}_{i:05d}",
                        "image": Image.fromarray(image),
                        "label": int(row[0]),
                    },
                )


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

        digits = load_digits()
        for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            if (i % 5 == 0) == (split == "test"):
                grey = Image.fromarray(np.uint8(np.round(pixels * 255 / 16)))
                large = grey.resize((32, 32), Image.Resampling.BICUBIC)
                yield i, {"image": large.convert("RGB"), "label": int(label)}
