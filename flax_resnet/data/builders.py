"""A TFDS builder of our own, for data that needs no download."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


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

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits  # a second of import, needed once

        digits: Any = load_digits()
        for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            if (i % 5 == 0) == (split == "test"):
                grey = Image.fromarray(np.uint8(np.round(pixels * 255 / 16)))
                large = grey.resize((32, 32), Image.Resampling.BICUBIC)
                yield i, {"image": large.convert("RGB"), "label": int(label)}
