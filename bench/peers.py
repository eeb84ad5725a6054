"""What others run in place of our ops, in plain torch: same mathematics, same habits of dtype, written here from them.

Each is named after the project whose form it is. Left out everywhere: the networks, and the `.item()` of a norm that
DMD2 and the released SenseFlow log at every step (a host sync that no graph could hold).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# -- the DMD loss --------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """Inputs of one DMD loss. x, x_t, fake, cond, uncond: [B, C, H, W]; sigma, alpha: fp32 [B], alpha None for flow."""

    x: Tensor
    x_t: Tensor
    fake: Tensor
    cond: Tensor
    uncond: Tensor
    sigma: Tensor
    alpha: Tensor | None
    guidance: float

    def column(self, s: Tensor, dtype: torch.dtype) -> Tensor:
        return s.to(dtype).view(-1, 1, 1, 1)

    def x0(self, prediction: Tensor, dtype: torch.dtype) -> Tensor:
        """Prediction -> x0 with everything in that dtype."""
        x0 = self.x_t.to(dtype) - self.column(self.sigma, dtype) * prediction.to(dtype)
        return x0 if self.alpha is None else x0 / self.column(self.alpha, dtype)

    def from_uncond(self) -> Tensor:
        """Classifier-free guidance in the predictions' dtype."""
        return self.uncond + self.guidance * (self.cond - self.uncond)

    def from_cond(self) -> Tensor:
        return self.cond + (self.guidance - 1) * (self.cond - self.uncond)


DIMS = [1, 2, 3]


def score_inputs(
    shape: Sequence[int], dtype: torch.dtype, epsilon: bool, device: torch.device, guidance: float = 4.0
) -> Score:
    """Latents of variance 1, predictions that differ as trained networks' do. alpha = 1 - sigma, or sqrt(1 - sigma^2)
    with epsilon."""
    # Drawn on the CPU: a capture that fails may leave CUDA's random numbers unusable for the rest of the process.
    x, noise, *rest = (torch.randn(*shape).to(device) for _ in range(5))
    sigma = torch.linspace(0.3, 0.9, shape[0], device=device)
    alpha = (1 - sigma * sigma).sqrt() if epsilon else 1 - sigma
    column, a = sigma.view(-1, 1, 1, 1), alpha.view(-1, 1, 1, 1)
    exact = noise if epsilon else noise - x
    x_t, fake = a * x + column * noise, exact + 0.3 * rest[0]
    cond, uncond = exact + 0.2 * rest[1], exact + 0.2 * rest[2]
    x, x_t, fake, cond, uncond = (t.to(dtype) for t in (x, x_t, fake, cond, uncond))
    return Score(x, x_t, fake, cond, uncond, sigma, alpha if epsilon else None, guidance)


def dmd2(s: Score) -> Tensor:
    """DMD2: x0 in fp64, so the whole gradient; the pseudo-target is rounded to fp32 for the loss."""
    with torch.no_grad():
        p_real = s.x - s.x0(s.from_uncond(), torch.float64)
        p_fake = s.x - s.x0(s.fake, torch.float64)
        grad = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean(DIMS, keepdim=True))
    return 0.5 * F.mse_loss(s.x.float(), (s.x - grad).detach().float())


def senseflow(s: Score) -> Tensor:
    """The released SenseFlow: DMD2's form, x0 and the pseudo-target kept in the latents' dtype; for SDXL DMD2's."""
    if s.alpha is not None:
        return dmd2(s)
    with torch.no_grad():
        p_real = s.x - s.x0(s.from_uncond(), torch.float32).to(s.x.dtype)
        p_fake = s.x - s.x0(s.fake, torch.float32).to(s.x.dtype)
        grad = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean(DIMS, keepdim=True))
    return 0.5 * F.mse_loss(s.x.float(), (s.x - grad).detach().float())


def _fastgen_x0(s: Score) -> tuple[Tensor, Tensor]:
    """(teacher's, fake's): converted in fp64, kept in the latents' dtype; guidance added to the conditional x0."""
    real, negative, fake = (s.x0(p, torch.float64).to(s.x.dtype) for p in (s.cond, s.uncond, s.fake))
    return real + (s.guidance - 1) * (real - negative), fake


def fastgen(s: Score) -> Tensor:
    """FastGen: the weight in fp32 with 1e-6 added, pseudo-target and loss in the latents' dtype."""
    with torch.no_grad():
        real, fake = _fastgen_x0(s)
        weight = 1 / ((s.x.float() - real.float()).abs().mean(DIMS, keepdim=True) + 1e-6)
        target = s.x - (fake - real) * weight.to(s.x.dtype)
    return 0.5 * F.mse_loss(s.x, target)


def lightx2v(s: Score) -> Tensor:
    """LightX2V: the normaliser per sample, clamped; all of it in fp32."""
    with torch.no_grad():
        real, fake = s.x0(s.from_uncond(), torch.float32), s.x0(s.fake, torch.float32)
        norm = (s.x.float() - real).abs().mean(DIMS, keepdim=True).clamp_min(1e-6)
        target = s.x.float() - torch.nan_to_num((fake - real) / norm)
    return 0.5 * F.mse_loss(s.x.float(), target)


def rcm(s: Score) -> Tensor:
    """rcm: fp64 throughout, samples with a NaN set to 0 through an index; its sum over a sample made our mean."""
    with torch.no_grad():
        real, fake = s.x0(s.from_cond(), torch.float32), s.x0(s.fake, torch.float32)
        weight = (s.x.double() - real.double()).abs().mean(DIMS, keepdim=True).clip(min=1e-5)
    grad = (fake.double() - real.double()) / weight
    loss = (s.x.double() - (s.x.double() - grad).detach()) ** 2
    loss[loss.isnan().flatten(1).any(1)] = 0
    return 0.5 * loss.mean()


def plain_score(s: Score) -> Tensor:
    """The formula in fp32 without any detour, pseudo-target included: what torch.compile is given."""
    with torch.no_grad():
        uncond, cond, fake = s.uncond.float(), s.cond.float(), s.fake.float()
        real = s.x0(uncond + s.guidance * (cond - uncond), torch.float32)
        grad = (s.x0(fake, torch.float32) - real) / (s.x.float() - real).abs().mean(DIMS, keepdim=True)
        target = s.x.float() - torch.nan_to_num(grad)
    return 0.5 * F.mse_loss(s.x.float(), target)


def modelopt_score() -> Callable[[Score], Tensor]:
    """nvidia-modelopt's own loss on FastGen's x0. Raises ImportError where it is not installed."""
    from modelopt.torch.fastgen.losses import vsd_loss  # type: ignore[import-not-found]

    def loss(s: Score) -> Tensor:
        with torch.no_grad():
            real, fake = _fastgen_x0(s)
        return vsd_loss(s.x, real, fake)

    return loss


SCORE_FORMS: dict[str, Callable[[Score], Tensor]] = {
    "DMD2": dmd2, "SenseFlow": senseflow, "FastGen": fastgen, "LightX2V": lightx2v, "rcm": rcm
}  # fmt: skip


def score_tolerance(form: str, dtype: torch.dtype, ours: bool = False) -> float:
    """On the larger of loss error and 2-norm error of the gradient. Half an ulp (of dx) for ours, norms being means.

    Others, fp32: 2^-24 of x against a g of ~0.3 of x's size. Others, bf16: CFG alone rounds at 2^-9 of what is 4 times
    a difference; a pseudo-target or x0 in bf16 costs 2^-9 of x again, several times over.
    """
    if dtype == torch.float32:
        return 1e-6 if ours else 1e-5
    return 2**-9 if ours else 0.1


# -- hinge ---------------------------------------------------------------------------------------------------------


def hinge_d_senseflow(real: list[Tensor], fake: list[Tensor], weight: Tensor) -> Tensor:
    """The released SenseFlow: heads joined, two terms, each a mean per sample, weighted."""
    r, f = torch.cat([t.flatten(1) for t in real], 1), torch.cat([t.flatten(1) for t in fake], 1)
    return (F.relu(1 + -r).mean(1) * weight).mean() + (F.relu(1 + f).mean(1) * weight).mean()


def hinge_g_senseflow(fake: list[Tensor], weight: Tensor) -> Tensor:
    return ((-torch.cat([t.flatten(1) for t in fake], 1).mean(1)) * weight).mean()


def hinge_d_loop(real: list[Tensor], fake: list[Tensor], weight: Tensor) -> Tensor:
    """A loop over heads of equal size, as multi-head discriminators are usually written."""
    loss = torch.zeros((), device=weight.device)
    for r, f in zip(real, fake, strict=True):
        per_sample = F.relu(1 - r.float()).flatten(1).mean(1) + F.relu(1 + f.float()).flatten(1).mean(1)
        loss = loss + (weight * per_sample).mean()
    return loss / len(real)


def hinge_g_loop(fake: list[Tensor], weight: Tensor) -> Tensor:
    loss = torch.zeros((), device=weight.device)
    for f in fake:
        loss = loss - (weight * f.float().flatten(1).mean(1)).mean()
    return loss / len(fake)


def hinge_tolerance(dtype: torch.dtype, ours: bool = False) -> float:
    """Loss and 2-norm of the gradient. Ours rounds a gradient once; others take the mean in the heads' dtype."""
    if dtype == torch.float32:
        return 1e-6 if ours else 1e-5
    return 2**-9 if ours else 2**-6


# -- lerp ----------------------------------------------------------------------------------------------------------


def lerp_loop(phi: list[Tensor], theta: list[Tensor], lam: float) -> None:
    """FastGen, nvidia-modelopt: one lerp_ a tensor."""
    for p, t in zip(phi, theta, strict=True):
        p.lerp_(t.to(p.dtype), 1 - lam)


def mul_add_loop(phi: list[Tensor], theta: list[Tensor], lam: float) -> None:
    """The released SenseFlow, LightX2V: two operations a tensor."""
    for p, t in zip(phi, theta, strict=True):
        p.mul_(lam).add_(t.to(p.dtype), alpha=1 - lam)


def foreach_mul_add(phi: list[Tensor], theta: list[Tensor], lam: float) -> None:
    """rcm: two passes over all tensors."""
    torch._foreach_mul_(phi, lam)
    torch._foreach_add_(phi, theta, alpha=1 - lam)


def foreach_lerp(phi: list[Tensor], theta: list[Tensor], lam: float) -> None:
    """The best torch has; it takes one dtype, so another theta is cast first."""
    cast = [t.to(p.dtype) for p, t in zip(phi, theta, strict=True)]
    torch._foreach_lerp_(phi, cast, 1 - lam)


def apex_axpby() -> Callable[[list[Tensor], list[Tensor], float], None]:
    """NVIDIA apex; raises ImportError where it is not there. PyPI's `apex` is another project: amp_C is the mark."""
    import amp_C  # type: ignore[import-not-found]

    overflow: dict[Any, Tensor] = {}

    def run(phi: list[Tensor], theta: list[Tensor], lam: float) -> None:
        flag = overflow.setdefault(phi[0].device, torch.zeros(1, dtype=torch.int32, device=phi[0].device))
        amp_C.multi_tensor_axpby(65536, flag, [phi, theta, phi], lam, 1 - lam, -1)

    return run


LERP_FORMS: dict[str, Callable[[list[Tensor], list[Tensor], float], None]] = {
    "FastGen, modelopt: lerp_": lerp_loop, "SenseFlow, LightX2V: mul_+add_": mul_add_loop,
    "rcm: _foreach_mul_+add_": foreach_mul_add, "_foreach_lerp_": foreach_lerp,
}  # fmt: skip


# -- joint attention's q, k, v -------------------------------------------------------------------------------------


def _norm_sd3(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' RMSNorm: the variance in fp32, one rounding before the weight and one after."""
    x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    return (x.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else x) * weight


def _norm_flux(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def _rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """diffusers' apply_rotary_emb with sequence_dim=1."""
    cos, sin = (t[None, :, None] for t in rope)
    real, imag = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x.float() * cos + torch.stack([-imag, real], -1).flatten(3).float() * sin).to(x.dtype)


def diffusers_joint(
    streams: Sequence[Sequence[Any]], heads: int, rope: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, ...]:
    """diffusers' processors: norm of each stream, cat of q, k and v, RoPE. FLUX where there is a table, else SD3.

    streams: (q, k, v, q_weight, k_weight) each.
    """
    norm = _norm_sd3 if rope is None else _norm_flux
    split = [[t.unflatten(-1, (heads, -1)) for t in s[:3]] for s in streams]
    rows = [(norm(q, s[3]), norm(k, s[4]), v) for (q, k, v), s in zip(split, streams, strict=True)]
    q, k, v = (torch.cat(t, 1) if len(rows) > 1 else t[0] for t in zip(*rows, strict=True))
    return (q, k, v) if rope is None else (_rotated(q, rope), _rotated(k, rope), v)
