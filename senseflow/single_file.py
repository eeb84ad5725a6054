"""A network's tensors under the names of its original release, which single-file readers know: the layouts of
Stability AI (SD 3.5), Black Forest Labs (FLUX) and LDM (SDXL).

Each layout is a table from original names to diffusers names; what stands together in one original tensor (the rows of
Q, K and V) is a list. Two kinds of tensors differ in more than name: diffusers swaps the halves (shift, scale) of every
continuous adaptive norm. A tensor that no row names, and a row that finds no tensor, are errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow.config import UserError

Row = tuple[str, Sequence[str], bool]  # original name, diffusers names stacked by rows, halves swapped
DIFFUSION_MODEL = "model.diffusion_model."  # the prefix of the network inside SAI's and LDM's checkpoints


def _both(original: str, *names: str, swapped: bool = False) -> list[Row]:
    """A layer's weight and bias."""
    return [(f"{original}.{p}", [f"{name}.{p}" for name in names], swapped) for p in ("weight", "bias")]


def _qkv(attention: str, added: bool = False) -> list[str]:
    return [f"{attention}.{n}" for n in (("add_q_proj", "add_k_proj", "add_v_proj") if added else
                                         ("to_q", "to_k", "to_v"))]  # fmt: skip


def _count(names: Sequence[str], stem: str) -> int:
    """How many numbered parts `stem.N.` there are."""
    found = [re.match(rf"{re.escape(stem)}\.(\d+)\.", name) for name in names]
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def sd3_rows(names: Sequence[str]) -> list[Row]:
    """SD 3 and 3.5: `joint_blocks`, the text side called context."""
    rows: list[Row] = [("pos_embed", ["pos_embed.pos_embed"], False)]
    rows += _both("x_embedder.proj", "pos_embed.proj") + _both("context_embedder", "context_embedder")
    for original, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        for old, new in (("0", "linear_1"), ("2", "linear_2")):
            rows += _both(f"{original}.mlp.{old}", f"time_text_embed.{ours}.{new}")
    depth = _count(names, "transformer_blocks")
    for i in range(depth):
        block, last = f"transformer_blocks.{i}", i == depth - 1
        for side, added, norm, ff in (
            ("x_block", "", "norm1", "ff"),
            ("context_block", "added_", "norm1_context", "ff_context"),
        ):
            here, text = f"joint_blocks.{i}.{side}", side == "context_block"
            rows += _both(f"{here}.attn.qkv", *_qkv(f"{block}.attn", text))
            rows += [(f"{here}.attn.ln_{x}.weight", [f"{block}.attn.norm_{added}{x}.weight"], False) for x in "qk"]
            # The last block ends the text side: its norm is a continuous one, and nothing follows.
            rows += _both(f"{here}.adaLN_modulation.1", f"{block}.{norm}.linear", swapped=text and last)
            if not (text and last):
                rows += _both(f"{here}.attn.proj", f"{block}.attn." + ("to_add_out" if text else "to_out.0"))
                rows += _both(f"{here}.mlp.fc1", f"{block}.{ff}.net.0.proj")
                rows += _both(f"{here}.mlp.fc2", f"{block}.{ff}.net.2")
        if any(name.startswith(f"{block}.attn2.") for name in names):
            here = f"joint_blocks.{i}.x_block.attn2"
            rows += _both(f"{here}.qkv", *_qkv(f"{block}.attn2")) + _both(f"{here}.proj", f"{block}.attn2.to_out.0")
            rows += [(f"{here}.ln_{x}.weight", [f"{block}.attn2.norm_{x}.weight"], False) for x in "qk"]
    rows += _both("final_layer.linear", "proj_out")
    rows += _both("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    if not any(".norm_q." in name for name in names):  # SD 3 Medium has no norms of Q and K
        rows = [row for row in rows if ".ln_" not in row[0]]
    return rows


def flux_rows(names: Sequence[str]) -> list[Row]:
    """FLUX.1: `double_blocks` and `single_blocks`, image and text called img and txt."""
    rows = _both("img_in", "x_embedder") + _both("txt_in", "context_embedder")
    embedders = [("time_in", "timestep_embedder"), ("vector_in", "text_embedder")]
    if any(".guidance_embedder." in name for name in names):  # a student has none
        embedders.append(("guidance_in", "guidance_embedder"))
    for original, ours in embedders:
        for old, new in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
            rows += _both(f"{original}.{old}", f"time_text_embed.{ours}.{new}")
    for i in range(_count(names, "transformer_blocks")):
        block, here = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for side, added, norm, ff, out in (("img", "", "norm1", "ff", "to_out.0"),
                                           ("txt", "added_", "norm1_context", "ff_context", "to_add_out")):  # fmt: skip
            rows += _both(f"{here}.{side}_mod.lin", f"{block}.{norm}.linear")
            rows += _both(f"{here}.{side}_attn.qkv", *_qkv(f"{block}.attn", side == "txt"))
            rows += _both(f"{here}.{side}_attn.proj", f"{block}.attn.{out}")
            rows += [_flux_norm(f"{here}.{side}_attn.norm", f"{block}.attn.norm_{added}", x) for x in ("query", "key")]
            rows += _both(f"{here}.{side}_mlp.0", f"{block}.{ff}.net.0.proj")
            rows += _both(f"{here}.{side}_mlp.2", f"{block}.{ff}.net.2")
    for i in range(_count(names, "single_transformer_blocks")):
        block, here = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        rows += _both(f"{here}.modulation.lin", f"{block}.norm.linear")
        rows += _both(f"{here}.linear1", *_qkv(f"{block}.attn"), f"{block}.proj_mlp")
        rows += _both(f"{here}.linear2", f"{block}.proj_out")
        rows += [_flux_norm(f"{here}.norm", f"{block}.attn.norm_", x) for x in ("query", "key")]
    rows += _both("final_layer.linear", "proj_out")
    rows += _both("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    return rows


def flux2_rows(names: Sequence[str]) -> list[Row]:
    """FLUX.2 [klein]: no biases, one modulation for all blocks, Q, K, V and feed-forward of a single block in one."""

    def weight(original: str, *ours: str, swapped: bool = False) -> Row:
        return f"{original}.weight", [f"{name}.weight" for name in ours], swapped

    rows = [
        weight("img_in", "x_embedder"),
        weight("txt_in", "context_embedder"),
        weight("final_layer.linear", "proj_out"),
    ]
    rows.append(weight("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True))
    for old, new in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
        rows.append(weight(f"time_in.{old}", f"time_guidance_embed.timestep_embedder.{new}"))
    for which in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        rows.append(weight(f"{which}.lin", f"{which}.linear"))
    for i in range(_count(names, "transformer_blocks")):
        block, here = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for side, added, ff, out in (("img", "", "ff", "to_out.0"), ("txt", "added_", "ff_context", "to_add_out")):
            rows.append(weight(f"{here}.{side}_attn.qkv", *_qkv(f"{block}.attn", side == "txt")))
            rows.append(weight(f"{here}.{side}_attn.proj", f"{block}.attn.{out}"))
            rows += [_flux_norm(f"{here}.{side}_attn.norm", f"{block}.attn.norm_{added}", x) for x in ("query", "key")]
            rows.append(weight(f"{here}.{side}_mlp.0", f"{block}.{ff}.linear_in"))
            rows.append(weight(f"{here}.{side}_mlp.2", f"{block}.{ff}.linear_out"))
    for i in range(_count(names, "single_transformer_blocks")):
        block, here = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        rows += [weight(f"{here}.linear1", f"{block}.to_qkv_mlp_proj"), weight(f"{here}.linear2", f"{block}.to_out")]
        rows += [_flux_norm(f"{here}.norm", f"{block}.norm_", x) for x in ("query", "key")]
    return rows


def _flux_norm(original: str, ours: str, which: str) -> Row:
    return f"{original}.{which}_norm.scale", [f"{ours}{which[0]}.weight"], False


# Inside an LDM residual block; the attention blocks have the same names in both.
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
OUTSIDE = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
           "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
           "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip


def sdxl_rows(names: Sequence[str]) -> list[Row]:
    """SDXL: LDM's flat list of input, middle and output blocks. A level has one more output block than input blocks
    besides its resampling, so the numbers follow from the levels' lengths."""
    down = [_count(names, f"down_blocks.{level}.resnets") for level in range(_count(names, "down_blocks"))]
    up = [_count(names, f"up_blocks.{level}.resnets") for level in range(_count(names, "up_blocks"))]

    def place(level: int, kind: str, k: int, lengths: Sequence[int], start: int) -> str:
        """Number of the flat block, and of the part in it, of resnet or attention k of a level."""
        per_level = [n + (start > 0) for n in lengths]  # input blocks count the downsampler as one of their own
        flat = start + sum(per_level[:level]) + (k if kind != "downsamplers" else lengths[level])
        return f"{flat}.{1 if kind == 'attentions' else 0}"

    def original(name: str) -> str:
        for ours, old in OUTSIDE.items():
            if name.rpartition(".")[0] == ours:
                return f"{old}.{name.rpartition('.')[2]}"
        if m := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            return f"middle_block.{2 * int(m[2]) + (m[1] == 'attentions')}.{_inside(m[1], m[3])}"
        if m := re.fullmatch(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
        ):
            side, level, kind, k, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
            if kind == "upsamplers":  # the last part of the level's last block
                flat = sum(up[: level + 1]) - 1
                part = 1 + any(n.startswith(f"up_blocks.{level}.attentions.") for n in names)
                return f"output_blocks.{flat}.{part}.{rest}"
            if side == "down":
                return f"input_blocks.{place(level, kind, k, down, 1)}.{_inside(kind, rest)}"
            return f"output_blocks.{place(level, kind, k, up, 0)}.{_inside(kind, rest)}"
        raise UserError(f"{name}: no tensor of an SDXL U-Net, the LDM layout has no place for it")

    return [(original(name), [name], False) for name in names]


def _inside(kind: str, rest: str) -> str:
    """The name inside a block."""
    if kind == "resnets":
        layer, _, part = rest.rpartition(".")
        return f"{RESNET[layer]}.{part}"
    return rest.replace("conv.", "op.") if kind == "downsamplers" else rest


# Family -> its table, and the prefix that its published single files carry.
LAYOUTS: dict[str, tuple[Callable[[Sequence[str]], list[Row]], str]] = {
    "sd35": (sd3_rows, DIFFUSION_MODEL), "flux": (flux_rows, ""), "sdxl": (sdxl_rows, DIFFUSION_MODEL),
    "flux2": (flux2_rows, ""),
}  # fmt: skip


def original_names(family: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers state dict under the family's original names; `state` is empty then, so that no second copy of a
    network is in memory. Values are the same, stacked where the original has one tensor.

    Raises UserError for a family without a layout, a tensor without a place, and a place without a tensor.
    """
    if family not in LAYOUTS:
        raise UserError(f"family {family!r} has no single-file layout: allowed are {', '.join(LAYOUTS)}")
    table, prefix = LAYOUTS[family]
    rows = table(list(state))
    used = [name for _, names, _ in rows for name in names]
    for what, odd in (("no place for", set(state) - set(used)), ("a place without tensor:", set(used) - set(state))):
        if odd:
            raise UserError(f"the single-file layout of {family!r} has {what} {min(odd)} ({len(odd)} in all)")
    assert len(used) == len(set(used))
    result = {}
    for original, names, swapped in rows:
        parts = [state.pop(name) for name in names]
        if swapped:
            parts = list(reversed(parts[0].chunk(2)))
        result[prefix + original] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return result


def save_single_file(file: Path, family: str, state: dict[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes the network alone, under its original names, and empties `state`; about: goes into the header as JSON."""
    from safetensors.torch import save_file

    tensors = {name: t.contiguous() for name, t in original_names(family, state).items()}
    save_file(tensors, file, metadata={"format": "pt", "senseflow": json.dumps(about)})
