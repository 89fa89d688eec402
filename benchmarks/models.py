"""The table of docs/models.md: every model with its parameters and its multiply-adds.

    python benchmarks/models.py

Both are counted from shapes by `fr.summary`, not measured. BatchNorm, ReLU, pooling and
biases are no multiply-adds there, as in most papers.
"""

import re

import flax_resnet as fr

HE = "He et al. 2015, [1512.03385](https://arxiv.org/abs/1512.03385)"
HU = "Hu et al., [1709.01507](https://arxiv.org/abs/1709.01507)"
WIDE = "Zagoruyko and Komodakis, [1605.07146](https://arxiv.org/abs/1605.07146)"
# By the first pattern that fits a whole name: (source, whose weights fit).
ORIGINS = {
    r"resnet\d+": (HE, "torchvision, timm"),
    r"wide_resnet.*": (WIDE, "torchvision, timm"),
    r"resnext.*": (
        "Xie et al., [1611.05431](https://arxiv.org/abs/1611.05431)",
        "torchvision, timm",
    ),
    r"resnet\d+d": ("He et al. 2018, [1812.01187](https://arxiv.org/abs/1812.01187)", "timm"),
    r"seresnet50": (HU, "timm"),
    r"seresnet.*": (HU, "none"),
    r"vgg.*": (
        "Simonyan and Zisserman, [1409.1556](https://arxiv.org/abs/1409.1556)",
        "torchvision",
    ),
    r"cifar_resnet9": ("Page 2018, How to Train Your ResNet", "none"),
    r"cifar_preact.*": ("He et al. 2016, [1603.05027](https://arxiv.org/abs/1603.05027)", "none"),
    r"cifar_wrn.*": (WIDE, "none"),
    r"lab10.*": ("the lesson Lab10-6", "none"),
    r".*": (HE, "none"),
}


def row(name: str) -> str:
    """A line of the table."""
    model = fr.create_model(name)
    size = 32 if name.startswith(("cifar", "lab10")) else 224
    summary = fr.summary(model, size)
    giga = summary.multiply_adds / 1e9
    source, weights = next(v for pattern, v in ORIGINS.items() if re.fullmatch(pattern, name))
    return f"| {name} | {summary.parameters:,} | {giga:#.3g} | {size} | {source} | {weights} |"


if __name__ == "__main__":
    print("| model | parameters | GMACs | pixels | source | published weights that fit |")
    print("|---|---:|---:|---:|---|---|")
    for name in fr.list_models():
        print(row(name), flush=True)
