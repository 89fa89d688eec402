"""Predictions for pictures of every kind, and for what is none."""

import io
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

import flax_resnet as fr
from flax_resnet import predict
from flax_resnet.data import normalize

SHAPE = (32, 32, 3)


@pytest.fixture
def grey(rng):
    return rng.integers(0, 256, (32, 32), dtype=np.uint8)


@pytest.fixture
def rgb(rng):
    return rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)


def stored(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def read(image, kind="png", **options):
    return predict.read_image(stored(image, kind, **options), SHAPE)


def as_rgb(grey):
    return np.repeat(grey[..., None], 3, -1)


def test_eight_bits_stay_as_they_are(grey, rgb):
    np.testing.assert_array_equal(read(Image.fromarray(rgb)), rgb)
    np.testing.assert_array_equal(read(Image.fromarray(grey)), as_rgb(grey))
    np.testing.assert_array_equal(read(Image.fromarray(grey > 99)), as_rgb(255 * (grey > 99)))
    few_colors = Image.fromarray(rgb).quantize(16)
    np.testing.assert_array_equal(read(few_colors), np.asarray(few_colors.convert("RGB")))
    np.testing.assert_array_equal(read(few_colors, "gif"), np.asarray(few_colors.convert("RGB")))
    single = predict.read_image(stored(Image.fromarray(grey)), (32, 32, 1))
    np.testing.assert_array_equal(single, grey[..., None])


def test_more_bits_are_scaled(grey):
    expected = as_rgb(grey)
    np.testing.assert_array_equal(read(Image.fromarray(grey * np.uint16(257))), expected)
    np.testing.assert_array_equal(read(Image.fromarray(grey * np.int32(257)), "tiff"), expected)
    np.testing.assert_array_equal(read(Image.fromarray(np.float32(grey)), "tiff"), expected)
    np.testing.assert_array_equal(read(Image.fromarray(np.float32(grey / 255)), "tiff"), expected)


def test_transparent_pixels_are_white(grey, rgb):
    alpha = grey[..., None] / 255
    expected = rgb * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(read(Image.fromarray(np.dstack([rgb, grey]))), expected, atol=1)
    both = np.dstack([grey, 255 - grey])
    expected = as_rgb(grey) * (1 - alpha) + 255 * alpha
    np.testing.assert_allclose(read(Image.fromarray(both)), expected, atol=1)
    few_colors = Image.fromarray(rgb).quantize(16)
    clear = np.asarray(few_colors) == 3
    np.testing.assert_array_equal(read(few_colors, transparency=3)[clear], 255)


def test_damaged_metadata_of_a_sound_picture(rgb):
    stored_so = stored(Image.fromarray(rgb), exif=b"Exif\0\0no such thing")
    np.testing.assert_array_equal(predict.read_image(stored_so, SHAPE), rgb)


def test_cmyk():
    cyan = Image.new("CMYK", (40, 40), (255, 0, 0, 0))
    np.testing.assert_allclose(read(cyan, "jpeg")[16, 16], (0, 255, 255), atol=3)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_exif_turns_the_picture(kind):
    left = Image.new("L", (32, 32))
    left.paste(255, (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image = read(left, kind, exif=exif)
    assert image[:14].min() > 250
    assert image[18:].max() < 5


def test_middle_is_taken_and_resized_antialiased(rgb):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = rgb
    np.testing.assert_array_equal(read(Image.fromarray(wide)), rgb)
    np.testing.assert_array_equal(
        read(Image.fromarray(wide.transpose(1, 0, 2))), rgb.transpose(1, 0, 2)
    )
    large = np.zeros((320, 320), np.uint8)
    large[::2] = 255  # stripes too fine for 32 rows
    inside = read(Image.fromarray(large))[2:-2]
    np.testing.assert_allclose(inside, 127.5, atol=2)
    assert read(Image.new("RGB", (1, 7), "red")).shape == SHAPE


def test_height_and_width_are_not_mixed_up(rng):
    wide = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    png = stored(Image.fromarray(wide))
    np.testing.assert_array_equal(predict.read_image(png, (20, 30, 3)), wide)


def test_what_is_no_picture(rgb, monkeypatch):
    whole = stored(Image.fromarray(rgb)).getvalue()
    for content, message in (
        (whole[:1000], "truncated"),
        (whole[:60] + b"\xff" * 40 + whole[100:], "broken|error|checksum|truncated"),
        (b"", "not a picture"),
        (b"no picture", "not a picture"),
    ):
        with pytest.raises(fr.InputError, match=message):
            predict.read_image(io.BytesIO(content), SHAPE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # and the double is too much
    with pytest.raises(fr.InputError, match="decompression bomb"):
        predict.read_image(io.BytesIO(whole), SHAPE)


@pytest.fixture
def pictures(tmp_path, config):
    """A folder with three digits, one further down, and two files that are no pictures."""
    images = fr.load_dataset("digits", "test[:3]", config.data_dir).images
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for name, image in zip(("a.png", "b.PNG", "below/c.bmp"), images, strict=True):
        Image.fromarray(image).save(folder / name)
    (folder / "notes.txt").write_text("not to be looked at")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def test_program(finished, pictures, config, call):
    code, out, err = call(
        predict,
        "--workdir",
        finished[0],
        "--json",
        pictures,
        "-",
        "nothing.png",
        stdin=(pictures / "a.png").read_bytes(),
    )
    assert code == 1
    assert err.splitlines() == [
        "reading 6 pictures ...",
        f"{pictures}/broken.jpg: not a picture that Pillow reads",
        "nothing.png: No such file or directory",
    ]
    printed = [json.loads(line) for line in out.splitlines()]
    names = [f"{pictures}/{name}" for name in ("a.png", "b.PNG", "below/c.bmp")]
    assert [one["image"] for one in printed] == [*names, "-"]
    assert printed[3]["predictions"] == printed[0]["predictions"]

    run = fr.load_run(finished[0])
    images = fr.load_dataset("digits", "test[:3]", config.data_dir).images
    apply = jax.jit(partial(run.model.apply, train=False))
    logits = apply(run.variables, normalize(images, run.mean, run.std))
    for one, expected in zip(printed, softmax(np.float64(logits), -1), strict=False):
        order = np.argsort(-expected)[:5]
        assert [p["class"] for p in one["predictions"]] == [str(i) for i in order]
        probabilities = [p["probability"] for p in one["predictions"]]
        np.testing.assert_allclose(probabilities, expected[order], rtol=1e-3)


def test_table(finished, pictures, call):
    (pictures / "broken.jpg").rename(pictures / "\x1b[31m.jpg")
    code, out, err = call(predict, "--workdir", finished[0], "--quiet", pictures)
    assert (code, err) == (1, f"{pictures}/\\x1b[31m.jpg: not a picture that Pillow reads\n")
    lines = out.splitlines()
    assert len(lines) == 3 * 6
    assert lines[0] == f"{pictures}/a.png"
    assert all(line[:2] == "  " and "%  " in line for line in lines[1:6])


def test_maps(finished, pictures, tmp_path, call, monkeypatch):
    folder = tmp_path / "new" / "maps"
    monkeypatch.setenv("HOME", str(tmp_path))
    given = pictures / "a.png", pictures / "below", pictures / "a.png"
    code, _, err = call(
        predict, "--workdir", finished[0], "--quiet", "--maps", "~/new/maps", *given
    )
    assert (code, err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["a-2.png", "a.png", "c.png"]
    both = np.asarray(Image.open(folder / "a.png"))
    assert both.shape == (224, 448, 3)
    # Every pixel a square of 7 x 7, and beside it the same with the hot places in colour.
    original = np.asarray(Image.open(pictures / "a.png").convert("RGB"))
    picture, mapped = both[:, :224], both[:, 224:]
    np.testing.assert_array_equal(picture, original.repeat(7, 0).repeat(7, 1))
    run = fr.load_run(finished[0])
    images = normalize(original[None], run.mean, run.std)
    (expected,) = np.asarray(fr.class_activation_maps(run.model, run.variables, images))
    row, column = np.unravel_index(expected.argmax(), expected.shape)
    size = 224 // len(expected)
    change = np.abs(mapped.astype(int) - picture).sum(-1)
    change = change.reshape(len(expected), size, len(expected), size).mean((1, 3))
    assert change[row, column] > 0.5 * change.max() > 0
    cold = expected < 0
    assert change[cold].mean() < 0.5 * change[~cold].mean()


def test_maps_take_the_place_of_no_picture(finished, pictures, tmp_path, call):
    folder = tmp_path / "both"
    (folder / "below").mkdir(parents=True)
    for name in ("a.png", "below/a.png", "a-2.png"):
        shutil.copy(pictures / "a.png", folder / name)
    before = (folder / "a.png").read_bytes()
    given = folder / "a.png", folder / "below" / "a.png", folder / "a-2.png"
    code, _, err = call(predict, "--workdir", finished[0], "--quiet", "--maps", folder, *given)
    assert (code, err) == (0, "")
    names = sorted(path.name for path in folder.glob("*.png"))
    assert names == ["a-2-2.png", "a-2.png", "a-3.png", "a-4.png", "a.png"]
    assert (folder / "a.png").read_bytes() == (folder / "a-2.png").read_bytes() == before


def test_maps_that_cannot_be_written(finished, pictures, call):
    code, out, err = call(
        predict, "--workdir", finished[0], "--maps", pictures / "a.png", pictures / "a.png"
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--maps: " in err


def test_folder_without_pictures(finished, tmp_path, call):
    (tmp_path / "empty").mkdir()
    code, out, err = call(predict, "--workdir", finished[0], tmp_path / "empty")
    assert (code, out, err) == (1, "", f"{tmp_path}/empty: a folder without pictures\n")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, call):
    code, out, err = call(predict, "--workdir", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "required: IMAGE" in err

    # As it is started, with whatever Python itself may say.
    command = [sys.executable, "-m", "flax_resnet.predict", "--workdir", str(tmp_path), "a.png"]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "is not the folder of a run" in result.stderr
