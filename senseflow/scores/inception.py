"""InceptionV3's 2048 pool features of FID and KID: clean-fid's resize, the 2015 network (clean-fid's or
torch-fidelity's).

Whole pictures are resized to 299 x 299 with clean-fid's filter (Parmar et al. 2022: PIL bicubic in fp32). A patch is
the centre 299 x 299 crop at full resolution, no resize: SDXL-Lightning's and DMD2's Patch FID, and our reading of the
paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow.config import UserError
from senseflow.models.loading import first_line
from senseflow.scores.weights import find_file, identity, library

SIDE = 299


def centre_patch(picture: Tensor, side: int = SIDE) -> Tensor:
    """uint8 [3, H, W] -> its centre [3, side, side]. Raises UserError for a smaller picture."""
    h, w = picture.shape[1:]
    if min(h, w) < side:
        raise UserError(f"a patch needs pictures of {side} pixels or more, these are {w}x{h}")
    top, left = (h - side) // 2, (w - side) // 2
    return picture[:, top : top + side, left : left + side]


class Inception:
    """Pictures -> fp32 [B, 2048]. weights: `inception-2015-12-05.pt` (TorchScript, clean-fid's) or torch-fidelity's
    `weights-inception-2015-12-05-6726825d.pth` (a state dict; its network takes 8 bits, so resizing rounds)."""

    def __init__(self, given: dict[str, str], device: torch.device, patch: bool):
        self.device, self.patch = device, patch
        self.resize = library("cleanfid.resize").make_resizer("PIL", False, "bicubic", (SIDE, SIDE))
        file = find_file("inception", given)
        self.scripted, self.net = _load(file, device)
        self.about = dict(weights=file.name, sha256=identity(file), view="centre crop" if patch else "resized",
                          network="clean-fid" if self.scripted else "torch-fidelity")  # fmt: skip

    def prepared(self, picture: Tensor) -> Tensor:
        """uint8 [3, H, W] -> fp32 [3, 299, 299] in [0, 255]."""
        if self.patch:
            return centre_patch(picture).float()
        return torch.from_numpy(self.resize(picture.permute(1, 2, 0).numpy())).permute(2, 0, 1)

    @torch.no_grad()
    def __call__(self, pictures: list[Tensor], prompts: list[str]) -> Tensor:
        x = torch.stack([self.prepared(p) for p in pictures]).to(self.device)
        if self.scripted:
            return self.net(x).float().cpu()
        return self.net(x.round().clamp(0, 255).to(torch.uint8))[0].float().cpu()


def _load(file: Path, device: torch.device) -> tuple[bool, Any]:
    """(whether it is clean-fid's TorchScript, network). Raises UserError for a file that is neither."""
    if file.suffix == ".pt":
        try:
            if file.name != "inception-2015-12-05.pt":
                raise UserError(f"{file}: clean-fid's file is called inception-2015-12-05.pt")
            return True, library("cleanfid.inception_torchscript").InceptionV3W(str(file.parent), False).to(device)
        except RuntimeError as error:
            raise UserError(f"{file} is no TorchScript file ({first_line(error)}): download it again") from None
    try:
        torch.load(file, map_location="cpu", weights_only=True)  # the library's own load would run what a pickle says
        cls = library("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        return False, cls("inception", ["2048"], feature_extractor_weights_path=str(file)).to(device)
    except UserError:
        raise
    except Exception as error:  # pickle's, zip's and load_state_dict's kinds
        raise UserError(f"{file} is no Inception of torch-fidelity: {first_line(error)}") from None
