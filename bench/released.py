"""The published order of one iteration (paper.md 2), written plainly: what `bench.step` measures ours against.

Ours is senseflow/steps.py and updates.py. Here every network is called where the published loop calls it: D's three
looks at a picture each bring the features of r with them (six backbone passes an iteration), D looks at the student's
picture on every iteration whether or not a gradient is wanted, the teacher's guidance is one batch of two, IDA and EMA
go parameter by parameter, losses and norms are read back every iteration. `Switches` turn its wastes off one by one.
Same adapter, caches, batch, draws and mathematics, so the losses agree to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from senseflow.algo.augment import AUGMENT_DRAWS, diff_augment
from senseflow.config import Config
from senseflow.data.batches import Batch
from senseflow.flow import add_noise, bcast, omega
from senseflow.steps import Parts, d_dtype, text_vector


@dataclass(frozen=True)
class Switches:
    """What the published loop spends; False is what ours does in its place."""

    own_features_of_r: bool = True  # r through the backbone for each look of D: 3 passes instead of 1
    look_always: bool = True  # D looks at x0 on critic iterations too, for nothing, and the fake's taps are made anew
    per_parameter: bool = True  # IDA and EMA as two kernels a tensor instead of one pass
    read_back: bool = True  # .item() of every loss and norm
    fused_adamw: bool = False  # torch.optim.AdamW(fused=True) instead of its foreach form
    batched_cfg: bool = True  # as published; False: two teacher calls, as FastGen's and modelopt's loops do
    encode_online: bool = False  # published: prompt, empty prompt and picture are encoded anew every iteration
    own_sample_for_d: bool = False  # modelopt: D's step makes the student's picture a second time
    fused_blocks: bool = False  # transformer blocks on the fused operations instead of diffusers' own forward
    kept_reference: bool = False  # r's features as the batch brings them, where it does: no pass at all


class ReleasedLoop:
    """Weights of `parts` (flow families with the VFM discriminator alone) trained in the published order."""

    def __init__(self, cfg: Config, parts: Parts, switches: Switches | None = None):
        if cfg.disc.kind != "vfm" or parts.adapter.parameterization != "flow":
            raise ValueError("the published loop is written here for flow teachers and disc.kind = 'vfm'")
        self.cfg, self.parts, self.switches = cfg, parts, switches or Switches()
        t, fused = cfg.train, self.switches.fused_adamw
        rates = dict(student=t.lr, fake=t.fake_lr, disc=t.disc_lr)
        self.nets: dict[str, Any] = dict(student=parts.student, fake=parts.fake, disc=parts.disc)
        self.optimizers = {
            name: torch.optim.AdamW(
                net.parameters(), rates[name], (t.beta1, t.beta2), t.eps, t.weight_decay, fused=fused, foreach=not fused
            )
            for name, net in self.nets.items()
        }
        self.ema = [p.detach().clone() for p in parts.student.parameters()] if cfg.ema.decay > 0 else []

    # -- networks --------------------------------------------------------------------------------------------------

    def _uniform(self, name: str, batch: Batch, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * self.parts.draws.uniform(self.iteration, batch.samples, name)

    def _normal(self, name: str, batch: Batch) -> Tensor:
        return self.parts.draws.normal(self.iteration, batch.samples, name, tuple(batch.latents.shape[1:]))

    def _call(self, net: Any, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        return self.parts.adapter.predict(net, x, sigma, batch.cond)

    def _teacher(self, x: Tensor, sigma: Tensor, batch: Batch, guidance: Tensor) -> Tensor:
        a, teacher = self.parts.adapter, self.parts.teacher
        empty = a.uncond(len(x))
        if empty is None:  # the teacher embeds its guidance
            return a.predict(teacher, x, sigma, batch.cond, guidance)
        if self.switches.batched_cfg:
            both = a.predict(teacher, torch.cat([x, x]), torch.cat([sigma, sigma]), empty.cat(batch.cond))
            without, with_text = both.chunk(2)
        else:
            with_text, without = a.predict(teacher, x, sigma, batch.cond), a.predict(teacher, x, sigma, empty)
        return without + bcast(guidance, x) * (with_text - without)

    def _features(self, pixels: Tensor, batch: Batch, stream: str | None) -> Any:
        if stream and self.cfg.disc.augment:
            rand = self.parts.draws.uniform(self.iteration, batch.samples, stream, (AUGMENT_DRAWS,))
            pixels = diff_augment(pixels, rand)
        vfm: Any = self.parts.vfm
        with d_dtype(self.cfg, pixels):
            return vfm.features(pixels, self.cfg.disc.taps, self.cfg.disc.size)

    def _logits(self, taps: Any, batch: Batch) -> Tensor:
        """D(x, c, r), all heads' logits side by side; r's features are made for this call, as in the published loop."""
        if self.switches.kept_reference and batch.reference is not None:
            self.r = batch.reference
        elif self.switches.own_features_of_r or self.r is None:
            with torch.no_grad():
                self.r = self._features(batch.pixels, batch, None)
        assert self.parts.disc is not None
        text = text_vector(self.parts.adapter, self.cfg.disc.text, batch.cond)
        with d_dtype(self.cfg, batch.latents):
            return torch.cat(self.parts.disc(taps, text, self.r), 1)

    # -- one iteration ---------------------------------------------------------------------------------------------

    def _student(self, batch: Batch, with_grad: bool) -> None:
        """Coin, rollout or forward noising, and the student's prediction at its anchor."""
        p, d, it = self.parts, self.parts.draws, self.iteration
        anchors = torch.tensor([*p.anchors, 0.0], device=batch.latents.device)
        if d.coin(it, self.cfg.rollout.backward_prob):
            j = d.integer(it, len(p.anchors))
            index = torch.full_like(batch.samples, j)
            x = self._normal("rollout0", batch)
            with torch.no_grad():
                for k in range(j):
                    sigma = anchors[k].expand(len(x))
                    x0 = x - bcast(sigma, x) * self._call(p.student, x, sigma, batch)
                    x = add_noise(x0, self._normal(f"rollout{k + 1}", batch), anchors[k + 1].expand(len(x)))
        else:
            index = (self._uniform("anchor", batch) * len(p.anchors)).long()
            x = add_noise(batch.latents, self._normal("forward", batch), anchors[index])
        self.sigma, self.sigma_prev, self.x_tau = anchors[index], anchors[index + 1], x
        with torch.set_grad_enabled(with_grad):
            self.pred = self._call(p.student, x, self.sigma, batch)
            self.x0 = x - bcast(self.sigma, x) * self.pred

    def _dmd(self, batch: Batch) -> Tensor:
        """The published form: a pseudo-target and half a mean squared error."""
        cfg, schedule = self.cfg.dmd, self.parts.adapter.schedule
        x = self.x0
        with torch.no_grad():
            u = self._uniform("dmd.t", batch, cfg.t_min, cfg.t_max)
            sigma = schedule.sigma(u).float() if cfg.t_shift else u
            guidance = self._uniform("dmd.guidance", batch, cfg.guidance_min, cfg.guidance_max)
            x_t = add_noise(x, self._normal("dmd.noise", batch), sigma)
            x0_fake = x_t - bcast(sigma, x) * self._call(self.parts.fake, x_t, sigma, batch)
            x0_real = x_t - bcast(sigma, x) * self._teacher(x_t, sigma, batch, guidance)
            normaliser = (x - x0_real).abs().mean(dim=[1, 2, 3], keepdim=True)
            target = x - torch.nan_to_num((x0_fake - x0_real) / normaliser)
        return 0.5 * torch.nn.functional.mse_loss(x.float(), target.float())

    def _isg(self, batch: Batch) -> Tensor:
        cfg, schedule = self.cfg.isg, self.parts.adapter.schedule
        x, sigma, prev = self.x_tau, self.sigma, self.sigma_prev
        with torch.no_grad():
            index = cfg.margin_space == "index"  # FLUX's trainer has the margin in sigma
            ends = (schedule.unshift(prev), schedule.unshift(sigma)) if index else (prev, sigma)
            low, high = ends[0] + cfg.margin / 1000, ends[1] - cfg.margin / 1000
            mid = low + (high - low) * self._uniform("isg.mid", batch)
            mid = schedule.sigma(mid) if index else mid
            guidance = self._uniform("isg.guidance", batch, cfg.guidance_min, cfg.guidance_max)
            x_mid = x + bcast(mid - sigma, x) * self._teacher(x, sigma, batch, guidance)
            x_tar = x_mid + bcast(prev - mid, x) * self._call(self.parts.student, x_mid, mid, batch)
        d = (x + bcast(prev - sigma, x) * self.pred - x_tar).float()
        return (torch.sqrt(d.square() + 1e-3**2) - 1e-3).mean()

    def _weighted(self, per_logit: Tensor) -> Tensor:
        weight = omega(self.sigma, self.cfg.disc.omega, self.parts.adapter.schedule)
        return (per_logit.float().mean(1) * weight).mean()

    def _step(self, name: str, losses: list[Tensor]) -> float:
        net, optimizer = self.nets[name], self.optimizers[name]
        for loss in losses:
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), self.cfg.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item() if self.switches.read_back else 0.0

    def _toggle(self, on: bool) -> None:
        for name in ("fake", "disc"):
            self.nets[name].requires_grad_(on)

    @torch.no_grad()
    def _follow(self, targets: Any, keep: float) -> None:
        theta = list(self.parts.student.parameters())
        if not self.switches.per_parameter:
            torch._foreach_lerp_([t.data for t in targets], [p.data for p in theta], 1 - keep)
            return
        for target, p in zip(targets, theta, strict=True):
            target.data.mul_(keep).add_(p.data, alpha=1 - keep)

    @torch.no_grad()
    def _encode(self, batch: Batch) -> None:
        """What the caches hold, once more: as many tokens as any prompt has, padded, and the picture's latents. The
        empty prompt for every picture: published at one a GPU."""
        a: Any = self.parts.adapter
        for _ in range(1 if a.uncond(1) is None else 2):
            a.encode_prompts([""] * len(batch.samples))
        if a.vae is not None:
            a.encode(batch.pixels, self._normal("posterior", batch))

    def _generator(self, batch: Batch) -> dict[str, Tensor]:
        cfg, losses = self.cfg, {}
        self._toggle(False)
        losses["dmd"] = self._dmd(batch)
        losses["isg"] = self._isg(batch)
        self.taps = self._features(self.parts.adapter.decode(self.x0), batch, "augment.fake")
        losses["adv"] = -self._weighted(self._logits(self.taps, batch))
        total = cfg.dmd.weight * losses["dmd"] + cfg.isg.weight * losses["isg"] + cfg.disc.weight * losses["adv"]
        self._step("student", [total])
        if cfg.ida.lam < 1:
            self._follow(list(self.parts.fake.parameters()), cfg.ida.lam)
        if self.ema:
            self._follow(self.ema, cfg.ema.decay)
        self._toggle(True)
        return losses

    def iterate(self, batch: Batch, iteration: int) -> dict[str, float]:
        """One iteration, k = iteration + 1. Returns its losses by our names."""
        self.iteration, self.r, self.taps = iteration, None, None
        is_gen = (iteration + 1) % self.cfg.train.gen_every == 0
        self._student(batch, is_gen)
        losses: dict[str, Tensor] = {}
        if self.switches.encode_online:
            self._encode(batch)
        if is_gen:
            losses = self._generator(batch)
        elif self.switches.look_always:
            with torch.no_grad():
                self._logits(self._features(self.parts.adapter.decode(self.x0), batch, "augment.fake"), batch)
        losses["fake"] = self._fake(batch)
        self._step("fake", [losses["fake"]])
        if self.switches.own_sample_for_d:
            self.taps, x0 = None, self.x0
            self._student(batch, False)
            assert is_gen or torch.equal(x0, self.x0)
        real, fake = self._hinge(batch)
        losses["disc"] = real + fake
        self._step("disc", [real, fake])
        self.parts.disc.update_spectral_norm()  # type: ignore[union-attr, operator]
        return {k: v.item() for k, v in losses.items()} if self.switches.read_back else {}

    def _fake(self, batch: Batch) -> Tensor:
        x0, noise = self.x0.detach(), self._normal("fake.noise", batch)
        u, schedule = self._uniform("fake.t", batch), self.parts.adapter.schedule
        if self.cfg.fake.t_law == "logit-normal":
            law = self.cfg.fake
            u = torch.sigmoid(law.logit_mean + law.logit_std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
        sigma = schedule.sigma(u).float() if self.cfg.fake.t_shift else u
        pred = self._call(self.parts.fake, add_noise(x0, noise, sigma), sigma, batch)
        return torch.nn.functional.mse_loss(pred.float(), (noise - x0).float())

    def _hinge(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(real term, fake term) of D's loss."""
        with torch.no_grad():
            real = self._features(batch.pixels, batch, "augment.real")
            keep = self.taps is not None and not self.switches.look_always
            fake = self.taps if keep else self._features(self.parts.adapter.decode(self.x0), batch, "augment.fake")
        assert fake is not None
        on_real = self._weighted(torch.relu(1 - self._logits(real, batch)))
        return on_real, self._weighted(torch.relu(1 + self._logits([t.detach() for t in fake], batch)))
