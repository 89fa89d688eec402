"""The figures of the lesson, drawn from its numbers.

Each is 5 inches wide with letters of 9 points and more, so that it can be read in print and,
as wide as a phone, without zooming. Colours are of Okabe and Ito, told apart by colour-blind
readers too, and lines also differ in their dashes or markers.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
_STYLES = {  # by depth
    20: {"color": _BLUE, "linestyle": "-"},
    56: {"color": _ORANGE, "linestyle": "--"},
    110: {"color": _GREEN, "linestyle": ":"},
}
_RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _figure(height: float) -> Figure:
    return Figure(figsize=(5, height), layout="constrained", facecolor="white")


def _save(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib in it, so that the same numbers give the same file.
    figure.savefig(path, dpi=180, metadata={"Software": None})


def draw_identity(numbers: dict[str, Any], path: Path) -> None:
    """What a stage of blocks at initialisation makes of an image: three nets, a row each."""
    blocks = list(next(iter(numbers["nets"].values()))["maps"])
    titles = ["into\nblock 1", *(f"after {int(name.split('_')[1]) + 1}" for name in blocks[1:])]
    with matplotlib.rc_context(_RC):
        figure = _figure(4.6)
        grid = figure.subplots(len(numbers["nets"]), len(blocks))
        for row, (name, net) in zip(grid, numbers["nets"].items(), strict=True):
            before = np.array(net["maps"]["stem"])
            for axes, block in zip(row, blocks, strict=True):
                after = np.array(net["maps"][block])
                axes.imshow(after, cmap="gray")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                alike = np.corrcoef(before.ravel(), after.ravel())[0, 1]
                if block != "stem":
                    axes.set_xlabel(f"{alike:.2f}")
            row[0].set_ylabel(name.replace(", ", ",\n"))
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title)
        figure.supxlabel("below each: correlation with the first of its row", fontsize=9)
        _save(figure, path)


def draw_gradients(numbers: dict[str, Any], path: Path) -> None:
    """Gradient norms by layer at the first and the last step, and the first kernel by step.

    A second figure beside it, NAME-loss, has the loss by step.
    """
    steps = numbers["steps"]
    with matplotlib.rc_context(_RC):
        figure = _figure(6.8)
        grid = figure.subplots(3, 2, sharey="row")
        for column, kind in enumerate(("plain", "residual")):
            gradients, later, kernels = grid[:, column]
            for depth, style in _STYLES.items():
                net = numbers["nets"][f"{kind}-{depth}"]
                for axes, when in ((gradients, "at_start"), (later, "at_end")):
                    norms = net[when]["gradients"][:-1]  # the classifier is no convolution
                    axes.plot(np.arange(1, len(norms) + 1), norms, label=str(depth), **style)
                kernels.plot(np.arange(1, steps + 1), net["first_kernel"], **style)
            gradients.set_title(f"{kind}: before step 1")
            later.set_title(f"{kind}: before step {steps}")
            later.set_xlabel("layer, from the image on")
            kernels.set_title(f"{kind}: first layer")
            kernels.set_xlabel("step")
        for axes in grid.flat:
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        for axes, label in zip(grid[:, 0], ("gradient", "gradient", "kernel"), strict=True):
            axes.set_ylabel(f"{label} norm")
        grid[0, 1].legend(title="layers", frameon=False)
        _save(figure, path)
        _save(_draw_losses(numbers), path.with_name(f"{path.stem}-loss{path.suffix}"))


def _draw_losses(numbers: dict[str, Any]) -> Figure:
    figure = _figure(2.9)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("plain", "residual"), strict=True):
        for depth, style in _STYLES.items():
            loss = numbers["nets"][f"{kind}-{depth}"]["loss"]
            axes.plot(np.arange(1, len(loss) + 1), loss, label=str(depth), **style)
        axes.set_title(kind)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.set_yticks([2, 5, 10, 20], labels=["2", "5", "10", "20"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training loss")
    panels[1].legend(title="layers", frameon=False)
    return figure


def draw_fields(numbers: dict[str, Any], path: Path) -> None:
    """Receptive fields over an image, and how much each pixel matters to a unit of the last."""
    image = np.array(numbers["image"], np.uint8)
    height, width = image.shape[:2]
    kinds = ("plain", "residual")
    with matplotlib.rc_context({**_RC, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = _figure(6)
        halves: Any = figure.subfigures(2, 1, height_ratios=(1.7, 1))
        upper, lower = halves
        _draw_squares(upper.subplots(), image, numbers["cifar_resnet20"])
        panels = lower.subplots(1, 2)
        peak = max(np.max(numbers[kind]["influence"]) for kind in kinds)
        for axes, kind in zip(panels, kinds, strict=True):
            axes.imshow(numbers[kind]["influence"], cmap="viridis", vmin=0, vmax=peak)
            _square(axes, (height // 2, width // 2), numbers[kind]["half"], "white")
            axes.set_title(f"{kind}-20")
            axes.set(xticks=[], yticks=[])
        bar = lower.colorbar(panels[0].images[0], ax=panels)
        bar.set_ticks([0, peak], labels=["none", "most"])
        lower.suptitle("what moves that unit of layer3; in the square: half", fontsize=10)
        _save(figure, path)


def _draw_squares(axes: Axes, image: np.ndarray, stages: list[dict[str, Any]]) -> None:
    """The image in its padding, with the field of the middle unit of every stage."""
    axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", zorder=1)
    edges = []
    for stage, colour in zip(stages, (_RED, _BLUE, _ORANGE, _GREEN), strict=False):
        # Padding is symmetric, so unit i of a stage has pixel i * stride in its middle.
        middle = tuple(n // 2 * stage["stride"] for n in stage["shape"][:2])
        edges.append((*_square(axes, middle, stage["field"], colour), colour))
    left, right = min(edge[0] for edge in edges), max(edge[1] for edge in edges)
    top = min(edge[2] for edge in edges)
    side = right - left
    axes.add_patch(Rectangle((left, top), side, side, facecolor="#e4e4e4", zorder=0))
    for i, (stage, (_, edge, middle_top, colour)) in enumerate(
        zip(reversed(stages), reversed(edges), strict=True)
    ):
        axes.annotate(
            f"{stage['name']}\n{stage['field']} x {stage['field']} pixels",
            xy=(edge, middle_top + (side / 2 + top - middle_top) * 0.1),
            xytext=(right + 0.1 * side, top + side * (0.05 + 0.26 * i)),
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.5},
            va="center",
        )
    axes.set_xlim(left - 1, right + 0.5 * side)
    axes.set_ylim(top + side + 1, top - 1)
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.set_title("what the middle unit of each stage sees (grey: padding)")


def _square(
    axes: Axes, middle: tuple[int, ...], side: int, colour: str
) -> tuple[float, float, float]:
    """Draws a square around a pixel; its left, right and upper edges."""
    top, left = (n - side / 2 for n in middle)
    axes.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=colour, linewidth=2))
    return left, left + side, top


# The runs of `draw_curves`, by their models.
CURVES = ("cifar_plain20", "cifar_plain56", "cifar_resnet20", "cifar_resnet56")


def draw_curves(numbers: dict[str, Any], path: Path) -> None:
    """Training loss, training and test error by epoch, 20 and 56 layers, plain and residual."""
    with matplotlib.rc_context(_RC):
        figure = _figure(6.8)
        grid = figure.subplots(3, 2, sharex=True, sharey="row")
        for column, (kind, of_model) in enumerate({"plain": "plain", "residual": "resnet"}.items()):
            for depth in (20, 56):
                records = numbers[f"cifar_{of_model}{depth}"]
                epochs = [record["epoch"] for record in records]
                marker = "." if len(epochs) < 40 else None
                style = _STYLES[depth] | {"marker": marker, "label": str(depth)}
                loss, *errors = grid[:, column]
                loss.plot(epochs, [r["train_loss"] for r in records], **style)
                for axes, split in zip(errors, ("train", "test"), strict=True):
                    axes.plot(
                        epochs, [100 * (1 - r[f"{split}_accuracy"]) for r in records], **style
                    )
            grid[0, column].set_title(kind)
            grid[2, column].set_xlabel("epoch")
        for axes in grid.flat:
            axes.grid(alpha=0.3)
        labels = ("training loss", "training error (%)", "test error (%)")
        for axes, label in zip(grid[:, 0], labels, strict=True):
            axes.set_ylabel(label)
        grid[0, 1].legend(title="layers", frameon=False)
        _save(figure, path)
