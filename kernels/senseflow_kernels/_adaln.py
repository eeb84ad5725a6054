"""The kernels of modulate.py: one forward for every form, one backward, and the sum of its column partials.

A row of D columns lies in registers as PIECES pieces of CHUNK, so a D that is no power of two wastes part of the last
piece alone. All row tensors are read and written once; scale, shift and gate come from L1 after their first row.
"""

# Triton's tuples grow by +, not by a star; a checker reads kernels as plain Python.
# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from senseflow_kernels._launch import INTERPRET, blocks_of, jit, launch, power_of_2, rounded, tl

MAX_COLUMNS = 8192  # two pieces of 4096 in 16 warps; more would spill
# Programs of the backward, over all samples: two of 4 warps on each of an H100's 132 SMs. A number of the shape alone,
# not of the device: so are the order of sums and the bits. More would write more partials: 264 of D = 3072 are 6.5 MB
# of the 85 that dy, x and dx move at 4608 tokens.
PROGRAMS = 264
MIN_RUN = 4  # tokens a program of the backward takes at least
SUM_COLUMNS, SUM_SLOTS = 32, 64  # of the second stage: 128 bytes a row, partials read at a time


# -- kernels -------------------------------------------------------------------------------------------------------


@jit
def _row_mean(value, D: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, CHUNK] -> [ROWS, 1], exact for a constant row: 1 / D is no fp32 number."""
    return tl.div_rn(tl.sum(value, 1), tl.full([ROWS], D, tl.float32))[:, None]


@jit
def _forward_kernel(
    x_ptr, gates, branches, scales, shifts, x_new_ptr, ys, stats_ptr,
    x_strides, gate_strides, branch_strides, scale_strides, shift_strides, n, blocks, eps,
    BRANCHES: tl.constexpr, OUTPUTS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one sample: x_new, its LayerNorm modulated OUTPUTS times, and (mean, rstd) [B, 2, n].

    strides: (batch, token) of each tensor in units of UNIT elements, (batch,) of gate, scale and shift.
    """
    PIECES: tl.constexpr = (D + CHUNK - 1) // CHUNK
    b = (tl.program_id(0) // blocks).to(tl.int64)
    token = ((tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    row = x_ptr + (b * x_strides[0] + token * x_strides[1]) * UNIT
    values = ()
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(PIECES):
        at = i * CHUNK + column
        mask = (token < n) & (at < D)
        value = tl.load(row + at, mask, other=0.0).to(tl.float32)
        for j in tl.static_range(BRANCHES):
            branch_row = branches[j] + (b * branch_strides[2 * j] + token * branch_strides[2 * j + 1]) * UNIT
            gate = tl.load(gates[j] + b * gate_strides[j] * UNIT + at, at < D, other=0.0).to(tl.float32)
            value += gate * tl.load(branch_row + at, mask, other=0.0).to(tl.float32)
        if BRANCHES:
            stored = rounded(value, x_new_ptr.dtype.element_ty, EMULATE)
            tl.store(x_new_ptr + (b * n + token) * D + at, stored, mask)
            value = stored.to(tl.float32)  # the norm is of what is stored: the backward sees nothing else
        values = values + (value,)
        total += value
    if OUTPUTS:
        mean = _row_mean(total, D, ROWS)
        squares = tl.zeros([ROWS, CHUNK], tl.float32)
        for i in tl.static_range(PIECES):
            gap = tl.where(i * CHUNK + column < D, values[i] - mean, 0.0)
            squares += gap * gap
        spread = tl.sqrt_rn(_row_mean(squares, D, ROWS) + tl.cast(eps, tl.float32))
        rstd = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), spread)
        tl.store(stats_ptr + 2 * b * n + token, mean, token < n)
        tl.store(stats_ptr + (2 * b + 1) * n + token, rstd, token < n)
        for i in tl.static_range(PIECES):
            at = i * CHUNK + column
            xhat = (values[i] - mean) * rstd
            for j in tl.static_range(OUTPUTS):
                scale = tl.load(scales[j] + b * scale_strides[j] * UNIT + at, at < D, other=0.0).to(tl.float32)
                shift = tl.load(shifts[j] + b * shift_strides[j] * UNIT + at, at < D, other=0.0).to(tl.float32)
                y = rounded(xhat * (1.0 + scale) + shift, ys[j].dtype.element_ty, EMULATE)
                tl.store(ys[j] + (b * n + token) * D + at, y, (token < n) & (at < D))


@jit
def _backward_kernel(
    x_ptr, stats_ptr, scales, dys, dx_new_ptr, gates, branches, dx_ptr, dbranches, partial_ptr,
    x_strides, scale_strides, dy_strides, dx_new_strides, gate_strides, branch_strides, n, run, programs,
    BRANCHES: tl.constexpr, OUTPUTS: tl.constexpr, DX: tl.constexpr, DGATES: tl.constexpr,
    DMODULATION: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """`run` tokens of one sample, ROWS at a time: dx, each branch's gradient, and the column sums of these tokens.

    With xhat = (x - mean) rstd and w = sum_j dy_j (1 + scale_j):
        dx = rstd (w - mean(w) - xhat mean(w xhat)) + dx_new,  dbranch = gate dx
        dscale = sum dy xhat,  dshift = sum dy,  dgate = sum dx branch
    The sums go to partial [B, programs, KINDS, D] in fp32: dscale_0, dshift_0, dscale_1, ..., dgate_0, ...
    DX: whether dx is needed, stored or not.
    """
    PIECES: tl.constexpr = (D + CHUNK - 1) // CHUNK
    MODULATIONS: tl.constexpr = 2 * OUTPUTS if DMODULATION else 0
    GATES: tl.constexpr = BRANCHES if DGATES else 0
    b = (tl.program_id(0) // programs).to(tl.int64)
    start = (tl.program_id(0) % programs).to(tl.int64) * run
    end = tl.minimum(start + run, n)
    column = tl.arange(0, CHUNK)[None, :]
    dmodulation, dgate = (), ()
    for _ in tl.static_range(PIECES * MODULATIONS):
        dmodulation = dmodulation + (tl.zeros([CHUNK], tl.float32),)
    for _ in tl.static_range(PIECES * GATES):
        dgate = dgate + (tl.zeros([CHUNK], tl.float32),)
    while start < end:  # not range(): see score.py
        token = (start + tl.arange(0, ROWS))[:, None]
        # All loads come before the first reduction, whose barrier they could not pass.
        passed, read = (), ()
        for i in tl.static_range(PIECES):
            at = i * CHUNK + column
            mask = (token < end) & (at < D)
            if dx_new_ptr is not None:
                dx_new_row = dx_new_ptr + (b * dx_new_strides[0] + token * dx_new_strides[1]) * UNIT
                passed = passed + (tl.load(dx_new_row + at, mask, other=0.0),)
            for j in tl.static_range(GATES):
                branch_row = branches[j] + (b * branch_strides[2 * j] + token * branch_strides[2 * j + 1]) * UNIT
                read = read + (tl.load(branch_row + at, mask, other=0.0),)
        xhats, weights, sums = (), (), ()
        w_sum, w_xhat_sum = tl.zeros([ROWS, CHUNK], tl.float32), tl.zeros([ROWS, CHUNK], tl.float32)
        if OUTPUTS:
            x_row = x_ptr + (b * x_strides[0] + token * x_strides[1]) * UNIT
            mean = tl.load(stats_ptr + 2 * b * n + token, token < end, other=0.0)
            rstd = tl.load(stats_ptr + (2 * b + 1) * n + token, token < end, other=0.0)
            for i in tl.static_range(PIECES):
                at = i * CHUNK + column
                mask = (token < end) & (at < D)
                xhat = (tl.load(x_row + at, mask, other=0.0).to(tl.float32) - mean) * rstd
                w = tl.zeros([ROWS, CHUNK], tl.float32)
                for j in tl.static_range(OUTPUTS):
                    dy_row = dys[j] + (b * dy_strides[2 * j] + token * dy_strides[2 * j + 1]) * UNIT
                    dy = tl.load(dy_row + at, mask, other=0.0).to(tl.float32)
                    if DMODULATION:
                        sums = sums + (dmodulation[i * MODULATIONS + 2 * j] + tl.sum(dy * xhat, 0),)
                        sums = sums + (dmodulation[i * MODULATIONS + 2 * j + 1] + tl.sum(dy, 0),)
                    if DX:
                        scale = tl.load(scales[j] + b * scale_strides[j] * UNIT + at, at < D, other=0.0)
                        w += dy * (1.0 + scale.to(tl.float32))
                w_sum += w
                w_xhat_sum += w * xhat
                xhats, weights = xhats + (xhat,), weights + (w,)
        dmodulation, sums = sums, ()
        if DX:
            w_mean, w_xhat_mean = _row_mean(w_sum, D, ROWS), _row_mean(w_xhat_sum, D, ROWS)
            for i in tl.static_range(PIECES):
                at = i * CHUNK + column
                mask = (token < end) & (at < D)
                dx = tl.zeros([ROWS, CHUNK], tl.float32)
                if OUTPUTS:
                    dx = (weights[i] - w_mean - xhats[i] * w_xhat_mean) * rstd
                if dx_new_ptr is not None:
                    dx += passed[i].to(tl.float32)
                to = (b * n + token) * D + at
                if dx_ptr is not None:
                    tl.store(dx_ptr + to, rounded(dx, dx_ptr.dtype.element_ty, EMULATE), mask)
                for j in tl.static_range(BRANCHES):
                    if dbranches is not None:
                        gate = tl.load(gates[j] + b * gate_strides[j] * UNIT + at, at < D, other=0.0).to(tl.float32)
                        tl.store(dbranches[j] + to, rounded(gate * dx, dbranches[j].dtype.element_ty, EMULATE), mask)
                    if DGATES:
                        product = dx * read[i * GATES + j].to(tl.float32)
                        sums = sums + (dgate[i * GATES + j] + tl.sum(product, 0),)
            dgate = sums
        start += ROWS
    to = partial_ptr
    if MODULATIONS + GATES > 0:
        to += tl.program_id(0).to(tl.int64) * ((MODULATIONS + GATES) * D) + tl.arange(0, CHUNK)
    for i in tl.static_range(PIECES):
        keep = i * CHUNK + tl.arange(0, CHUNK) < D
        for k in tl.static_range(MODULATIONS):
            tl.store(to + k * D + i * CHUNK, dmodulation[i * MODULATIONS + k], keep)
        for k in tl.static_range(GATES):
            tl.store(to + (MODULATIONS + k) * D + i * CHUNK, dgate[i * GATES + k], keep)


@jit
def _sum_kernel(
    partial_ptr, outs, programs, D: tl.constexpr, KINDS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """outs[kind][b] = the sum of partial [B, programs, KINDS, D] over programs, rounded once, in the same order always.

    One program a sample, kind and COLUMNS columns.
    """
    BLOCKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    block, rest = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    kind, b = rest % KINDS, (rest // KINDS).to(tl.int64)
    column = (block * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    acc = tl.zeros([SLOTS, COLUMNS], tl.float32)
    first = tl.cast(0, tl.int32)
    while first < programs:
        slot = (first + tl.arange(0, SLOTS))[:, None]
        at = ((b * programs + slot) * KINDS + kind) * D + column
        acc += tl.load(partial_ptr + at, (slot < programs) & (column < D), other=0.0)
        first += SLOTS
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.sum(acc, 0)
    for k in tl.static_range(KINDS):
        if kind == k:
            tl.store(outs[k] + b * D + column, rounded(total, outs[k].dtype.element_ty, EMULATE), column < D)


# -- launchers -----------------------------------------------------------------------------------------------------


def chunk_of(columns: int) -> int:
    """Columns of a piece: at most three pieces, of 1024 or more where the row has as many, 8 elements a thread."""
    return max(16, min(power_of_2(columns), 1024), power_of_2(blocks_of(columns, 3)))


def warps_of(chunk: int) -> int:
    return max(1, chunk // 256)


def rows_of(chunk: int, two: bool) -> int:
    """Tokens a program has in registers at a time; two of a long row where that spills nothing, for bytes in flight."""
    return max(1, 1024 // chunk) * (2 if two and chunk <= 2048 else 1)


def run_of(batch: int, tokens: int, warps: int) -> int:
    """Tokens of one program of the backward."""
    programs = PROGRAMS * max(1, 4 // warps)
    return max(MIN_RUN, blocks_of(tokens, max(1, programs // batch)))


def _dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Each with contiguous columns, copied where they are not. None for no tensors."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors) or None


def _strides(*groups: tuple[Tensor, ...] | None) -> tuple[int, list[tuple[int, ...] | None]]:
    """(UNIT, strides of each group without the columns', in units of it): 8 keeps vectors of 8 for every D of 8's."""
    found = [None if g is None else tuple(s for t in g for s in t.stride()[:-1]) for g in groups]
    columns = {t.shape[-1] for g in groups if g for t in g}
    unit = 8 if all(s % 8 == 0 for s in (*columns, *(s for f in found if f for s in f))) else 1
    return unit, [None if f is None else tuple(s // unit for s in f) for f in found]


def forward(
    x: Tensor, gates: Sequence[Tensor], branches: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor],
    eps: float,
) -> list[Tensor]:  # fmt: skip
    """[x_new where there are branches] + ys, in x's dtype, + [fp32 stats [B, 2, N] where there are ys]."""
    batch, tokens, columns = x.shape
    x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device) if branches else None
    ys = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in scales)
    stats = torch.empty(batch, 2, tokens, dtype=torch.float32, device=x.device) if scales else None
    if x.numel():
        xs, gs, bs, cs, hs = (_dense(t) for t in ([x], gates, branches, scales, shifts))
        assert xs is not None
        unit, strides = _strides(xs, gs, bs, cs, hs)
        chunk = chunk_of(columns)
        rows = rows_of(chunk, two=bool(branches and scales))
        blocks = blocks_of(tokens, rows)
        launch(
            "modulate", _forward_kernel, (batch * blocks,),
            xs[0], gs, bs, cs, hs, x_new, ys or None, stats, *strides, tokens, blocks, eps,
            BRANCHES=len(branches), OUTPUTS=len(scales), D=columns, CHUNK=chunk, ROWS=rows, UNIT=unit,
            EMULATE=INTERPRET, num_warps=warps_of(chunk),
        )  # fmt: skip
    return [t for t in (x_new, *ys, stats) if t is not None]


def backward(
    x: Tensor | None, stats: Tensor | None, scales: Sequence[Tensor], dys: Sequence[Tensor], dx_new: Tensor | None,
    gates: Sequence[Tensor], branches: Sequence[Tensor], dtype: torch.dtype, branch_dtype: torch.dtype,
    need_x: bool, need_branches: bool, need_gates: bool, need_modulation: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx] + [dbranch, ...] + [dscale, dshift, ...] + [dgate, ...], each part where needed.

    x: what was normalised. dys: one for each of scales, x and stats None without them; dx_new: what reaches x_new, or
    None. dtype: x's. branches: needed with need_gates alone. Column sums are in the dtype of scale and gate.
    """
    like = dys[0] if dx_new is None else dx_new
    batch, tokens, columns = like.shape
    dx = torch.empty(like.shape, dtype=dtype, device=like.device) if need_x else None
    dbranches = tuple(torch.empty(like.shape, dtype=branch_dtype, device=like.device) for _ in gates if need_branches)
    sums = tuple(
        torch.empty(batch, columns, dtype=t.dtype, device=like.device)
        for t in (*(s for s in scales for _ in range(2) if need_modulation), *(g for g in gates if need_gates))
    )
    outs = [t for t in (dx, *dbranches, *sums) if t is not None]
    if not like.numel():
        return [t.zero_() for t in outs]
    xs, cs, ds, ns, gs = (_dense([t for t in g if t is not None]) for g in ([x], scales, dys, [dx_new], gates))
    bs = _dense(branches if need_gates else [])
    unit, strides = _strides(xs, cs, ds, ns, gs, bs)
    chunk = chunk_of(columns)
    rows = rows_of(chunk, two=len(scales) + len(gates) == 1)
    run = run_of(batch, tokens, warps_of(chunk))
    programs = blocks_of(tokens, run)
    partial = torch.empty(batch * programs * len(sums) * columns, dtype=torch.float32, device=like.device)
    launch(
        "modulate_backward", _backward_kernel, (batch * programs,),
        xs and xs[0], stats, cs, ds, ns and ns[0], gs, bs, dx, dbranches or None, partial if sums else None, *strides,
        tokens, run, programs,
        BRANCHES=len(gates), OUTPUTS=len(scales), DX=need_x or need_branches or need_gates, DGATES=need_gates,
        DMODULATION=need_modulation, D=columns, CHUNK=chunk, ROWS=rows, UNIT=unit, EMULATE=INTERPRET,
        num_warps=warps_of(chunk),
    )  # fmt: skip
    if sums:
        blocks = blocks_of(columns, SUM_COLUMNS)
        launch(
            "modulate_sums", _sum_kernel, (batch * len(sums) * blocks,), partial, sums, programs,
            D=columns, KINDS=len(sums), COLUMNS=SUM_COLUMNS, SLOTS=SUM_SLOTS, EMULATE=INTERPRET, num_warps=4,
        )  # fmt: skip
    return outs
