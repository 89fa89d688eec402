"""Pictures of any size, mode and format as pixels for a net: cropped and resized by Pillow."""

import contextlib
import functools
import io
import math
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

from flax_resnet.data.auto_augment import AutoAugment, auto_augment
from flax_resnet.errors import InputError, one_line

# What Pillow decodes within the process; PostScript, say, it would hand to Ghostscript.
FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF"),
    *("TGA", "ICO", "PCX", "QOI", "SGI", "DDS"),
)
_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ATTEMPTS = 10
_MOST_SIDES = 64  # that the longer side of a picture has of the shorter
# Of a file: uncompressed the most pixels that Pillow takes have fewer, and bytes between them it
# reads one by one.
_MOST_BYTES = 2**30

Picture = str | Path | io.BytesIO  # a file, or what one holds
Box = tuple[int, int, int, int]  # left, upper, right, lower


@dataclass(frozen=True)
class Sizing:
    """How pictures come to the size of the net's images.

    Attributes:
      image_size: pixels a side of what the net sees.
      eval_resize: pixels of the shorter side in evaluation, before the middle is cut out.
      interpolation: of all resizing, antialiased.
      channels: 1 (grey) or 3 (RGB).
      crop_area, crop_ratio: range of a random crop's share of the picture, and of its width by
        its height.
      auto_augment: of training images, see `flax_resnet.data.auto_augment`.
    """

    image_size: int
    eval_resize: int
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    channels: int = 3
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    auto_augment: AutoAugment = "none"

    @property
    def mode(self) -> str:
        """Of Pillow."""
        return "L" if self.channels == 1 else "RGB"

    @property
    def resampling(self) -> Image.Resampling:
        """Of Pillow."""
        return Image.Resampling[self.interpolation.upper()]


@contextlib.contextmanager
def opened(source: Picture) -> Iterator[Image.Image]:
    """A picture whose pixels are not decoded yet.

    Raises:
      InputError: here or within, if it is not a picture or is damaged, or if it has more than
        twice as many pixels as `PIL.Image.MAX_IMAGE_PIXELS`, 179 million as Pillow comes, or a
        GiB of bytes.
    """
    try:
        if not isinstance(source, io.BytesIO):
            _check_file(os.stat(source))
        with _without_warnings(), Image.open(source, formats=_decoders()) as image:
            yield image
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise what they like
        raise InputError(_reason(error)) from error


def _check_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):  # a pipe might never begin
        raise InputError("it is not a file")
    if status.st_size > _MOST_BYTES:
        raise InputError(f"it has {status.st_size:,} bytes")


_hushing = threading.Lock()
_hushed = 0  # pictures open at the moment
_filters = contextlib.ExitStack()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Pillow's: large, or with odd metadata; pictures may be open in several threads."""
    global _hushed
    with _hushing:
        if not _hushed:
            _filters.enter_context(warnings.catch_warnings(action="ignore"))
        _hushed += 1
    try:
        yield
    finally:
        with _hushing:
            _hushed -= 1
            if not _hushed:
                _filters.close()


@functools.cache
def _decoders() -> list[str]:
    """Of `FORMATS`, as Pillow calls them; JPEG's reads MPO too, and some are not in every build."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def upright(image: Image.Image) -> Image.Image:
    """Decoded, turned as its EXIF data say, on white where it is transparent; "L" or "RGB"."""
    image.load()
    if (orientation := _orientation(image)) != 1:
        image = image.transpose(_TURNS[orientation])
    if image.mode.startswith(("I", "F")):  # Pillow would cut off what is above 255
        values = np.asarray(image, np.float64)
        white = 65535
        if image.mode == "F":  # where two conventions live
            white = 1 if values.max() <= 1 else 255
        return Image.fromarray(np.uint8(np.clip(values / white, 0, 1) * 255 + 0.5))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return _in_mode(image, "L" if image.mode in ("1", "L") else "RGB")


def _orientation(image: Image.Image) -> int:
    """Of EXIF, from 1 to 8; ImageOps.exif_transpose fails where any other entry is odd."""
    with contextlib.suppress(Exception):  # where its metadata alone is damaged
        if (orientation := image.getexif().get(ExifTags.Base.Orientation)) in _TURNS:
            return orientation
    return 1


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture that Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)


def find_pictures(folder: str | Path) -> list[Path]:
    """Of `find_files`, those that are pictures by their names' endings."""
    return [path for path in find_files(folder) if is_picture(path)]


def is_picture(path: Path) -> bool:
    """By its name's ending."""
    return Image.registered_extensions().get(path.suffix.lower()) in FORMATS


def find_files(folder: str | Path) -> list[Path]:
    """The files in a folder and below, in order.

    Hidden files and folders are left out; links are followed, but into no folder twice. A link to
    nothing is one of them.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def look(inside: str) -> None:
        status = os.stat(inside)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(inside) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    look(entry.path)
                elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                    found.append(Path(entry.path))

    try:
        look(os.fspath(folder))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    return sorted(found)


@dataclass(frozen=True)
class Frame:
    """What a picture tells before it is decoded.

    Attributes:
      width, height: upright.
      is_jpeg: whether it can be decoded at 1/2, 1/4 and 1/8 of its size.
    """

    width: int
    height: int
    is_jpeg: bool


def frame_of(image: Image.Image) -> Frame:
    """Of a picture that `opened` gives."""
    if image.format == "TIFF":  # whose size Pillow turns before, and its metadata with the pixels
        image.load()
    width, height = reversed(image.size) if _orientation(image) > 4 else image.size
    return Frame(width, height, image.format in ("JPEG", "MPO"))


def decoded(image: Image.Image, mode: str, factor: int = 1) -> Image.Image:
    """A picture that `opened` gives, as `upright`, at 1 / factor of its size.

    Args:
      image: not decoded yet.
      mode: "L" or "RGB".
      factor: 1, or of a JPEG 2, 4 or 8 (libjpeg's scaled decoding).
    """
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    return _in_mode(upright(image), mode)


def read_for_evaluation(source: Picture, sizing: Sizing) -> np.ndarray:
    """The middle of a picture, as torchvision's presets for evaluation take it.

    The shorter side is resized to `eval_resize`, and `image_size` squared cut out of the middle.

    Returns:
      uint8 [image_size, image_size, channels].

    Raises:
      InputError: see `opened`.
    """
    with opened(source) as image:
        return middle(decoded(image, sizing.mode), sizing)


def middle(image: Image.Image, sizing: Sizing) -> np.ndarray:
    """Of a decoded picture: see `read_for_evaluation`."""
    short = min(image.size)
    if max(image.size) > _MOST_SIDES * short:
        # The ends of a strip are not seen, and would take gigabytes where it is a pixel wide.
        left, top = (max(0, (side - _MOST_SIDES * short) // 2) for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    width, height = (int(sizing.eval_resize * side / short) for side in image.size)
    size = sizing.image_size
    resized = image.resize((width, height), sizing.resampling)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _pixels(resized.crop((left, top, left + size, top + size)))


def read_for_training(source: Picture, sizing: Sizing, random: np.random.Generator) -> np.ndarray:
    """A random part of a picture, resized: as torchvision's RandomResizedCrop.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the part is still larger than what
    is made of it. Then `auto_augment` of the sizing.

    Returns:
      uint8 [image_size, image_size, channels].

    Raises:
      InputError: see `opened`.
    """
    with opened(source) as image:
        frame = frame_of(image)
        box, factor = draw_part(random, frame, sizing)
        return part(decoded(image, sizing.mode, factor), frame, box, sizing, random)


def draw_part(random: np.random.Generator, frame: Frame, sizing: Sizing) -> tuple[Box, int]:
    """A random part of a picture, and the factor at which it is enough to decode that."""
    box = random_box(random, frame.width, frame.height, sizing.crop_area, sizing.crop_ratio)
    shrink = min(box[2] - box[0], box[3] - box[1]) / sizing.image_size
    return box, 2 ** min(3, int(math.log2(shrink))) if frame.is_jpeg and shrink >= 2 else 1


def part(
    image: Image.Image, frame: Frame, box: Box, sizing: Sizing, random: np.random.Generator
) -> np.ndarray:
    """A part of a decoded picture: see `read_for_training`.

    Args:
      image: as `decoded`, at any factor.
      frame: of the whole picture, in whose pixels the box is.
      box, random, sizing: as of `draw_part`; what follows is drawn from where that ended.
    """
    if image.size == (frame.width, frame.height):
        image, inside = image.crop(box), None  # so that nothing beyond the part is in it
    else:
        across, down = image.width / frame.width, image.height / frame.height
        inside = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    size = (sizing.image_size, sizing.image_size)
    image = image.resize(size, sizing.resampling, inside)
    return _pixels(auto_augment(image, random, sizing.auto_augment))


def random_box(
    random: np.random.Generator,
    width: int,
    height: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """A part of a picture of that size, of whole pixels.

    As torchvision's RandomResizedCrop.get_params: its share of the picture is uniform between
    the two of `area`, the logarithm of its width by its height between those of `ratio`, its
    place among all that there are. After ten that do not fit it is the largest in the middle
    whose ratio is allowed. (C. Szegedy et al., arXiv:1409.4842, section 6.)
    """
    shares = random.uniform(area[0], area[1], _ATTEMPTS)
    log_ratios = random.uniform(math.log(ratio[0]), math.log(ratio[1]), _ATTEMPTS)
    for share, log_ratio in zip(shares, log_ratios, strict=True):
        pixels, by = share * width * height, math.exp(log_ratio)
        w, h = round(math.sqrt(pixels * by)), round(math.sqrt(pixels / by))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).reshape(image.height, image.width, -1)
