"""SD3, SD 3.5 and FLUX of diffusers on the fused operations: same modules, same weights, same results.

`fuse_mmdit` binds to every block a forward of _mmdit_blocks.py. Nothing else changes: the state dict, the optimizer's
parameters, gradient checkpointing, LoRA, ControlNet residuals, save_pretrained are the model's own.
diffusers is imported when a model is handed in, not before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import nn

from senseflow_kernels import attention as attentions
from senseflow_kernels._mmdit_blocks import flux_double_forward, flux_single_forward, joint_forward

EPS = 1e-6  # of every norm of these models, and the operations' default
Model = TypeVar("Model", bound=nn.Module)


class Kind(NamedTuple):
    """module, name: of the block's class; norms: its adaLNs and the multiple of D that their linears give."""

    module: str
    name: str
    forward: Callable[..., Any]
    norms: Mapping[str, int]


class Fused(NamedTuple):
    """What a fused block remembers. compiled: its compiled call, where `fuse_mmdit` made it; before: what was there."""

    attention: str | None
    compiled: Any = None
    before: Any = None

    def __reduce__(self) -> tuple[type[Fused], tuple[str | None]]:
        return Fused, (self.attention,)  # a copy of a module is not compiled, and compiled code cannot be pickled


_DOUBLE = {"norm1": 6, "norm1_context": 6}
# model class -> {its ModuleList: the blocks in it}
FAMILIES: dict[str, dict[str, Kind]] = {
    "SD3Transformer2DModel": {
        "transformer_blocks": Kind("diffusers.models.attention", "JointTransformerBlock", joint_forward, _DOUBLE)
    },
    "FluxTransformer2DModel": {
        "transformer_blocks": Kind(
            "diffusers.models.transformers.transformer_flux", "FluxTransformerBlock", flux_double_forward, _DOUBLE
        ),
        "single_transformer_blocks": Kind(
            "diffusers.models.transformers.transformer_flux", "FluxSingleTransformerBlock", flux_single_forward,
            {"norm": 3},
        ),
    },
}  # fmt: skip


# -- whether the model is what the forwards were written for -------------------------------------------------------


def _kinds(model: nn.Module) -> dict[str, Kind]:
    names = [cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("diffusers.")]
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise ValueError(f"fuse_mmdit knows diffusers' {' and '.join(FAMILIES)}, not {type(model).__name__}")
    return family


def _blocks(model: nn.Module) -> Iterator[tuple[str, Kind, nn.Module]]:
    for where, kind in _kinds(model).items():
        for i, block in enumerate(getattr(model, where)):
            yield f"{where}.{i}", kind, block


def _unknown(where: str, expected: str, found: object) -> ValueError:
    import diffusers

    return ValueError(
        f"fuse_mmdit does not know this diffusers ({diffusers.__version__}): {where} should be {expected}, is {found}"
    )


def _expect(where: str, expected: object, found: object) -> None:
    if expected != found:
        raise _unknown(where, repr(expected), repr(found))


def _check(where: str, kind: Kind, block: Any) -> None:
    """Raises ValueError, naming the part, unless all that the forward relies on is there and as expected."""
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(block).__mro__]  # FSDP2 puts a class in front
    if f"{kind.module}.{kind.name}" not in names:
        raise _unknown(where, f"{kind.module}.{kind.name}", names[0])
    _expect(f"forward's parameters of {kind.name}", _parameters(kind.forward), _parameters(type(block).forward))
    if "forward" in block.__dict__:
        raise ValueError(
            f"{where} has a forward of its own, as offload and cache hooks put there: fuse_mmdit goes first"
        )
    try:
        _check_parts(where, kind, block)
    except AttributeError as why:
        raise _unknown(where, "complete", f"without {why.name!r}") from why


def _check_parts(where: str, kind: Kind, block: Any) -> None:
    dim, joint = block.attn.to_q.in_features, kind.name == "JointTransformerBlock"
    norms = dict(kind.norms)
    if joint:
        norms["norm1"] = 9 if block.use_dual_attention else 6
        norms["norm1_context"] = 2 if block.context_pre_only else 6
    for name, chunks in norms.items():
        norm = getattr(block, name)
        _expect(f"{where}.{name}.linear.out_features", chunks * dim, norm.linear.out_features)
        _expect(f"{where}.{name}.emb", None, getattr(norm, "emb", None))
        _check_layer_norm(f"{where}.{name}.norm", norm.norm)
    if kind.forward is flux_single_forward:
        streams, needed = [("to_q", "to_k", "to_v", "norm_q", "norm_k")], ("act_mlp", "proj_mlp", "proj_out")
    else:
        streams = [("to_q", "to_k", "to_v", "norm_q", "norm_k")]
        streams += [("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")]
        needed = ("ff",) if joint and block.context_pre_only else ("ff", "ff_context")
        _check_layer_norm(f"{where}.norm2", block.norm2)
        if len(needed) == 2:
            _check_layer_norm(f"{where}.norm2_context", block.norm2_context)
            _ = block.attn.to_add_out
        _expect(f"{where}.attn.to_out's length", 2, len(block.attn.to_out))
    for name in needed:
        getattr(block, name)
    _check_attention(f"{where}.attn", block.attn, streams)
    if joint and block.use_dual_attention:
        _check_attention(f"{where}.attn2", block.attn2, streams[:1])
        _expect(f"{where}.attn2.to_out's length", 2, len(block.attn2.to_out))


def _check_attention(where: str, attn: Any, streams: list[tuple[str, ...]]) -> None:
    _ = attn.heads, attn.fused_projections, attn.processor
    for *projections, q_norm, k_norm in streams:
        for name in projections:
            getattr(attn, name)
        for name in (q_norm, k_norm):
            norm = getattr(attn, name)
            if norm is None:
                continue
            _expect(f"{where}.{name}'s class", "RMSNorm", type(norm).__name__)
            _expect(f"{where}.{name}'s eps and bias", (EPS, None), (norm.eps, getattr(norm, "bias", None)))
            if norm.weight is None:
                raise _unknown(f"{where}.{name}.weight", "a parameter", None)


def _check_layer_norm(where: str, norm: Any) -> None:
    affine = getattr(norm, "weight", None) is not None or getattr(norm, "bias", None) is not None
    _expect(f"{where}: class, eps, affine", ("LayerNorm", EPS, False), (type(norm).__name__, norm.eps, affine))


def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)


# -- public --------------------------------------------------------------------------------------------------------


def fuse_mmdit(model: Model, *, attention: str | None = None, compile: bool | str = False) -> Model:
    """Runs the blocks of diffusers' SD3Transformer2DModel or FluxTransformer2DModel on the fused operations; returns
    the model itself.

    attention: a backend's name for its blocks, see `joint_attention`; None: the process's choice. compile: every block
    with torch.compile(fullgraph=True); a string names the compiler's backend. A call with joint_attention_kwargs
    (IP-Adapter), another attention processor, feed-forward chunking or hooks on a block's norms or attention runs the
    block's own forward, said once. Fuse before hooks that replace a module's forward (offload). Again on a fused model:
    the new arguments hold. Raises ValueError, and leaves the model as it was, for a model or a diffusers whose classes,
    signatures or norms are not those known here, and for an unknown backend.
    """
    if attention is not None:
        attentions.known(attention)
    unfuse_mmdit(model)
    blocks = list(_blocks(model))
    for where, kind, block in blocks:
        _check(where, kind, block)
    for _, kind, block in blocks:
        before = block.__dict__.get("_compiled_call_impl")
        block.forward = partial(kind.forward, block)  # not a method: pickle would look for its name in the class
        if compile:
            block.compile(fullgraph=True, **({} if compile is True else {"backend": compile}))
        block._senseflow = Fused(attention, block._compiled_call_impl if compile else None, before)  # type: ignore[assignment]
    return model


def unfuse_mmdit(model: Model) -> Model:
    """Takes back what `fuse_mmdit` did; returns the model itself. A model that is not fused stays as it is.

    Raises ValueError where something else has replaced a block's forward since.
    """
    fused = [(where, kind, block) for where, kind, block in _blocks(model) if "_senseflow" in block.__dict__]
    for where, kind, block in fused:
        if getattr(block.__dict__.get("forward"), "func", None) is not kind.forward:
            raise ValueError(f"{where}.forward was replaced after fuse_mmdit: remove that hook first")
    for _, _, block in fused:
        mine = block.__dict__.pop("_senseflow")
        del block.__dict__["forward"]
        if mine.compiled is not None and block.__dict__.get("_compiled_call_impl") is mine.compiled:
            del block.__dict__["_compiled_call_impl"]
            if mine.before is not None:
                block.__dict__["_compiled_call_impl"] = mine.before
    return model
