"""Whole transformers on a CPU, fused and not, in turns in one process: `python -m bench.fused_cpu [--out FILE]`.

Says whether `--kernels.fuse true` pays there, where torch runs both. The embedded teacher at batch 8; SD 3.5 Medium's
and FLUX's blocks at width 384, batch 2. One thread, fp32, medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from bench.harness import environment
from senseflow.models.embedded import EMBEDDED_FOLDER, load_transformer
from senseflow_kernels import fuse_mmdit

Case = tuple[nn.Module, dict[str, Any]]


def embedded() -> Case:
    inputs = dict(hidden_states=torch.randn(8, 3, 32, 32), encoder_hidden_states=torch.randn(8, 16, 384))
    return load_transformer(EMBEDDED_FOLDER), inputs | dict(
        pooled_projections=torch.randn(8, 384), timestep=1000 * torch.rand(8)
    )


def sd3() -> Case:
    net = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=64,
        num_attention_heads=6, joint_attention_dim=256, caption_projection_dim=384, pooled_projection_dim=64,
        pos_embed_max_size=32, qk_norm="rms_norm", dual_attention_layers=(0, 1),
    )  # fmt: skip
    inputs = dict(hidden_states=torch.randn(2, 16, 32, 32), encoder_hidden_states=torch.randn(2, 77, 256))
    return net, inputs | dict(pooled_projections=torch.randn(2, 64), timestep=1000 * torch.rand(2))


def flux() -> Case:
    net = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=6,
        joint_attention_dim=256, pooled_projection_dim=64, axes_dims_rope=(8, 28, 28),
    )  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3)
    inputs = dict(hidden_states=torch.randn(2, 256, 64), encoder_hidden_states=torch.randn(2, 64, 256))
    return net, inputs | dict(
        pooled_projections=torch.randn(2, 64), timestep=torch.rand(2), img_ids=places, txt_ids=torch.zeros(64, 3)
    )


def seconds(net: nn.Module, inputs: dict[str, Any], backward: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = net(**inputs, return_dict=False)[0]
    if backward:
        out.square().mean().backward()
    spent = time.perf_counter() - start
    net.zero_grad(set_to_none=True)
    return spent


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row a model and part: medians in ms, and all times in s, in the order in which they were measured."""
    rows = []
    for make in (embedded, sd3, flux):
        torch.manual_seed(0)
        own, inputs = make()
        forms = {"diffusers": own.requires_grad_(True), "fused": fuse_mmdit(copy.deepcopy(own))}
        for backward in (False, True):
            times: dict[str, list[float]] = {name: [] for name in forms}
            for _ in range(rounds + 2):  # the first two warm up
                for name, net in forms.items():
                    times[name].append(seconds(net, inputs, backward))
            plain, fused = (1e3 * median(t[2:]) for t in times.values())
            row = dict(model=make.__name__, part="fwd+bwd" if backward else "fwd", diffusers_ms=plain, fused_ms=fused)
            rows.append(row | dict(ratio=fused / plain, seconds=times))
            print(
                "{model} {part}: diffusers {diffusers_ms:.1f} ms, fused {fused_ms:.1f} ms, {ratio:.3f}".format(
                    **rows[-1]
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, metavar="FILE", help="appends this run, with the machine's load beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = measure(args.rounds)
    if args.out:
        command = " ".join(["python", "-m", "bench.fused_cpu", *sys.argv[1:]])
        run = environment() | dict(
            command=command, load_before=load, load_after=os.getloadavg()[0], rounds=args.rounds, rows=rows
        )
        runs = json.loads(args.out.read_text()) if args.out.exists() else []
        args.out.write_text(json.dumps([*runs, run], indent=1) + "\n")


if __name__ == "__main__":
    main()
