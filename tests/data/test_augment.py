"""Crops, flips, cutout and normalisation of a batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_resnet.data import augment, channel_statistics, normalize
from flax_resnet.data.augment import _crop_by_choice, _crop_by_slices

KEY = jax.random.key(3)


def random_images(rng, count):
    return rng.integers(1, 256, (count, 6, 5, 3), dtype=np.uint8)


def all_crops(image, padding):
    """{pixels: (row, column, mirrored)} of every crop of a padded image, by NumPy."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    crops = {}
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[row : row + height, column : column + width]
            crops[crop.tobytes()] = (row, column, False)
            crops[crop[:, ::-1].tobytes()] = (row, column, True)
    return crops


def test_every_crop_and_side_comes_equally_often(rng):
    image = random_images(rng, 1)[0]
    crops = all_crops(image, padding=1)
    assert len(crops) == 18
    count = 3600
    images = np.broadcast_to(image, (count, *image.shape))
    out = np.asarray(augment(images, jnp.arange(count), KEY, crop_padding=1, flip=True))
    assert out.dtype == np.uint8
    seen = [crops[x.tobytes()] for x in out]  # KeyError: no crop of the image
    counts = np.array([seen.count(crop) for crop in crops.values()])
    # Chi-squared with 17 degrees of freedom exceeds 40.8 once in a thousand.
    assert ((counts - 200) ** 2 / 200).sum() < 40.8


def test_crops_of_a_tpu_are_those_of_the_others(rng):
    images = random_images(rng, 16)
    row, column = rng.integers(0, 5, (2, 16), dtype=np.int32)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    expected = [x[r : r + 6, c : c + 5] for x, r, c in zip(padded, row, column, strict=True)]
    for crop in (_crop_by_choice, _crop_by_slices):
        out = crop(jnp.asarray(images), jnp.asarray(row), jnp.asarray(column), padding=2)
        np.testing.assert_array_equal(out, expected)
    on_tpu = jax.jit(partial(augment, crop_padding=2, flip=False)).trace(images, row, KEY)
    assert "dynamic_slice" not in on_tpu.lower(lowering_platforms=("tpu",)).as_text()


def test_without_flip_nothing_is_mirrored(rng):
    images = random_images(rng, 64)
    out = np.asarray(augment(images, jnp.arange(64), KEY, crop_padding=2, flip=False))
    sides = [all_crops(x, 2)[y.tobytes()][2] for x, y in zip(images, out, strict=True)]
    assert not any(sides)


def test_without_crop_images_are_flipped_or_left(rng):
    images = random_images(rng, 64)
    out = np.asarray(augment(images, jnp.arange(64), KEY, crop_padding=0, flip=True))
    same = (out == images).all((1, 2, 3))
    mirrored = (out == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 0 < same.sum() < 64
    out = augment(images, jnp.arange(64), KEY, crop_padding=0, flip=False)
    np.testing.assert_array_equal(out, images)


@pytest.mark.parametrize("side", [1, 3, 4])
def test_cutout_hides_a_square_around_every_pixel_equally_often(rng, side):
    height, width = 6, 5
    masks = {}
    for row in range(height):
        for column in range(width):
            top, left = row - side // 2, column - side // 2
            mask = np.zeros((height, width), bool)
            mask[max(top, 0) : top + side, max(left, 0) : left + side] = True
            masks[mask.tobytes()] = mask
    assert len(masks) == 30
    count, fill = 6000, (0.5, 0.4, 0.3)
    images = random_images(rng, count) // 8  # darker than the fill
    out = np.asarray(
        augment(images, np.arange(count), KEY, crop_padding=0, flip=False, cutout=side, fill=fill)
    )
    hidden = (out == np.array([128, 102, 76], np.uint8)).all(-1)
    np.testing.assert_array_equal(out[~hidden], images[~hidden])
    seen = [x.tobytes() for x in hidden]
    assert set(seen) <= set(masks)
    counts = np.array([seen.count(mask) for mask in masks])
    # Chi-squared with 29 degrees of freedom exceeds 58.3 once in a thousand.
    assert ((counts - 200) ** 2 / 200).sum() < 58.3


def test_an_image_depends_on_its_index_and_the_key_alone(rng):
    images, index = random_images(rng, 32), np.arange(100, 132)
    run = partial(augment, crop_padding=4, flip=True, cutout=3)
    out = run(images, index, KEY)
    order = rng.permutation(32)[:8]
    np.testing.assert_array_equal(run(images[order], index[order], KEY), out[order])
    for other_index, key in ((index + 1, KEY), (index, jax.random.fold_in(KEY, 1))):
        other = run(images, other_index, key)
        assert (np.asarray(other) != out).any((1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_do_not_change_an_image(rng, devices):
    images, index = random_images(rng, 32), np.arange(32, dtype=np.int32)

    @jax.jit
    def run(images, index):
        return augment(images, index, KEY, crop_padding=4, flip=True)

    by_example = NamedSharding(
        Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec("data")
    )
    split = run(*jax.device_put((images, index), by_example))
    assert len(split.sharding.device_set) == devices
    np.testing.assert_array_equal(split, run(images, index))


def test_normalize_is_that_of_numpy(rng):
    images = random_images(rng, 4)
    mean, std = np.array([0.49, 0.48, 0.45]), np.array([0.25, 0.24, 0.26])
    out = normalize(images, mean.tolist(), std.tolist())
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, (images / 255 - mean) / std, rtol=2e-5, atol=2e-6)


def test_a_constant_channel_is_left_at_zero(rng):
    images = random_images(rng, 4)
    images[..., 1] = 255
    mean, std = channel_statistics([images])
    out = jax.jit(lambda images: normalize(images, mean, std))(images)
    np.testing.assert_array_equal(out[..., 1], 0)
    others = [0, 2]
    expected = (images / 255 - mean)[..., others] / np.array(std)[others]
    np.testing.assert_allclose(out[..., others], expected, rtol=2e-5, atol=2e-6)
    # Also where another split has it otherwise.
    assert not np.asarray(normalize(random_images(rng, 4), mean, std))[..., 1].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16, np.int32, np.bool_])
def test_white_is_never_guessed(rng, dtype):
    images = random_images(rng, 4).astype(dtype)
    with pytest.raises(ValueError, match=f"uint8 images, from 0 to 255, not {images.dtype}: write"):
        normalize(images, (0.5,) * 3, (0.2,) * 3)


def test_the_lines_that_normalize_tells_are_right(rng):
    images = random_images(rng, 4)
    for same in (
        jnp.uint8(jnp.round(255 * (images / 255).astype(np.float32))),
        jnp.uint8((images * np.uint16(257)) // 257),
    ):
        np.testing.assert_array_equal(same, images)


@pytest.mark.parametrize(
    ("channels", "means", "stds"), [(1, 3, 3), (3, 1, 1), (3, 3, 1), (4, 3, 3)]
)
def test_a_mean_and_a_deviation_for_each_channel(channels, means, stds):
    images = np.zeros((2, 5, 5, channels), np.uint8)
    message = f"{means} means and {stds} deviations for images of {channels} channels"
    with pytest.raises(ValueError, match=message):
        normalize(images, (0.5,) * means, (0.2,) * stds)
