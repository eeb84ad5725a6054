"""Trains the embedded teacher: flow matching on captioned emoji, from scratch or from the committed weights.

    python -m senseflow.pretrain --out runs/teacher --iterations 3000
    python -m senseflow.pretrain --out runs/teacher --iterations 6000       # goes on from the last checkpoint
    python -m senseflow.pretrain --out runs/teacher --init embedded         # starts from the committed weights

Loss (paper.md 1.2 with logit-normal t): E || v(x_t, t, c) - (eps - x0) ||^2, x_t = (1-sigma) x0 + sigma eps.
Captions are dropped with probability `--dropout` (their embedding becomes that of "") so that the teacher
can be guided. The weights that are written are the exponential moving average.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow import checkpoint
from senseflow.cli import status_of
from senseflow.data.batches import shuffled_index
from senseflow.data.emoji import load_variants, pick_variants, to_float
from senseflow.models.embedded import load_transformer, teacher_folder
from senseflow.models.text import embed_prompts

ARCHITECTURE: dict[str, Any] = dict(  # 6.2 M parameters: 64 image tokens of 4x4 pixels, 16 text tokens
    sample_size=32,
    patch_size=4,
    in_channels=3,
    out_channels=3,
    num_layers=5,
    attention_head_dim=32,
    num_attention_heads=6,
    joint_attention_dim=384,
    caption_projection_dim=192,
    pooled_projection_dim=384,
    pos_embed_max_size=8,
    qk_norm="rms_norm",
)


def learning_rate(iteration: int, total: int, peak: float, warmup: int, cooldown: float) -> float:
    """Warm-up, constant, then 1 - sqrt over the last `cooldown` share of the run."""
    if iteration < warmup:
        return peak * (iteration + 1) / warmup
    start = total * (1 - cooldown)
    if iteration <= start:
        return peak
    return peak * (1 - ((iteration - start) / (total - start)) ** 0.5)


def draw_batch(seed: int, iteration: int, batch: int, count: int, shape: tuple[int, ...]):
    """Every random number of one iteration, a function of (seed, iteration) alone: resume needs no RNG state.

    Returns image indices int64 [B] (each epoch is a permutation), sigma fp32 [B], noise fp32 [B, *shape],
    keep-caption uniforms fp32 [B].
    """
    index = shuffled_index(seed, iteration * batch, batch, count)
    generator = torch.Generator().manual_seed(seed * 7_368_787 + iteration)
    # Stratified t: one per 1/B-th of the unit interval, which halves the loss noise of plain draws.
    u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    sigma = torch.sigmoid(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
    noise = torch.randn(batch, *shape, generator=generator)
    return index, sigma, noise, torch.rand(batch, generator=generator)


def flow_matching_loss(net, x0: Tensor, noise: Tensor, sigma: Tensor, embeds, pooled) -> Tensor:
    """Mean squared velocity error, a scalar. x0 and noise fp32 [B, C, H, W], sigma fp32 [B]."""
    s = sigma.view(-1, 1, 1, 1)
    velocity = net(
        hidden_states=(1 - s) * x0 + s * noise,
        timestep=sigma * 1000,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return torch.nn.functional.mse_loss(velocity, noise - x0)


def save_teacher(net, ema: list[Tensor], folder: Path, record: dict) -> None:
    """Writes a diffusers folder (transformer/ and scheduler/) with the EMA weights in fp16, and the record."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    copy = SD3Transformer2DModel(**ARCHITECTURE)
    copy.load_state_dict(net.state_dict())
    for target, source in zip(copy.parameters(), ema, strict=True):
        target.data.copy_(source)
    copy.half().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def build(args: argparse.Namespace):
    """(network, optimizer, EMA tensors, iterations done): fresh, from a teacher folder, or from args.out.

    Raises UserError for a teacher folder that does not load.
    """
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(args.seed)
    if args.init:
        net: Any = load_transformer(teacher_folder(args.init))
    else:
        net = SD3Transformer2DModel(**ARCHITECTURE)
    net.train()
    decay = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), fused=True)
    ema = [p.detach().clone() for p in net.parameters()]
    done = 0
    if found := checkpoint.load_latest(args.out / "checkpoints"):
        done, state = found
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        for target, source in zip(ema, state["ema"], strict=True):
            target.copy_(source)
    return net, optimizer, ema, done


def train(args: argparse.Namespace) -> None:
    """The run: data, network, loop, checkpoints, and the teacher folder at the end and at every checkpoint."""
    data = load_variants()
    text = embed_prompts([*data.captions, ""])  # the last row is the empty prompt
    listing = hashlib.sha256("\n".join(data.captions).encode()).hexdigest()
    net, optimizer, ema, done = build(args)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(data)} images, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, "
          f"iterations {done} to {args.iterations}", flush=True)  # fmt: skip
    log = (args.out / "pretrain.jsonl").open("a")
    losses, started = [], time.monotonic()
    for it in range(done, args.iterations):
        index, sigma, noise, keep = draw_batch(args.seed, it, args.batch, len(data), tuple(data.images.shape[2:]))
        x0 = to_float(pick_variants(data.images, index, args.seed * 32_452_843 + it))
        captions = torch.where(keep < args.dropout, len(data), index)
        loss = flow_matching_loss(net, x0, noise, sigma, text.embeds[captions], text.pooled[captions])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        lr = learning_rate(it, args.iterations, args.lr, args.warmup, args.cooldown)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        beta = min(args.ema, (it + 1) / (it + 10))  # a short memory first, or the EMA keeps the random start
        torch._foreach_lerp_(ema, [p.detach() for p in net.parameters()], 1 - beta)
        losses.append(loss.detach())
        last = it + 1 == args.iterations
        if (it + 1) % 50 == 0 or last:
            row = dict(iteration=it + 1, loss=torch.stack(losses).mean().item(), lr=lr,
                       seconds=round(time.monotonic() - started, 1))  # fmt: skip
            losses.clear()
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
        if (it + 1) % args.checkpoint_every == 0 or last:
            state = dict(net=net.state_dict(), optimizer=optimizer.state_dict(), ema=ema)
            checkpoint.save(args.out / "checkpoints", it + 1, state, keep_last=2)
            record = dict(iterations=it + 1, images=len(data), captions_sha256=listing,
                          arguments={k: str(v) for k, v in vars(args).items()})  # fmt: skip
            save_teacher(net, ema, args.out / "teacher", record)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m senseflow.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/teacher"), help="run folder")
    parser.add_argument("--init", default="", help="teacher folder to start from, or 'embedded'")
    parser.add_argument("--iterations", type=int, default=3000, help="in all, earlier ones included")
    parser.add_argument("--batch", type=int, default=32, help="images an iteration")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="iterations")
    parser.add_argument("--cooldown", type=float, default=0.25, help="share of the run, at its end")
    parser.add_argument("--dropout", type=float, default=0.1, help="probability of an empty caption")
    parser.add_argument("--ema", type=float, default=0.998, help="decay an iteration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=200, help="iterations")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line. Bad input is one line on stderr and exit status 2."""
    args = arguments(argv)
    return status_of("pretrain", lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
