"""Pictures that stand inside a page."""

import base64
import io

import jax
import numpy as np
from PIL import Image

from flax_resnet.runs import Run

# Pictures with more pixels a side are photographs, whose PNG would be large.
SMALL = 64
_FILTERS = 64


def data_url(pixels: np.ndarray, at_most: int | None = None) -> str:
    """The address of a picture: PNG where it is small, else JPEG.

    Args:
      pixels: uint8 [H, W, C]; C is 1 (grey), 3 (RGB) or 4 (RGBA, always PNG). Of other images
        the first channel is shown.
      at_most: pixels of its longer side; a larger one is reduced.
    """
    if pixels.shape[2] not in (1, 3, 4):
        pixels = pixels[..., :1]
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels)
    if at_most:
        image.thumbnail((at_most, at_most))
    kind, options = "png", {}
    if max(image.size) > SMALL and image.mode != "RGBA":
        kind, options = "jpeg", {"quality": 85}
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def filters(run: Run) -> dict[str, str] | None:
    """The kernels that see pixels, as a "picture" with its "caption"; None where there are none."""
    channels = run.image_shape[2]
    if channels not in (1, 3):
        return None
    kernels = jax.tree.leaves(run.variables["params"])
    of_pixels = [k for k in kernels if k.ndim == 4 and k.shape[2] == channels]
    if not of_pixels:
        return None
    kernel = np.asarray(of_pixels[0], np.float32)
    height, width, _, total = kernel.shape
    shown = np.moveaxis(kernel, -1, 0)[:_FILTERS]
    largest = np.maximum(np.abs(shown).max((1, 2, 3), keepdims=True), 1e-12)
    pixels = (127.5 + 127.5 * shown / largest).round().astype(np.uint8)
    # On clear ground, every weight a square.
    scale, gap, columns = max(1, 36 // width), 4, min(8, len(shown))
    rows = -(-len(shown) // columns)
    step_y, step_x = height * scale + gap, width * scale + gap
    sheet = np.zeros((rows * step_y - gap, columns * step_x - gap, 4), np.uint8)
    for i, one in enumerate(pixels):
        large = one.repeat(scale, 0).repeat(scale, 1)
        top, left = i // columns * step_y, i % columns * step_x
        sheet[top:, left:][: height * scale, : width * scale, :3] = large
        sheet[top:, left:][: height * scale, : width * scale, 3] = 255
    which = f"the first {len(shown)} of {total}" if total > len(shown) else f"{total}"
    return {
        "picture": data_url(sheet),
        "caption": f"Filters of {height}x{width} pixels, {which}; grey is 0, and each is scaled "
        "to its own largest weight.",
    }
