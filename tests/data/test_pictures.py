"""What a net sees of a picture: against Pillow, and against torchvision's formulas."""

import io
import math
import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy import stats

from flax_resnet.data.pictures import (
    Sizing,
    find_pictures,
    opened,
    random_box,
    read_for_evaluation,
    read_for_training,
    upright,
)
from flax_resnet.errors import InputError

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def draw(width, height, seed=0):
    """A picture with edges and colours of all sizes."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(large + noise, 0, 255).astype(np.uint8))


def encoded(image, form="png", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return io.BytesIO(file.getvalue())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("width", "height"), [(90, 60), (61, 133), (32, 32), (5, 7), (1, 1)])
def test_evaluation_is_that_of_torchvisions_presets(width, height, interpolation):
    """Resize(36) of the shorter side, then CenterCrop(32), as transforms/_functional_pil has it."""
    image = draw(width, height)
    sizing = Sizing(32, 36, interpolation)
    ours = read_for_evaluation(encoded(image), sizing)
    short, long = sorted(image.size)
    longer = int(36 * long / short)
    size = (36, longer) if width <= height else (longer, 36)
    resized = image.resize(size, Image.Resampling[interpolation.upper()])
    left, top = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32)))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("upright", [False, True])
def test_of_a_strip_the_middle_is_resized(upright):
    strip = np.zeros((1, 20_001, 3), np.uint8)
    strip[:, 9_997:10_004] = np.arange(0, 210, 30)[:, None]
    expected = read_for_evaluation(encoded(Image.fromarray(strip[:, 9_990:10_011])), Sizing(40, 8))
    image = Image.fromarray(strip.swapaxes(0, 1) if upright else strip)
    ours = read_for_evaluation(encoded(image), Sizing(40, 8))
    np.testing.assert_array_equal(ours.swapaxes(0, 1) if upright else ours, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_gives_pillows_pixels_of_the_box(interpolation):
    image = draw(83, 57)
    for seed in range(20):
        box = random_box(np.random.default_rng(seed), 83, 57, AREA, RATIO)
        expected = image.crop(box).resize((24, 24), Image.Resampling[interpolation.upper()])
        ours = read_for_training(
            encoded(image), Sizing(24, 27, interpolation), np.random.default_rng(seed)
        )
        np.testing.assert_array_equal(ours, expected)


def test_large_jpegs_are_decoded_at_a_fraction():
    """As Pillow's draft does, and close to the whole picture reduced."""
    image = draw(640, 480)
    file = encoded(image, "jpeg", quality=95)
    sizing = Sizing(32, 36, crop_area=(0.9, 1.0))
    x, y, x2, y2 = box = random_box(np.random.default_rng(3), 640, 480, (0.9, 1.0), RATIO)
    ours = read_for_training(file, sizing, np.random.default_rng(3))
    with Image.open(file) as drafted:
        drafted.draft(None, (640 // 8, 480 // 8))
        assert drafted.size == (80, 60)
        small = drafted.resize((32, 32), Image.Resampling.BILINEAR, (x / 8, y / 8, x2 / 8, y2 / 8))
    np.testing.assert_array_equal(ours, small)
    whole = Image.open(file).resize((32, 32), Image.Resampling.BILINEAR, box)
    assert np.abs(np.int32(ours) - np.asarray(whole)).mean() < 3


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_cropped_upright(orientation, kind):
    image = draw(60, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(image, kind, quality=100, subsampling=0, exif=exif)
    with Image.open(file) as stored:
        turned = ImageOps.exif_transpose(stored)
    for seed in range(3):
        box = random_box(np.random.default_rng(seed), *turned.size, AREA, RATIO)
        expected = turned.crop(box).resize((20, 20), Image.Resampling.BILINEAR)
        ours = read_for_training(file, Sizing(20, 23), np.random.default_rng(seed))
        np.testing.assert_array_equal(ours, expected)


def test_pictures_are_turned_whatever_else_their_exif_data_say():
    """Pillow's exif_transpose fails where another entry is not of the type that it has to be."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)  # to be turned to the right
    odd = struct.pack("<HHI4s", 0x011A, 2, 3, b"72")  # XResolution as a text
    image = draw(60, 40)

    def with_exif(count, entries):
        exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(4)
        return encoded(image, "jpeg", quality=95, exif=exif)

    file = with_exif(2, entries + odd)
    with Image.open(file) as stored, pytest.raises(Exception):  # noqa: B017, PT011
        ImageOps.exif_transpose(stored)
    sizing = Sizing(20, 23)
    np.testing.assert_array_equal(
        read_for_evaluation(file, sizing), read_for_evaluation(with_exif(1, entries), sizing)
    )
    np.testing.assert_array_equal(
        read_for_training(file, sizing, np.random.default_rng(0)),
        read_for_training(with_exif(1, entries), sizing, np.random.default_rng(0)),
    )


@pytest.mark.parametrize(("width", "height"), [(500, 375), (40, 300)])
def test_boxes_have_the_moments_of_torchvisions(width, height):
    """RandomResizedCrop.get_params, written out: share, ratio and place of 4,000 boxes."""

    def reference(rng):
        for _ in range(10):
            pixels = rng.uniform(*AREA) * width * height
            ratio = math.exp(rng.uniform(*map(math.log, RATIO)))
            w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = rng.integers(0, height - h + 1)
                left = rng.integers(0, width - w + 1)
                return left, top, left + w, top + h
        if width / height < RATIO[0]:
            w, h = width, round(width / RATIO[0])
        else:
            w, h = width, height
        return (width - w) // 2, (height - h) // 2, (width + w) // 2, (height + h) // 2

    ours, theirs = (
        np.array([draw(np.random.default_rng([side, i])) for i in range(4000)], float)
        for side, draw in enumerate(
            (lambda rng: random_box(rng, width, height, AREA, RATIO), reference)
        )
    )
    for boxes in (ours, theirs):
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= (width, height)).all()
    for measure in (
        lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
        lambda b: np.log((b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1])),
        lambda b: b[:, 0] + b[:, 2],
        lambda b: b[:, 1] + b[:, 3],
    ):
        a, b = measure(ours), measure(theirs)
        assert a.mean() == pytest.approx(b.mean(), abs=5 * b.std() / math.sqrt(2000))
        assert a.std() == pytest.approx(b.std(), rel=0.1, abs=1e-9)
        assert stats.ks_2samp(a, b).pvalue > 1e-4  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("L", (8, 8), 100), (100, 100, 100)),
        (Image.new("I;16", (8, 8), 25700), (100, 100, 100)),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("P", (8, 8), 0), (0, 0, 0)),
        (Image.new("LA", (8, 8), (7, 255)), (7, 7, 7)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_any_mode(image, expected):
    pixels = read_for_evaluation(encoded(image), Sizing(4, 5))
    assert pixels.shape == (4, 4, 3)
    assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [list(expected)]
    grey = read_for_evaluation(encoded(image), Sizing(4, 5, channels=1))
    assert grey.shape == (4, 4, 1)


@pytest.mark.parametrize(("value", "expected"), [(0.5, 128), (1.0, 255), (2.0, 2), (100.0, 100)])
def test_white_of_floating_point_is_1_or_255(value, expected):
    file = encoded(Image.new("F", (8, 8), value), "tiff")
    assert (read_for_evaluation(file, Sizing(4, 5)) == expected).all()


def test_cmyk_is_converted():
    file = encoded(Image.new("CMYK", (9, 9), (0, 0, 0, 0)), "jpeg")
    assert (read_for_evaluation(file, Sizing(4, 5)) == 255).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture that Pillow reads"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture that Pillow reads"),
        (encoded(draw(40, 40), "jpeg").getvalue()[:500], "Truncated File Read"),
    ],
    ids=["empty", "PostScript", "truncated"],
)
def test_what_is_no_picture(content, message):
    with pytest.raises(InputError, match=message), opened(io.BytesIO(content)) as image:
        upright(image)


def test_file_beyond_any_size(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(draw(5, 7)).getvalue())
    os.truncate(path, 2**40)
    with pytest.raises(InputError, match="it has 1,099,511,627,776 bytes"), opened(path):
        pass


def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="it is not a file"), opened(tmp_path / "a.png"):
        pass


def test_pictures_of_a_folder(tmp_path):
    names = ["b.PNG", "a.jpg", "with space.jpeg", "new\nline.gif", "사진.webp", "sub/c.bmp"]
    for name in [*names, ".hidden.png", ".thumbnails/d.png", "notes.txt", "old.eps"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "link.png").symlink_to(tmp_path / "b.PNG")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    found = [str(path.relative_to(tmp_path)) for path in find_pictures(tmp_path)]
    assert found == sorted([*names, "link.png", "broken.png"])  # the last is told when it is opened
