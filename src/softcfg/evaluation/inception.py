"""The InceptionV3 of 2015-12-05 that FID is defined by, with the resizing of TensorFlow 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.evaluation.features import Features

IMAGE_SIZE = 299
SPATIAL_CHANNELS = 7
CLASSES = 1008

Kernel = tuple[int, int]


def resize_bilinear_tf1(images: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """Resize float images `[B, C, H, W]` to `[B, C, size, size]` as `resize_bilinear` of TensorFlow 1 does.

    Target pixel i lies at i * (in / out) of the source: neither half-pixel centres nor aligned corners, and no
    antialiasing. Positions are computed in float32, as they are there, whatever the dtype of the images.
    """

    def positions(length: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = torch.tensor(length / size, dtype=torch.float32, device=images.device)
        source = torch.arange(size, dtype=torch.float32, device=images.device) * scale
        lower = source.long()
        return lower, (lower + 1).clamp(max=length - 1), (source - lower).to(images.dtype)

    top, bottom, down = positions(images.shape[2])
    left, right, across = positions(images.shape[3])

    def along_row(rows: Tensor) -> Tensor:
        start = rows[..., left]
        return start + (rows[..., right] - start) * across

    upper = along_row(images[:, :, top])
    return upper + (along_row(images[:, :, bottom]) - upper) * down[:, None]


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, ReLU; padded to keep the size unless `valid` or strided."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | Kernel, stride: int = 1, *, valid: bool = False
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid or stride > 1 else (height // 2, width // 2)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs, H, W]` -> `[B, outputs, H', W']`."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


Stage = Sequence[tuple[int, int | Kernel]]  # convolutions side by side: (outputs, kernel); most stages have one


class Mixed(nn.Module):
    """Branches of convolutions and one of pooling, concatenated over channels.

    Args:
        branches: name -> stages, one after the other. The convolutions are named after the branch, followed by
            the stage's number if there are several, and by a letter within a stage of several.
        pool: "average" (over the real pixels only), "max", or "reduce": max pooling of stride 2 without a
            convolution, in a block whose branches end in a convolution of stride 2.
        pool_outputs: channels of the convolution after pooling.
    """

    def __init__(self, inputs: int, branches: dict[str, Sequence[Stage]], pool: str, pool_outputs: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.branches: list[list[list[str]]] = []
        for branch, stages in branches.items():
            width = inputs
            names: list[list[str]] = []
            for number, stage in enumerate(stages, start=1):
                stride = 2 if pool == "reduce" and number == len(stages) else 1
                stem = branch if len(stages) == 1 else f"{branch}_{number}"
                names.append([stem + letter for letter in ("ab" if len(stage) > 1 else [""])])
                for name, (outputs, kernel) in zip(names[-1], stage, strict=True):
                    self.add_module(name, ConvBlock(width, outputs, kernel, stride))
                width = sum(outputs for outputs, _ in stage)
            self.branches.append(names)
        if pool_outputs:
            self.branch_pool = ConvBlock(inputs, pool_outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs, H, W]` -> `[B, outputs, H', W']`, the branches in their order, pooling last."""
        results = []
        for stages in self.branches:
            y = x
            for names in stages:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            results.append(y)
        if self.pool == "reduce":
            results.append(F.max_pool2d(x, 3, stride=2))
        elif self.pool == "max":
            results.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            results.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        return torch.cat(results, dim=1)


def _mixed_35(inputs: int, pool_outputs: int) -> Mixed:
    branches: dict[str, Sequence[Stage]] = {
        "branch1x1": [[(64, 1)]],
        "branch5x5": [[(48, 1)], [(64, 5)]],
        "branch3x3dbl": [[(64, 1)], [(96, 3)], [(96, 3)]],
    }
    return Mixed(inputs, branches, "average", pool_outputs)


def _mixed_17(width: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    branches: dict[str, Sequence[Stage]] = {
        "branch1x1": [[(192, 1)]],
        "branch7x7": [[(width, 1)], [(width, row)], [(192, column)]],
        "branch7x7dbl": [[(width, 1)], [(width, column)], [(width, row)], [(width, column)], [(192, row)]],
    }
    return Mixed(768, branches, "average", 192)


def _mixed_8(inputs: int, pool: str) -> Mixed:
    fork: Stage = [(384, (1, 3)), (384, (3, 1))]
    branches: dict[str, Sequence[Stage]] = {
        "branch1x1": [[(320, 1)]],
        "branch3x3": [[(384, 1)], fork],
        "branch3x3dbl": [[(448, 1)], [(384, 3)], fork],
    }
    return Mixed(inputs, branches, pool, 192)


class InceptionV3(nn.Module):
    """The network in the TensorFlow 1 graph of 2015-12-05; parameters are named as torch-fidelity publishes them.

    It differs from the usual InceptionV3: average pooling leaves out the padding, the last block pools by
    maximum, there are 1008 classes, and images are resized as TensorFlow 1 did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBlock(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBlock(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = ConvBlock(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBlock(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBlock(80, 192, 3, valid=True)
        self.Mixed_5b = _mixed_35(192, 32)
        self.Mixed_5c = _mixed_35(256, 64)
        self.Mixed_5d = _mixed_35(288, 64)
        reduce_35: dict[str, Sequence[Stage]] = {
            "branch3x3": [[(384, 3)]],
            "branch3x3dbl": [[(64, 1)], [(96, 3)], [(96, 3)]],
        }
        self.Mixed_6a = Mixed(288, reduce_35, "reduce")
        self.Mixed_6b = _mixed_17(128)
        self.Mixed_6c = _mixed_17(160)
        self.Mixed_6d = _mixed_17(160)
        self.Mixed_6e = _mixed_17(192)
        reduce_17: dict[str, Sequence[Stage]] = {
            "branch3x3": [[(192, 1)], [(320, 3)]],
            "branch7x7x3": [[(192, 1)], [(192, (1, 7))], [(192, (7, 1))], [(192, 3)]],
        }
        self.Mixed_7a = Mixed(768, reduce_17, "reduce")
        self.Mixed_7b = _mixed_8(1280, "average")
        self.Mixed_7c = _mixed_8(2048, "max")
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, pixels: Tensor) -> Features:
        """Describe images.

        Args:
            pixels: `[B, 3, H, W]` of any size, 0 to 255, uint8 or float.

        Returns:
            Features: pooled `[B, 2048]`; spatial `[B, 2023]`, the first 7 channels of the 17 x 17 layer
            `mixed_6/conv` with the channel running fastest; logits `[B, 1008]` without the bias, of which the
            Inception Score is made.
        """
        x = (resize_bilinear_tf1(pixels.to(self.fc.weight.dtype)) - 128) / 128
        if x.device.type == "cpu" and x.dtype == torch.float32:
            x = x.contiguous(memory_format=torch.channels_last)  # the faster layout there
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)  # 73 x 73
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # 35 x 35
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # 17 x 17
        # The block's first branch is mixed_6/conv.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # 8 x 8
        pooled = x.mean(dim=(2, 3))
        return Features(pooled, spatial, F.linear(pooled, self.fc.weight))
