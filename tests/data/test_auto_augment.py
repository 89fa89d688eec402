"""RandAugment and TrivialAugment: operations in NumPy and Pillow, strengths as torchvision's."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from flax_resnet.data import auto_augment as module
from flax_resnet.data.auto_augment import (
    OPERATIONS,
    RAND,
    TRIVIAL,
    AutoAugment,
    Strengths,
    apply,
    auto_augment,
)
from flax_resnet.data.batches import example_random
from flax_resnet.data.pictures import Sizing, draw_part, frame_of, opened, read_for_training
from tests.data.test_pictures import draw, encoded

SIZE = 40
IMAGE = draw(SIZE, SIZE)
PIXELS = np.asarray(IMAGE)


def torchvisions(policy: str) -> dict[str, tuple[torch.Tensor, bool]]:
    """(magnitudes, signed) of RandAugment and TrivialAugmentWide, as documented."""
    wide = policy == "trivialaugment"
    shear, turn, enhance = (0.99, 135.0, 0.99) if wide else (0.3, 30.0, 0.9)
    shift, bits = (32.0, 6) if wide else (150.0 / 331.0 * SIZE, 4)
    bins = 31
    enhanced = dict.fromkeys(
        ("brightness", "color", "contrast", "sharpness"), (torch.linspace(0, enhance, bins), True)
    )
    lost = (torch.arange(bins) / ((bins - 1) / bits)).round().int()
    return {
        "identity": (torch.zeros(bins), False),
        "shear_x": (torch.linspace(0, shear, bins), True),
        "shear_y": (torch.linspace(0, shear, bins), True),
        "translate_x": (torch.linspace(0, shift, bins), True),
        "translate_y": (torch.linspace(0, shift, bins), True),
        "rotate": (torch.linspace(0, turn, bins), True),
        **enhanced,
        "posterize": (8 - lost, False),
        "solarize": (torch.linspace(255, 0, bins), False),
        "autocontrast": (torch.zeros(bins), False),
        "equalize": (torch.zeros(bins), False),
    }


def gathered(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The pixels at these places, whose centres are at halves; black where there is none."""
    y, x = np.int32(np.floor(rows)), np.int32(np.floor(columns))
    inside = np.asarray((y >= 0) & (y < SIZE) & (x >= 0) & (x < SIZE))
    return np.where(inside[..., None], PIXELS[y.clip(0, SIZE - 1), x.clip(0, SIZE - 1)], 0)


def expected(operation: str, magnitude: float) -> np.ndarray:
    """As torchvision's _apply_op on a Pillow image."""
    y, x = np.indices((SIZE, SIZE)) + 0.5
    match operation:
        case "identity":
            return PIXELS
        case "shear_x":
            return gathered(y, x + magnitude * y)
        case "shear_y":
            return gathered(y + magnitude * x, x)
        case "translate_x":
            return gathered(y, x - int(magnitude))
        case "translate_y":
            return gathered(y - int(magnitude), x)
        case "rotate":  # counter-clockwise, about the middle
            angle, middle = np.deg2rad(magnitude), SIZE / 2
            dy, dx = y - middle, x - middle
            return gathered(
                middle + dx * np.sin(angle) + dy * np.cos(angle),
                middle + dx * np.cos(angle) - dy * np.sin(angle),
            )
        case "brightness":
            return np.clip(PIXELS * (1 + magnitude), 0, 255).astype(np.uint8)
        case "contrast":
            grey = round(np.asarray(IMAGE.convert("L")).mean())
            return np.clip(grey + (PIXELS - float(grey)) * (1 + magnitude), 0, 255).astype(np.uint8)
        case "color":
            grey = np.asarray(IMAGE.convert("L"), float)[..., None]
            return np.clip(grey + (PIXELS - grey) * (1 + magnitude), 0, 255).astype(np.uint8)
        case "sharpness":
            return np.asarray(ImageEnhance.Sharpness(IMAGE).enhance(1 + magnitude))
        case "posterize":
            return PIXELS & np.uint8(256 - 2 ** (8 - int(magnitude)))
        case "solarize":
            return np.where(magnitude > PIXELS, PIXELS, 255 - PIXELS)
        case "autocontrast":
            low, high = PIXELS.min((0, 1)), PIXELS.max((0, 1))
            return np.clip((PIXELS - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    assert operation == "equalize"
    return np.asarray(ImageOps.equalize(IMAGE))


@pytest.mark.parametrize(
    ("policy", "strengths"), [("randaugment", RAND), ("trivialaugment", TRIVIAL)]
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_torchvisions(operation, policy, strengths):
    magnitudes, signed = torchvisions(policy)[operation]
    for level in (0, 1, 7, 13, 22, 29):  # with others places lie between two pixels
        for direction in (1, -1):
            magnitude = float(magnitudes[level]) * (direction if signed else 1)
            ours = np.asarray(apply(IMAGE, operation, direction, level, strengths))
            theirs = expected(operation, magnitude)
            assert ours.dtype == np.uint8
            # Pillow rounds its blends, and places, otherwise.
            far = np.abs(ours.astype(int) - theirs) > 1
            assert far.any(-1).mean() <= (0.01 if signed else 0), (level, direction)


def test_every_operation_is_as_likely_and_every_level(monkeypatch):
    drawn = []

    def noted(image, operation, direction, level, strengths):
        drawn.append((operation, direction, level, strengths))
        return image

    monkeypatch.setattr(module, "apply", noted)
    plans: list[tuple[AutoAugment, int, set[int], Strengths]] = [
        ("randaugment", 2, {9}, RAND),
        ("trivialaugment", 1, set(range(31)), TRIVIAL),
    ]
    for policy, count, levels, strengths in plans:
        drawn.clear()
        for i in range(3000):
            auto_augment(IMAGE, example_random(0, 0, i), policy)
        assert len(drawn) == 3000 * count
        assert {level for *_, level, _ in drawn} == levels
        assert all(used is strengths for *_, used in drawn)
        for place, kinds in ((0, 14), (1, 2), (2, len(levels))):
            counts = np.array(list(Counter(one[place] for one in drawn).values()))
            share = len(drawn) / kinds
            assert len(counts) == kinds
            assert np.abs(counts - share).max() < 5 * np.sqrt(share)


def test_grey_images_stay_grey():
    for operation in OPERATIONS:
        assert apply(IMAGE.convert("L"), operation, 1, 20, TRIVIAL).mode == "L"


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_it_follows_the_crop_and_depends_on_the_example_alone(policy):
    file = encoded(draw(90, 70))
    plain, sizing = Sizing(24, 27), Sizing(24, 27, auto_augment=policy)
    changed = 0
    for i in range(12):
        cropped = Image.fromarray(read_for_training(file, plain, example_random(0, 3, i)))
        random = example_random(0, 3, i)
        with opened(file) as image:
            draw_part(random, frame_of(image), sizing)
        ours = read_for_training(file, sizing, example_random(0, 3, i))
        np.testing.assert_array_equal(ours, auto_augment(cropped, random, policy))
        changed += not np.array_equal(ours, np.asarray(cropped))
    assert changed > 6
