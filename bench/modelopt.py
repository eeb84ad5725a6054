"""nvidia-modelopt's DMD2 on our networks, batches and laws, for `bench.step`: its own pipeline calls, its own order.

`pip install nvidia-modelopt==0.47.0`, in an environment of its own (it is Apache-2.0 and is only called). Backward
simulation, GAN off, no EMA, fused AdamW and clipping: as many generator and fake updates on both sides.
Its critic step makes the student's picture anew, and its guidance is two calls of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from senseflow.config import Config, UserError
from senseflow.data.batches import Batch
from senseflow.flow import FlowSchedule
from senseflow.steps import Parts, law_to_sigma

NEEDED = {
    "disc.kind": "none", "isg.weight": 0.0, "ida.lam": 1.0, "ida.mode": "fixed", "ema.decay": 0.0,
    "rollout.backward_prob": 1.0, "dmd.t_law": "uniform", "dmd.eps": 1e-6,
}  # fmt: skip
FLAGS = [word for name, value in NEEDED.items() for word in (f"--{name}", str(value))]


def check_fits(cfg: Config, parts: Parts, needed: dict[str, Any] = NEEDED, peer: str = "modelopt") -> None:
    """Raises UserError where ours does more than DMD2 without a GAN, which the peer's would not."""
    for name, value in needed.items():
        section, _, leaf = name.partition(".")
        if getattr(getattr(cfg, section), leaf) != value:
            raise UserError(f"{name} = {getattr(getattr(cfg, section), leaf)!r}: allowed is {value!r} beside {peer}")
    if cfg.dmd.guidance_min != cfg.dmd.guidance_max:
        raise UserError(f"dmd.guidance_min and dmd.guidance_max differ: allowed is one guidance beside {peer}")
    if not isinstance(parts.adapter.schedule, FlowSchedule) or parts.adapter.schedule.kind != "linear":
        raise UserError(f"model.family: allowed are flow teachers with a linear shift beside {peer}")


class ModeloptLoop:
    """Weights of `parts` trained by modelopt.torch.fastgen.DMDPipeline.

    Rollout lengths are ours always, so that both do the same work. In iterations below `told` noises and times are
    ours too: losses can be compared then. Raises UserError as check_fits, and where modelopt is not installed.
    """

    def __init__(self, cfg: Config, parts: Parts, told: int = 0):
        check_fits(cfg, parts)
        try:
            from modelopt.torch.fastgen import DMDPipeline  # type: ignore[import-not-found]
            from modelopt.torch.fastgen.config import (  # type: ignore[import-not-found]
                DMDConfig,
                SampleTimestepConfig,
            )
        except ImportError as error:
            raise UserError(f"form 'modelopt' needs nvidia-modelopt: {error}") from None
        self.cfg, self.parts, self.told, self.sigma = cfg, parts, told, torch.zeros(0)
        loop = self

        class Pipeline(DMDPipeline):  # type: ignore[misc, valid-type]
            """Calls our adapter, which packs and pads as the family needs; conditioning is a Condition."""

            def _call_model(
                self, model: Any, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Any = None, **_: Any
            ) -> Tensor:
                return parts.adapter.predict(model, hidden_states, timestep, encoder_hidden_states)

            def sample_timesteps(self, n: int, **how: Any) -> Tensor:
                return loop.sigma if len(loop.sigma) else super().sample_timesteps(n, **how)

        d = cfg.dmd
        times = SampleTimestepConfig(
            time_dist_type="shifted", min_t=0.001, max_t=0.999, shift=parts.adapter.schedule.shift,
            t_list=[*parts.anchors, 0.0],
        )  # fmt: skip
        guided = parts.adapter.uncond(1) is not None
        config = DMDConfig(
            pred_type="flow", fake_score_pred_type="flow", guidance_scale=d.guidance_min if guided else None,
            sample_t_cfg=times, student_sample_steps=len(parts.anchors), student_sample_type="sde",
            student_update_freq=cfg.train.gen_every, backward_simulation=True,
        )  # fmt: skip
        self.pipe = Pipeline(parts.student, parts.teacher, parts.fake, config)
        t = cfg.train
        self.optimizers = {
            name: torch.optim.AdamW(net.parameters(), lr, (t.beta1, t.beta2), t.eps, t.weight_decay, fused=True)
            for name, net, lr in (("student", parts.student, t.lr), ("fake", parts.fake, t.fake_lr))
        }

    @contextmanager
    def _with_our_draws(self, batch: Batch, iteration: int, last: str, sigma: Tensor) -> Iterator[Tensor]:
        """Inside: its rollout has our length, and below `told` its numbers are ours: randn_like gives the rollout's
        noises but its last, then the noise named `last`. Yields the last of the rollout."""
        d, shape = self.parts.draws, tuple(batch.latents.shape[1:])
        j = d.integer(iteration, len(self.parts.anchors))
        noises = [d.normal(iteration, batch.samples, f"rollout{i}", shape) for i in range(j + 1)]
        queue = iter([*noises[:-1], d.normal(iteration, batch.samples, last, shape)])
        with ExitStack() as stack:
            chosen = torch.tensor([j], device=batch.latents.device)
            stack.enter_context(patch.object(torch, "randint", lambda *_, **__: chosen))
            if iteration < self.told:
                stack.enter_context(patch.object(torch, "randn_like", lambda *_, **__: next(queue)))
                self.sigma = sigma
            yield noises[-1]
            self.sigma = torch.zeros(0)

    def _step(self, name: str, loss: Tensor) -> None:
        net = getattr(self.parts, name)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), self.cfg.train.clip)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)

    def iterate(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """A student update where ours has one, then a fake update. Returns the losses by our names."""
        cfg, p, losses = self.cfg, self.parts, {}
        ids, it = batch.samples, iteration
        x, cond = batch.latents, batch.cond
        if (iteration + 1) % cfg.train.gen_every == 0:
            u = p.draws.uniform(it, ids, "dmd.t")
            sigma = law_to_sigma(p, u, "uniform", cfg.dmd.t_min, cfg.dmd.t_max, cfg.dmd.t_shift)
            with self._with_our_draws(batch, it, "dmd.noise", sigma) as noise:
                found = self.pipe.compute_student_loss(
                    x, noise, cond, negative_encoder_hidden_states=p.adapter.uncond(len(x))
                )
            self._step("student", found["total"])
            losses["dmd"] = found["total"].detach()
        u = p.draws.uniform(it, ids, "fake.t")
        if cfg.fake.t_law == "uniform":
            sigma = law_to_sigma(p, u, "uniform", 0.0, 1.0, cfg.fake.t_shift)
        else:
            sigma = law_to_sigma(p, u, "logit-normal", cfg.fake.logit_mean, cfg.fake.logit_std, cfg.fake.t_shift)
        with self._with_our_draws(batch, it, "fake.noise", sigma) as noise:
            found = self.pipe.compute_fake_score_loss(x, noise, cond)
        self._step("fake", found["total"])
        losses["fake"] = found["total"].detach()
        return losses
