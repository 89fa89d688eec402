"""The PyTorch nets that ours are compared with, in the names of torchvision and timm.

The lesson's classes, with what ResNeXt, ResNet-D, squeeze-and-excitation, pre-activation,
ResNet-9 and VGG add to them; no stochastic depth, and dropout in VGG alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

Norm = Callable[[int], nn.Module]


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


def group_norm(planes: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(n for n in range(1, 33) if planes % n == 0), planes)


class SubsampleAndPad(nn.Module):
    """Option A of He et al.: no parameters, zero channels on both sides."""

    def __init__(self, in_planes: int, out_planes: int, stride: int):
        super().__init__()
        self.stride = stride
        missing = out_planes - in_planes
        self.pad = (0, 0, 0, 0, missing // 2, missing - missing // 2)

    def forward(self, x):
        return functional.pad(x[:, :, :: self.stride, :: self.stride], self.pad)


class SqueezeExcite(nn.Module):
    def __init__(self, planes: int, reduced: int):
        super().__init__()
        self.fc1 = nn.Conv2d(planes, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, planes, 1)

    def forward(self, x):
        means = x.mean((2, 3), keepdim=True)
        return x * self.fc2(functional.relu(self.fc1(means))).sigmoid()


# Channels between the two layers, by channels of the block's output.
REDUCED = {8: 8, 16: 8, 32: 8, 64: 8, 256: 16, 512: 32, 1024: 64, 2048: 128}


class Block(nn.Module):
    expansion = 1
    preactivation = False

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        shortcut: str = "projection",
        groups: int = 1,
        width_per_group: int = 64,
        squeeze_excite: bool = False,
        norm: Norm = nn.BatchNorm2d,
    ):
        super().__init__()
        out_planes = planes * self.expansion
        width = planes * width_per_group // 64 * groups
        if self.expansion == 1:
            convs = [conv3x3(inplanes, planes, stride), conv3x3(planes, planes)]
        else:
            convs = [
                conv1x1(inplanes, width),
                conv3x3(width, width, stride, groups),
                conv1x1(width, out_planes),
            ]
        self.count = len(convs)
        for i, conv in enumerate(convs, start=1):
            self.add_module(f"conv{i}", conv)
            channels = conv.in_channels if self.preactivation else conv.out_channels
            self.add_module(f"bn{i}", norm(channels))
        self.se = SqueezeExcite(out_planes, REDUCED[out_planes]) if squeeze_excite else None
        self.changes = stride != 1 or inplanes != out_planes
        self.shortcut = shortcut
        self.downsample = None
        if self.changes and shortcut == "identity":
            self.downsample = SubsampleAndPad(inplanes, out_planes, stride)
        elif self.changes and shortcut != "none":
            layers: list[nn.Module] = [conv1x1(inplanes, out_planes, stride)]
            if shortcut == "average":
                pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
                first = nn.Identity() if stride == 1 else pool
                layers = [first, conv1x1(inplanes, out_planes)]
            if not self.preactivation:
                layers.append(norm(out_planes))
            self.downsample = nn.Sequential(*layers)

    def branch(self, x):
        for i in range(1, self.count + 1):
            conv, bn = self.get_submodule(f"conv{i}"), self.get_submodule(f"bn{i}")
            if self.preactivation:
                x = conv(x if i == 1 else functional.relu(bn(x)))
            else:
                x = bn(conv(x))
                x = functional.relu(x) if i < self.count else x
        return x if self.se is None else self.se(x)

    def forward(self, x):
        activated = functional.relu(self.get_submodule("bn1")(x)) if self.preactivation else x
        identity = activated if self.changes else x
        if self.downsample is not None:
            identity = self.downsample(identity)
        out = self.branch(activated)
        if self.shortcut != "none":
            out = out + identity
        return out if self.preactivation else functional.relu(out)


class BasicBlock(Block):
    pass


class Bottleneck(Block):
    expansion = 4


class PreActBasicBlock(Block):
    preactivation = True


class PreActBottleneck(Block):
    expansion = 4
    preactivation = True


class ResNet(nn.Module):
    def __init__(
        self,
        block: type[Block],
        layers: tuple[int, ...],
        num_classes: int = 1000,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        strides: tuple[int, ...] = (1, 2, 2, 2),
        cifar_stem: bool = False,
        deep_stem: bool = False,
        stem_width: int | None = None,
        in_channels: int = 3,
        norm: Norm = nn.BatchNorm2d,
        **fields,
    ):
        super().__init__()
        self.inplanes = stem = stem_width or widths[0]
        if deep_stem:
            self.conv1 = nn.Sequential(
                conv3x3(in_channels, stem // 2, 2),
                norm(stem // 2),
                nn.ReLU(),
                conv3x3(stem // 2, stem // 2),
                norm(stem // 2),
                nn.ReLU(),
                conv3x3(stem // 2, stem),
            )
        else:
            kernel, stride, padding = (3, 1, 1) if cifar_stem else (7, 2, 3)
            self.conv1 = nn.Conv2d(in_channels, stem, kernel, stride, padding, bias=False)
        if not block.preactivation:
            self.bn1 = norm(stem)
        self.maxpool = nn.Identity() if cifar_stem else nn.MaxPool2d(3, 2, padding=1)
        stages = zip(layers, widths, strides, strict=True)
        self.stages = [f"layer{i}" for i in range(1, len(layers) + 1)]
        for name, (blocks, planes, stride) in zip(self.stages, stages, strict=True):
            made = []
            for i in range(blocks):
                made.append(
                    block(self.inplanes, planes, stride if i == 0 else 1, norm=norm, **fields)
                )
                self.inplanes = planes * block.expansion
            self.add_module(name, nn.Sequential(*made))
        if block.preactivation:
            self.bn = norm(self.inplanes)
        self.preactivation = block.preactivation
        self.fc = nn.Linear(self.inplanes, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        if not self.preactivation:
            x = functional.relu(self.bn1(x))
        x = self.maxpool(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        if self.preactivation:
            x = functional.relu(self.bn(x))
        return self.fc(x.mean((2, 3)))


class ResNet9(nn.Module):
    def __init__(self, num_classes: int = 10, widths: tuple[int, ...] = (64, 128, 256, 512)):
        super().__init__()
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.conv2 = conv3x3(widths[0], widths[1])
        self.bn2 = nn.BatchNorm2d(widths[1])
        self.block1 = BasicBlock(widths[1], widths[1])
        self.conv3 = conv3x3(widths[1], widths[2])
        self.bn3 = nn.BatchNorm2d(widths[2])
        self.conv4 = conv3x3(widths[2], widths[3])
        self.bn4 = nn.BatchNorm2d(widths[3])
        self.block3 = BasicBlock(widths[3], widths[3])
        self.fc = nn.Linear(widths[3], num_classes, bias=False)

    def forward(self, x):
        pool, relu = nn.MaxPool2d(2), functional.relu
        x = relu(self.bn1(self.conv1(x)))
        x = self.block1(relu(self.bn2(pool(self.conv2(x)))))
        x = relu(self.bn3(pool(self.conv3(x))))
        x = self.block3(relu(self.bn4(pool(self.conv4(x)))))
        return self.fc(x.amax((2, 3))) / 8


class VGG(nn.Module):
    def __init__(
        self,
        layers: tuple[int, ...],
        num_classes: int = 1000,
        batch_norm: bool = False,
        widths: tuple[int, ...] = (64, 128, 256, 512, 512),
        hidden: int = 4096,
        dropout: float = 0.5,
    ):
        super().__init__()
        made: list[nn.Module] = []
        channels = 3
        for convs, planes in zip(layers, widths, strict=True):
            for _ in range(convs):
                made.append(nn.Conv2d(channels, planes, 3, padding=1))
                made += [nn.BatchNorm2d(planes), nn.ReLU()] if batch_norm else [nn.ReLU()]
                channels = planes
            made.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*made)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 49, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BOTTLENECK = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
SMALL: dict[str, Any] = {"num_classes": 10, "cifar_stem": True}
THREE: dict[str, Any] = {"widths": (16, 32, 64), "strides": (1, 2, 2), **SMALL}
VGGS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def _twins() -> dict[str, Callable[..., nn.Module]]:
    basic = {depth: partial(ResNet, BasicBlock, layers=layers) for depth, layers in BASIC.items()}
    bottleneck = {
        depth: partial(ResNet, Bottleneck, layers=layers) for depth, layers in BOTTLENECK.items()
    }
    twins: dict[str, Callable[..., nn.Module]] = {}
    for depth, net in (basic | bottleneck).items():
        twins[f"resnet{depth}"] = net
        twins[f"resnet{depth}d"] = partial(net, deep_stem=True, shortcut="average")
        twins[f"cifar_resnet{depth}"] = partial(net, **SMALL)
    for depth, net in basic.items():
        twins[f"plain{depth}"] = partial(net, shortcut="none")
    for depth, net in bottleneck.items():
        twins[f"seresnet{depth}"] = partial(net, squeeze_excite=True)
    for depth in (50, 101):
        twins[f"wide_resnet{depth}_2"] = partial(bottleneck[depth], width_per_group=128)
    for depth, groups, width in ((50, 32, 4), (101, 32, 8), (101, 64, 4)):
        twins[f"resnext{depth}_{groups}x{width}d"] = partial(
            bottleneck[depth], groups=groups, width_per_group=width
        )
    for depth in (8, 20, 32, 44, 56, 110, 1202):
        net = partial(ResNet, BasicBlock, layers=((depth - 2) // 6,) * 3, **THREE)
        twins[f"cifar_resnet{depth}"] = partial(net, shortcut="identity")
        if depth in (20, 32, 44, 56):
            twins[f"cifar_plain{depth}"] = partial(net, shortcut="none")
    twins["cifar_preact_resnet18"] = partial(ResNet, PreActBasicBlock, layers=BASIC[18], **SMALL)
    for depth in (164, 1001):
        layers = ((depth - 2) // 9,) * 3
        twins[f"cifar_preact_resnet{depth}"] = partial(
            ResNet, PreActBottleneck, layers=layers, **THREE
        )
    for depth, times in ((16, 8), (28, 10)):
        fields = THREE | {"widths": (16 * times, 32 * times, 64 * times), "stem_width": 16}
        layers = ((depth - 4) // 6,) * 3
        twins[f"cifar_wrn{depth}_{times}"] = partial(
            ResNet, PreActBasicBlock, layers=layers, **fields
        )
    twins["lab10_resnet50"] = partial(
        bottleneck[50], widths=(16, 32, 64, 128), strides=(1, 1, 2, 2), **SMALL
    )
    twins["cifar_resnet9"] = ResNet9
    for depth, layers in VGGS.items():
        twins[f"vgg{depth}"] = partial(VGG, layers=layers)
        twins[f"vgg{depth}_bn"] = partial(VGG, layers=layers, batch_norm=True)
    return twins


TWINS = _twins()


def create(name: str, **fields) -> Any:
    """The twin of `create_model(name, **fields)`, as far as both have these fields."""
    return TWINS[name](**fields)


def train_step(
    twin: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    label_smoothing: float = 0.0,
) -> tuple[float, np.ndarray]:
    """Loss and logits of a batch, images [N, H, W, C], before one step on it."""
    optimizer.zero_grad()
    logits = twin(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    loss = nn.functional.cross_entropy(
        logits, torch.from_numpy(labels).long(), label_smoothing=label_smoothing
    )
    loss.backward()
    optimizer.step()
    return loss.item(), logits.detach().numpy()


def randomize(module: nn.Module) -> nn.Module:
    """Random parameters and statistics of all layers, so that none drops out.

    Those of PyTorch's generator, always the same, whichever nets were made before. The biases of
    BatchNorm and GroupNorm are away from zero, and with them the inputs of most ReLUs.
    """
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear):
            m.reset_parameters()
        if isinstance(m, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            side = torch.randint(0, 2, m.bias.shape) * 2 - 1
            m.bias.data = side * torch.empty_like(m.bias).uniform_(1, 2) * m.weight.data
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None
            assert m.running_var is not None
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return module
