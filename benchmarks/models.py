"""The tables of docs/models.md: all names at a glance; every model, its size, and how far its
logits are from timm's.

    python benchmarks/models.py

Parameters and multiply-adds are counted from shapes by `fr.summary`, not measured. BatchNorm,
ReLU, pooling and biases are no multiply-adds there, as in most papers. Where timm has a net of
the same name (and is installed, with PyTorch), both get the same random weights and statistics
and two images of 64x96 pixels; the last column is the largest difference of two logits, as a share
of the largest logit. It needs 16 GB of memory for the largest ones, and an hour of two cores.
"""

import gc
import re
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import flax_resnet as fr
from flax_resnet.models.dialects import in_our_names
from flax_resnet.models.variants import VARIANTS, Variant


def overview() -> list[str]:
    """The lines of the first table: by paper and size of the images, all names."""
    groups: dict[tuple[int, str], list[str]] = {}
    for name, variant in VARIANTS.items():
        groups.setdefault((variant.pixels, variant.paper), []).append(f"`{name}`")
    return [
        "| pixels | source | names |",
        "|---:|---|---|",
        *(
            f"| {pixels} | {linked(paper)} | {', '.join(names)} |"
            for (pixels, paper), names in sorted(groups.items(), key=lambda group: -group[0][0])
        ),
    ]


def linked(paper: str, *, with_title: bool = True) -> str:
    """The authors, and the title or else the number as a link."""
    text = r"\1" if with_title else r"\2"
    return re.sub(r", (.*), arXiv:([\d.]+)", rf", [{text}](https://arxiv.org/abs/\2)", paper)


def row(variant: Variant, difference: float | None) -> str:
    """A line of the table."""
    summary = fr.summary(variant.make(), variant.pixels)
    giga, pixels = f"{summary.multiply_adds / 1e9:#.3g}".rstrip("."), variant.pixels
    beside = "" if difference is None else f"{difference:.0e}"
    return (
        f"| {variant.name} | {summary.parameters:,} | {giga} | {pixels} "
        f"| {linked(variant.paper, with_title=False)} "
        f"| {variant.weights or 'none'} | {beside} |"
    )


def difference_from_timm(timm, name: str) -> float:
    """Of the logits, as a share of the largest.

    Raises:
      ValueError: if their entries are not the same.
    """
    import torch

    from tests.models.torch_resnet import randomize

    images = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)
    torch_images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    theirs, ours = randomize(timm.create_model(name)), fr.create_model(name)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        theirs.train()(torch_images)  # else deep nets overflow
        expected = theirs.eval()(torch_images).numpy()
    variables = fr.from_torch(ours, theirs.state_dict())
    if len(flatten_dict(variables)) != len(in_our_names(theirs.state_dict())):
        raise ValueError(f"{name} has other entries than timm's")
    logits = ours.apply(variables, jnp.asarray(images), train=False)
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def rows() -> Iterator[str]:
    """The lines of the table, and what they say of timm in one."""
    try:
        from tests.models.timm_nets import load_timm

        timm = load_timm()
        theirs = {*timm.list_models(module="resnet"), *timm.list_models(module="resnetv2")}
    except ImportError:
        timm, theirs = None, set()
    differences = {}
    for name, variant in VARIANTS.items():
        if name in theirs:
            differences[name] = difference_from_timm(timm, name)
            gc.collect()
        yield row(variant, differences.get(name))
    if timm and differences:
        largest = max(differences, key=lambda name: differences[name])
        yield (
            f"\n{len(differences)} names are those of timm {timm.__version__} too; the largest "
            f"difference is {differences[largest]:.1e}, of {largest}."
        )


if __name__ == "__main__":
    print("\n".join(overview()), end="\n\n")
    print("| model | parameters | GMACs | pixels | source | published weights | beside timm |")
    print("|---|---:|---:|---:|---|---|---:|")
    for line in rows():
        print(line, flush=True)
