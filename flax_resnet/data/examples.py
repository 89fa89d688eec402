"""Examples of one's own: anything that gives an example by its number."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from flax_resnet.data.datasets import Dataset, check_class_names
from flax_resnet.data.pictures import upright
from flax_resnet.errors import InputError, short_reason
from flax_resnet.progress import bar


@runtime_checkable
class Examples(Protocol):
    """Random access, as Grain has it: what `fr.train` takes as a split beside `fr.Dataset`.

    Attributes:
      class_names: one name a class.
    """

    @property
    def class_names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Mapping[str, Any]:
        """Example i: "image", uint8 [H, W, C] or [H, W] or a PIL image, and "label", an int."""
        ...


class ExampleSource:
    """A split of `Examples`, read as `Source` reads one from disk.

    Processes that read ahead pickle it, so the examples have to be such that they can be.

    Attributes:
      image_shape: (H, W, C), of the first image.
      class_names: one name a class.

    Raises (when made):
      InputError: if there is no example, if the first one is not an example, or if class_names are
        not strings.
    """

    can_be_streamed = True

    def __init__(self, examples: Examples):
        self._examples, self._length = examples, len(examples)
        self.class_names = tuple(examples.class_names)
        check_class_names(self.class_names)
        if not self._length:
            raise InputError(f"{self.name} has no examples")
        self.image_shape = self._example(0)[0].shape

    @property
    def name(self) -> str:
        """Of its class."""
        return type(self._examples).__name__

    def __len__(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the images and labels."""
        return len(self) * (int(np.prod(self.image_shape)) + 4)

    def load(self) -> Dataset:
        """The split in memory.

        Raises:
          InputError: as `read`.
        """
        images = np.empty((len(self), *self.image_shape), np.uint8)
        labels = np.empty(len(self), np.int32)
        for i in bar(range(len(self)), len(self), f"reading {self.name}", unit=" images"):
            images[i], labels[i] = self._checked(i)
        return Dataset(images, labels, self.class_names)

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 [n, H, W, C], and labels, int32 [n], of some examples.

        Raises:
          InputError: if one cannot be read, has another shape or a label that is no class.
        """
        images, labels = zip(*map(self._checked, index.tolist()), strict=True)
        return np.stack(images), np.array(labels, np.int32)

    def _checked(self, i: int) -> tuple[np.ndarray, int]:
        image, label = self._example(i)
        if image.shape != self.image_shape:
            raise InputError(
                f"the images of {self.name} differ in shape: {list(self.image_shape)} at first, "
                f"{list(image.shape)} in example {i}"
            )
        if not 0 <= label < len(self.class_names):
            raise InputError(
                f"label {label} of example {i} in {self.name} is not from 0 to "
                f"{len(self.class_names) - 1}, for {len(self.class_names)} class_names"
            )
        return image, label

    def _example(self, i: int) -> tuple[np.ndarray, int]:
        try:
            example = self._examples[i]
            image, label = example["image"], np.asarray(example["label"])
            if isinstance(image, Image.Image) and image.mode in ("P", "PA"):
                image = upright(image)  # NumPy would get numbers of its palette
            image = np.asarray(image)
        except Exception as error:  # of whatever the examples come from
            raise InputError(
                f"example {i} of {self.name} cannot be read: {type(error).__name__}: "
                f"{short_reason(error)}"
            ) from error
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise InputError(
                f"an image is uint8 [H, W, C] or [H, W]; example {i} of {self.name} has "
                f"{image.dtype} {list(image.shape)}"
            )
        if label.shape or not np.issubdtype(label.dtype, np.integer):
            raise InputError(
                f"a label is an int; example {i} of {self.name} has {label.dtype} "
                f"{list(label.shape)}"
            )
        return image.reshape(*image.shape[:2], -1), int(label)
