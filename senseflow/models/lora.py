"""LoRA trio on one shared base: student and fake are module trees of their own on the teacher's very tensors.

Effective weights of a target: teacher W; student W + s B_theta A; fake W + s B_phi A, with s = alpha / rank.
A [rank, in] has orthonormal rows, is frozen and shared by both; B [out, rank] alone trains, from zero. So

    lam (W + s B_phi A) + (1 - lam) (W + s B_theta A) = W + s (lam B_phi + (1 - lam) B_theta) A:

IDA (paper.md 1.3) on B is IDA on the effective weights, exactly. Were A trained too, the interpolation of two products
would have rank 2 `rank`, and cutting it back by an SVD would leave out its lower singular values; interpolating A and B
apart is no interpolation of weights at all. Neither is offered.

Three trees, not one that switches adapters: what a backward recomputes (activation checkpointing) would see whichever
adapter is on by then, and hooks, fused forwards and compiled blocks belong to a tree. No requires_grad is toggled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.config import Lora, UserError

NAME = "default"  # of the one adapter in each tree
ATTENTION = (
    "to_q", "to_k", "to_v", "to_out", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "to_qkv_mlp_proj",
)  # fmt: skip


def shared_copy(net: Any) -> Any:
    """A module tree of its own on net's buffers and frozen parameters, the very same tensors; what trains is copied."""
    kept = [*net.buffers(), *(p for p in net.parameters() if not p.requires_grad)]
    return copy.deepcopy(net, {id(t): t for t in kept})


def trainable(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, in the order of the tree: all of a full student, every B of a LoRA student."""
    return [p for p in net.parameters() if p.requires_grad]


def layers(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name in the tree, peft's layer) of every adapted Linear; none where there is no adapter."""
    for name, module in net.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def is_lora(net: nn.Module) -> bool:
    return next(layers(net), None) is not None


def lora_pair(adapter: Any, teacher: nn.Module, lora: Lora, seed: int) -> tuple[nn.Module, nn.Module]:
    """(student, fake) on the frozen teacher's tensors, equal to it at first: B = 0. In the teacher's dtype, A and B in
    fp32. An adapter with a `lora_base(teacher, guidance)` says what they stand on (FLUX).

    Raises UserError when peft is missing, lora.targets fits no layer, or lora.rank is above a layer's inputs.
    """
    pair = []
    for _ in range(2):
        make = getattr(adapter, "lora_base", None)
        net = make(teacher, lora.guidance) if make else shared_copy(teacher)
        _inject(net, target_names(net, adapter.blocks(net), lora.targets), lora)
        pair.append(net)
    student, fake = pair
    generator = torch.Generator().manual_seed(seed)
    for (name, mine), (_, other) in zip(layers(student), layers(fake), strict=True):
        shared = mine.lora_A[NAME].weight
        if lora.rank > mine.in_features:
            raise UserError(
                f"lora.rank = {lora.rank}: layer {name} has {mine.in_features} inputs, allowed is up to that"
            )
        if shared.is_meta:  # shapes alone
            other.lora_A[NAME].weight = shared.requires_grad_(False)
            continue
        rows = torch.linalg.qr(torch.randn(mine.in_features, lora.rank, generator=generator))[0].T
        with torch.no_grad():
            shared.copy_(rows)
        shared.requires_grad_(False)
        other.lora_A[NAME].weight = shared
    return student, fake


def target_names(net: nn.Module, blocks: list[nn.Module], targets: str) -> list[str]:
    """Names of the Linear layers of `blocks` that lora.targets means: `all` of them, those of `attention`, or those
    whose name ends in one of its words. Raises UserError for a word that fits none."""
    names = {id(m): name for name, m in net.named_modules()}
    linears = [names[id(m)] for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    if targets == "all":
        return linears
    words = ATTENTION if targets == "attention" else tuple(w.strip() for w in targets.split(",") if w.strip())
    found = {w: [n for n in linears if n == w or n.endswith("." + w)] for w in words}
    missing = [w for w in words if not found[w]]
    if not any(found.values()) or (missing and targets != "attention"):
        ends = sorted({n.rpartition(".")[2] if not n[-1].isdigit() else ".".join(n.split(".")[-2:]) for n in linears})
        raise UserError(
            f"lora.targets = {targets!r}: no Linear of the blocks ends in {', '.join(missing) or 'nothing'}; "
            f"allowed are all, attention, or names with commas between of {', '.join(ends)}"
        )
    wanted = {n for names in found.values() for n in names}
    return [n for n in linears if n in wanted]


def _inject(net: nn.Module, names: list[str], lora: Lora) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("model.variant = 'lora' needs the package peft: run pip install -e '.[train]'") from None
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names, lora_dropout=0.0)  # type: ignore[arg-type]
    inject_adapter_in_model(config, net, NAME)
    for _, layer in layers(net):
        layer.lora_A[NAME].float()
        layer.lora_B[NAME].float()


def student_from(adapter: Any, teacher: nn.Module, lora: Lora, state: Mapping[str, Tensor]) -> nn.Module:
    """The LoRA student that `trained_state` (a checkpoint's `updates.student`) describes, on a frozen teacher; `merged`
    makes a plain network of it. Raises RuntimeError for names or shapes of another rank or other targets."""
    student, _ = lora_pair(adapter, teacher, lora, 0)
    load_trained_state(student, state)
    return student


# -- what is saved -------------------------------------------------------------------------------------------------


def trained_state(net: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a network: everything, or of a LoRA network A and B, the live tensors."""
    state = net.state_dict()
    return {k: v for k, v in state.items() if ".lora_" in k} if is_lora(net) else state


def load_trained_state(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of `trained_state`, in place. Raises RuntimeError for names or shapes that are not this network's."""
    missing, unexpected = net.load_state_dict(state, strict=False)
    wrong = [*(k for k in missing if not is_lora(net) or ".lora_" in k), *unexpected]
    if wrong:
        raise RuntimeError(f"the saved weights are not this network's: {wrong[0]} and {len(wrong) - 1} more")


@torch.no_grad()
def lora_state_dict(student: nn.Module) -> dict[str, Tensor]:
    """The student's LoRA in diffusers' naming, fp32 on the CPU, for `pipe.load_lora_weights(dict or file)`:
    `transformer.NAME.lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank], for a U-Net `unet.NAME...`.

    alpha / rank lies in B, so that no alpha need be given. Raises UserError for a network without LoRA.
    """
    if not is_lora(student):
        raise UserError("this student has no LoRA: it was trained with model.variant = 'full'")
    prefix = "unet" if "UNet" in type(student).__name__ else "transformer"
    state = {}
    for name, layer in layers(student):
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight * layer.scaling[NAME]
        state[f"{prefix}.{name}.lora_A.weight"] = a.detach().float().cpu().contiguous()
        state[f"{prefix}.{name}.lora_B.weight"] = b.detach().float().cpu().contiguous()
    return state


@torch.no_grad()
def merged(student: nn.Module) -> Any:
    """A plain diffusers network with W + s B A for weights, fp32 on the CPU, a full copy: bf16 would round most of a
    small B A away. Raises UserError for a network without LoRA."""
    if not is_lora(student):
        raise UserError("this student has no LoRA: it was trained with model.variant = 'full'")
    memo: dict[int, Any] = {}
    for p in student.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("cpu", torch.float32, copy=True), requires_grad=False)
    for b in student.buffers():
        memo[id(b)] = b.detach().to("cpu", torch.float32 if b.is_floating_point() else b.dtype, copy=True)
    net = copy.deepcopy(student, memo)
    for name, layer in list(layers(net)):
        base = layer.base_layer
        base.weight += layer.scaling[NAME] * (layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight)
        net.set_submodule(name, base)
    net.__dict__.pop("peft_config", None)
    return net


def save_lora(student: nn.Module, file: Any) -> None:
    """Writes `lora_state_dict` as a safetensors file, beside the old one and then in its place."""
    import os

    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    save_file(lora_state_dict(student), partial, metadata={"format": "pt"})
    os.replace(partial, file)
