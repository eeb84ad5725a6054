"""FastGen's DMD2 on our networks, batches and laws, for `bench.step`: its own DMD2Model, schedule and optimizer calls.

A clone of github.com/NVlabs/FastGen on PYTHONPATH, in an environment of its own with what it imports (it is Apache-2.0
and is only called; commit 34f30e8). GAN off, no EMA, AdamW fused. Its student sees real pictures noised to an anchor,
never its own rollout. An iteration of FastGen updates the student or the fake: beside one of ours which updates both it
does two, so that updates are as many on both sides. Guidance is two calls of the teacher, the fake's step makes the
student's picture anew, times and noising go through fp64. Its trainer's callbacks are left out; clipping is torch's.
"""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.modelopt import NEEDED as MODELOPT
from bench.modelopt import check_fits
from senseflow.config import Config, UserError
from senseflow.data.batches import Batch
from senseflow.steps import Parts, law_to_sigma, student_input

NEEDED = MODELOPT | {"rollout.backward_prob": 0.0}
FLAGS = [word for name, value in NEEDED.items() for word in (f"--{name}", str(value))]
LAST_T = 0.999  # its rectified flow ends here: the student's first anchor on both sides
STUDENT, FAKE = 0, 1  # numbers of its iterations: of the student where it divides by student_update_freq


def _classes() -> tuple[Any, Any, Any]:
    """(DMD2Model, FastGenNetwork, ModelConfig). Raises UserError where FastGen is not to be imported."""
    try:
        from fastgen.configs.methods.config_dmd2 import ModelConfig  # type: ignore[import-not-found]
        from fastgen.methods import DMD2Model  # type: ignore[import-not-found]
        from fastgen.networks.network import FastGenNetwork  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(f"form 'fastgen' needs a clone of FastGen on PYTHONPATH: {error}") from None
    return DMD2Model, FastGenNetwork, ModelConfig


def commit() -> str:
    """Of the clone that is imported."""
    (folder,) = find_spec("fastgen").submodule_search_locations  # type: ignore[union-attr, misc]
    found = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


class FastGenLoop:
    """Weights of `parts` trained by fastgen.methods.DMD2Model.

    In iterations below `told` inputs, noises and times are ours: losses can be compared then. Raises UserError as
    check_fits, and where FastGen is not installed.
    """

    def __init__(self, cfg: Config, parts: Parts, told: int = 0):
        check_fits(cfg, parts, NEEDED, "FastGen")
        model, network, make_config = _classes()
        self.cfg, self.parts, self.told = cfg, parts, told
        self.given: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        loop = self

        class Net(network):  # type: ignore[misc, valid-type]
            """Calls our adapter, which packs and pads as the family needs; conditioning is a Condition."""

            def __init__(self, net: Any):
                super().__init__(net_pred_type="flow", schedule_type="rf")
                self.net = net

            def forward(self, x_t: Tensor, t: Tensor, condition: Any = None, fwd_pred_type: str | None = None) -> Any:
                flow = parts.adapter.predict(self.net, x_t, t.float(), condition)
                wanted = fwd_pred_type or self.net_pred_type
                return self.noise_scheduler.convert_model_output(
                    x_t, flow, t, src_pred_type=self.net_pred_type, target_pred_type=wanted
                )

        class Model(model):  # type: ignore[misc, valid-type]
            """On networks that are there already."""

            def build_model(self) -> None:
                self.net, self.teacher, self.fake_score = Net(parts.student), Net(parts.teacher), Net(parts.fake)

            def _generate_noise_and_time(self, real_data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
                return loop.given or super()._generate_noise_and_time(real_data)

        self.model = Model(self._config(make_config()))
        self.model.init_optimizers()

    def _config(self, config: Any) -> Any:
        """Its settings for our laws and rates: constant, which is what ours are in bench.step's few iterations."""
        cfg, parts, t = self.cfg, self.parts, self.cfg.train
        guided = parts.adapter.uncond(1) is not None
        device = next(parts.student.parameters()).device
        config.device, config.input_shape = device.type, list(parts.adapter.latent_shape)
        config.gan_loss_weight_gen = 0.0
        config.guidance_scale = cfg.dmd.guidance_min if guided else None
        config.student_update_freq, config.student_sample_steps = t.gen_every + 1, len(parts.anchors)
        times = config.sample_t_cfg
        times.time_dist_type, times.shift = "shifted", parts.adapter.schedule.shift  # type: ignore[union-attr]
        times.min_t, times.max_t, times.t_list = 0.001, LAST_T, [*(min(a, LAST_T) for a in parts.anchors), 0.0]
        for name, lr in (("net", t.lr), ("fake_score", t.fake_lr)):
            optimizer, schedule = getattr(config, f"{name}_optimizer"), getattr(config, f"{name}_scheduler")
            optimizer.lr, optimizer.betas, optimizer.eps = lr, (t.beta1, t.beta2), t.eps
            optimizer.weight_decay, optimizer.fused = t.weight_decay, True
            schedule.f_start = [1.0]
        return config

    def _told(self, batch: Batch, iteration: int, name: str, sigma: Tensor) -> None:
        """Our student input, and the time and noise of `name`, where this iteration is told them."""
        self.given = None
        if iteration < self.told:
            x, anchor, _ = student_input(self.parts, self.cfg, batch, iteration)
            noise = self.parts.draws.normal(iteration, batch.samples, f"{name}.noise", tuple(batch.latents.shape[1:]))
            self.given = x, anchor.double().clamp(0, LAST_T), sigma.double().clamp(0, LAST_T), noise

    def _step(self, data: dict[str, Any], kind: int, net: Any) -> Tensor:
        losses, _ = self.model.single_train_step(data, kind)
        losses["total_loss"].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), self.cfg.train.clip)
        self.model.optimizers_schedulers_step(kind)
        self.model.optimizers_zero_grad(kind)
        return losses["total_loss"].detach()

    def iterate(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """A student update where ours has one, then a fake update. Returns the losses by our names."""
        cfg, p, losses = self.cfg, self.parts, {}
        uncond = p.adapter.uncond(len(batch.samples))
        data = dict(real=batch.latents, condition=batch.cond, neg_condition=uncond)
        if (iteration + 1) % cfg.train.gen_every == 0:
            u = p.draws.uniform(iteration, batch.samples, "dmd.t")
            sigma = law_to_sigma(p, u, "uniform", cfg.dmd.t_min, cfg.dmd.t_max, cfg.dmd.t_shift)
            self._told(batch, iteration, "dmd", sigma)
            losses["dmd"] = self._step(data, STUDENT, p.student)
        u = p.draws.uniform(iteration, batch.samples, "fake.t")
        law, low, high = "logit-normal", cfg.fake.logit_mean, cfg.fake.logit_std
        if cfg.fake.t_law == "uniform":
            law, low, high = "uniform", 0.0, 1.0
        self._told(batch, iteration, "fake", law_to_sigma(p, u, law, low, high, cfg.fake.t_shift))
        losses["fake"] = self._step(data, FAKE, p.fake)
        return losses
