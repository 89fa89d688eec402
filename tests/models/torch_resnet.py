"""The PyTorch ResNet that ours is compared with: the seed's classes, in torchvision's names."""

import torch
from torch import nn
from torch.nn import functional


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 3, stride, padding=1, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class SubsampleAndPad(nn.Module):
    """Option A of He et al.: no parameters, zero channels on both sides."""

    def __init__(self, in_planes: int, out_planes: int, stride: int):
        super().__init__()
        self.stride = stride
        missing = out_planes - in_planes
        self.pad = (0, 0, 0, 0, missing // 2, missing - missing // 2)

    def forward(self, x):
        return functional.pad(x[:, :, :: self.stride, :: self.stride], self.pad)


def make_downsample(in_planes: int, out_planes: int, stride: int, shortcut: str):
    if stride == 1 and in_planes == out_planes:
        return None
    if shortcut == "identity":
        return SubsampleAndPad(in_planes, out_planes, stride)
    return nn.Sequential(conv1x1(in_planes, out_planes, stride), nn.BatchNorm2d(out_planes))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, shortcut: str = "projection"):
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = make_downsample(inplanes, planes, stride, shortcut)

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + identity)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, shortcut: str = "projection"):
        super().__init__()
        self.conv1 = conv1x1(inplanes, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * 4)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.downsample = make_downsample(inplanes, planes * 4, stride, shortcut)

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return functional.relu(out + identity)


class ResNet(nn.Module):
    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        num_classes: int = 1000,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        strides: tuple[int, ...] = (1, 2, 2, 2),
        cifar_stem: bool = False,
        shortcut: str = "projection",
    ):
        super().__init__()
        self.inplanes = widths[0]
        kernel, stride, padding = (3, 1, 1) if cifar_stem else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, widths[0], kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.Identity() if cifar_stem else nn.MaxPool2d(3, 2, padding=1)
        stages = zip(layers, widths, strides, strict=True)
        self.stages = [f"layer{i}" for i in range(1, len(layers) + 1)]
        for name, (blocks, planes, stride) in zip(self.stages, stages, strict=True):
            self.add_module(name, self._make_layer(block, planes, blocks, stride, shortcut))
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, block, planes, blocks, stride, shortcut):
        layers = []
        for i in range(blocks):
            layers.append(block(self.inplanes, planes, stride if i == 0 else 1, shortcut))
            self.inplanes = planes * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x):
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)))


HE_CIFAR = {"widths": (16, 32, 64), "strides": (1, 2, 2), "shortcut": "identity"}
LAB10 = {"widths": (16, 32, 64, 128), "strides": (1, 1, 2, 2)}


def create(name: str) -> ResNet:
    """The twin of `create_model(name)`."""
    block, layers, fields = {
        "resnet18": (BasicBlock, (2, 2, 2, 2), {}),
        "resnet50": (Bottleneck, (3, 4, 6, 3), {}),
        "cifar_resnet18": (BasicBlock, (2, 2, 2, 2), {"widths": (64, 128, 256, 512)}),
        "cifar_resnet8": (BasicBlock, (1, 1, 1), HE_CIFAR),
        "cifar_resnet20": (BasicBlock, (3, 3, 3), HE_CIFAR),
        "lab10_resnet50": (Bottleneck, (3, 4, 6, 3), LAB10),
    }[name]
    small = {"num_classes": 10, "cifar_stem": True} if fields else {}
    return ResNet(block, layers, **small, **fields)


def randomize(module: nn.Module) -> nn.Module:
    """Random BatchNorm parameters and statistics, so that none of them drops out.

    The biases are away from zero, and with them the inputs of most ReLUs.
    """
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            side = torch.randint(0, 2, m.bias.shape) * 2 - 1
            m.bias.data = side * torch.empty_like(m.bias).uniform_(1, 2) * m.weight.data
            assert m.running_mean is not None
            assert m.running_var is not None
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return module
