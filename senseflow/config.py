"""Every setting of a run, typed, documented and checked. Only the standard library: it imports in milliseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from senseflow.section import Section, UserError, doc

__all__ = ["Config", "Section", "UserError"]

INF = math.inf


@dataclass(frozen=True)
class Model(Section):
    NAME = "model"
    RANGES = {"shift": (0, 100), "side": (16, 8192), "text_length": (0, 4096)}
    family: Literal["embedded", "sd35", "flux", "sdxl", "flux2"] = doc("teacher family", "embedded")
    teacher: str = doc("diffusers folder or hub id of the teacher; empty: the embedded one", "")
    side: int = doc("side of the images, pixels", 32)
    text_length: int = doc("T5 tokens of a prompt; 0: as the family's pipeline", 0)
    dtype: Literal["fp32", "bf16"] = doc("of frozen networks, and of the arithmetic in the trained ones", "fp32")
    decode: Literal["fp32", "bf16"] = doc("of the arithmetic in the VAE's decoder, whose pictures D sees", "fp32")
    shift: float = doc("schedule shift: factor (linear) or mu (exponential)", 3.0)
    shift_kind: Literal["linear", "exponential"] = doc("form of the shift", "linear")
    steps: Literal[1, 2, 4, 8] = doc("steps of the student", 4)
    anchors: Literal["exact", "released"] = doc("FLUX only: exact shift or released integers", "exact")
    variant: Literal["full", "lora"] = doc(
        "what trains: all weights of student and fake, or a LoRA of each on the teacher's own weights", "full"
    )
    teacher_dtype: Literal["model", "fp8"] = doc(
        "storage of the teacher's blocks: model.dtype, or float8 with a scale a channel, half of bf16's memory", "model"
    )  # fmt: skip
    checkpointing: Literal["none", "full", "selective"] = doc(
        "activations of student and fake that the backward makes again: none, all inside a block, or all but the "
        "results of matrix products and attention", "none"
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift_kind == "linear" and self.shift == 0:  # sigma = s u / (1 + (s - 1) u) would be 0 everywhere
            raise UserError("model.shift = 0: allowed is above 0 with model.shift_kind = 'linear'")
        if self.teacher_dtype == "fp8" and self.variant == "lora":  # student and fake stand on its tensors
            raise UserError("model.teacher_dtype = 'fp8': allowed is model with model.variant = 'lora'")


@dataclass(frozen=True)
class Lora(Section):
    NAME = "lora"
    RANGES = {"rank": (1, 4096), "alpha": (1e-3, 1e6), "guidance": (0, 100)}
    rank: int = doc("rank r of the LoRA of student and fake, with model.variant lora", 64)
    alpha: float = doc("its weight is alpha / rank", 64.0)
    targets: str = doc("its Linear layers, of the blocks: all, attention, or ends of names with commas between", "all")
    guidance: float = doc("FLUX only: guidance at which student and fake start, and at which the LoRA is called", 3.5)


@dataclass(frozen=True)
class Data(Section):
    NAME = "data"
    RANGES = {
        "batch": (1, 65536), "workers": (0, 256), "prefetch": (1, 64), "timeout": (1, 1e6), "min_aesthetic": (0, 10),
        "max_nsfw": (0, 1), "min_side": (0, 10**6), "max_aspect": (0, 1e6), "caption_min": (0, 10**6),
        "caption_max": (0, 10**6),
    }  # fmt: skip
    path: str = doc(
        "folder of pictures, .tar pattern or URL, img2dataset folder, JSON list, list of prompts, or a cache that "
        "senseflow.prepare made; empty: the embedded emoji", ""
    )  # fmt: skip
    images: Literal["pictures", "teacher"] = doc(
        "without data.path: the embedded pictures, or the teacher's own many-step samples of their captions",
        "pictures",
    )
    batch: int = doc("images an iteration, over all ranks", 32)
    workers: int = doc("threads that read and decode; 0: none, the loop does it and waits", 4)
    prefetch: int = doc("batches ready ahead", 2)
    timeout: float = doc("seconds without a batch that stop the run", 600.0)
    decoder: Literal["auto", "dali", "pil"] = doc("auto: DALI where it is installed and there is a GPU", "auto")
    crop: Literal["center", "random"] = doc("which part of a picture is used, at the target's aspect", "center")
    buckets: bool = doc("aspect buckets of about model.side^2 pixels, instead of squares", False)
    captions: str = doc("columns of the captions, commas between, one is drawn; empty: the usual names", "")
    caption_min: int = doc("shortest caption used, characters", 0)
    caption_max: int = doc("longest caption used, characters", 10**6)
    min_side: int = doc("smallest short side of a picture, pixels; 0: any", 0)
    max_aspect: float = doc("largest long side over short side; 0: any", 0.0)
    min_aesthetic: float = doc("lowest aesthetic score; 0: any", 0.0)
    max_nsfw: float = doc("highest NSFW score; 1: any", 1.0)
    aesthetic: str = doc("columns that may hold the aesthetic score", "aesthetic,aesthetic_score,AESTHETIC_SCORE")
    nsfw: str = doc("columns that may hold the NSFW score", "punsafe,nsfw,nsfw_score")


@dataclass(frozen=True)
class Train(Section):
    NAME = "train"
    RANGES = {
        "iterations": (1, 10**9), "minutes": (0, 1e6), "gen_every": (1, 1000), "lr": (0, 1), "fake_lr": (0, 1),
        "disc_lr": (0, 1), "beta1": (0, 0.999999), "beta2": (0, 0.999999), "eps": (0, 1), "weight_decay": (0, 10),
        "warmup": (0, 10**9), "cooldown": (0, 1), "cooldown_others": (0, 1), "clip": (0, INF),
        "fake_warmup": (0, 10**9), "checkpoint_every": (1, 10**9), "keep_last": (1, 10**6), "max_nonfinite": (1, 10**9),
        "threads": (0, 1024), "accumulate": (1, 65536), "keep_best": (0, 10**6),
    }  # fmt: skip
    iterations: int = doc("loop iterations; one in gen_every updates the student", 120)
    minutes: float = doc("stop after this wall time, minutes; 0: no limit", 0.0)
    gen_every: int = doc("TTUR f: iterations per student update", 5)
    lr: float = doc("learning rate of the student", 3.6e-5)
    fake_lr: float = doc("learning rate of the fake score", 4e-4)
    disc_lr: float = doc("learning rate of the discriminator", 2e-4)
    beta1: float = doc("AdamW beta1", 0.9)
    beta2: float = doc("AdamW beta2", 0.999)
    eps: float = doc("AdamW eps", 1e-8)
    weight_decay: float = doc("AdamW decoupled weight decay", 0.0)
    warmup: int = doc("linear learning-rate warm-up, iterations", 0)
    cooldown: float = doc("share of the iterations, at the end, in which the student's rate falls linearly to 0", 0.5)
    cooldown_others: float = doc("share of their rates that fake and discriminator have left then; 1: all of it", 0.1)
    clip: float = doc("gradient-norm limit of each network; 0: none", 1.0)
    accumulate: int = doc("parts that a rank's share of the batch is computed in; same updates, less memory", 1)
    precision: Literal["fp32", "split", "stochastic"] = doc(
        "storage of student and fake; split: bf16 and 16 bits beside it, so fp32; stochastic: bf16 rounded at random",
        "fp32",
    )  # fmt: skip
    moments: Literal["fp32", "bf16", "8bit"] = doc("storage of Adam's moments of student and fake", "fp32")
    fake_warmup: int = doc("iterations that train the fake alone, at the start", 0)
    checkpoint_every: int = doc("iterations between checkpoints", 100)
    keep_last: int = doc("checkpoints kept", 2)
    keep_best: int = doc("evaluations of the lowest KID whose checkpoints are made and kept too", 0)
    checkpoint_async: bool = doc("write checkpoints behind the training, from a copy in host memory", True)
    max_nonfinite: int = doc("non-finite updates in a row that stop the run", 20)
    threads: int = doc("CPU threads; 0: torch's default", 0)


@dataclass(frozen=True)
class Dist(Section):
    NAME = "dist"
    RANGES = {"shard": (0, 65536), "timeout": (1, 1e6), "stuck": (0, 1e6)}
    mode: Literal["auto", "fsdp", "ddp"] = doc(
        "several ranks: fsdp shards student, fake and teacher, ddp keeps them whole on each; auto: ddp for a LoRA, "
        "else fsdp", "auto"
    )  # fmt: skip
    shard: int = doc("ranks that share one copy, of a node for instance, others hold replicas (HSDP); 0: all", 0)
    timeout: float = doc("seconds after which ranks that wait for another give up", 1800.0)
    stuck: float = doc("seconds without progress after which a rank's stack is reported; 0: never", 600.0)


@dataclass(frozen=True)
class Optim(Section):
    NAME = "optim"
    name: Literal["senseflow", "torch", "torchao-8bit", "apex"] = doc(
        "AdamW: senseflow: IDA and EMA in its pass, any train.precision and train.moments; torch: fused; torchao-8bit: "
        "AdamW8bit; apex: NVIDIA's FusedAdam", "senseflow"
    )  # fmt: skip
    in_backward: bool = doc(
        "step on each weight of student and fake as its gradient appears, so that these never exist together; "
        "train.clip then goes by the last step's norm", False
    )  # fmt: skip
    host: bool = doc("keep moments and exact weights of student and fake in host memory, stepped on by the CPU", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_backward and self.host:
            raise UserError("optim.in_backward = True: allowed is false with optim.host = True")


@dataclass(frozen=True)
class Dmd(Section):
    NAME = "dmd"
    RANGES = {
        "weight": (0, INF), "t_min": (0, 1), "t_max": (0, 1), "guidance_min": (0, 100), "guidance_max": (0, 100),
        "eps": (0, 1),
    }  # fmt: skip
    weight: float = doc("weight of L_DMD", 1.0)
    t_law: Literal["uniform", "logit-normal"] = doc("law of t, before the shift", "uniform")
    t_shift: bool = doc("apply the schedule's shift to t", True)
    t_min: float = doc("lowest t of the uniform law, 0 to 1", 0.02)
    t_max: float = doc("highest t of the uniform law, 0 to 1", 0.98)
    guidance_min: float = doc("teacher guidance: U(min, max) per sample", 1.5)
    guidance_max: float = doc("teacher guidance: U(min, max) per sample", 1.5)
    normaliser: Literal["sample", "batch"] = doc("mean |x - x0_real| per sample or per batch", "sample")
    eps: float = doc("added to the normaliser", 0.0)


@dataclass(frozen=True)
class Fake(Section):
    NAME = "fake"
    RANGES = {"logit_mean": (-100, 100), "logit_std": (1e-6, 100)}
    t_law: Literal["uniform", "logit-normal"] = doc("law of t, before the shift", "uniform")
    t_shift: bool = doc("apply the schedule's shift to t", False)
    logit_mean: float = doc("mean of the logit-normal law", 0.0)
    logit_std: float = doc("deviation of the logit-normal law", 1.0)


@dataclass(frozen=True)
class Isg(Section):
    NAME = "isg"
    RANGES = {
        "weight": (0, INF), "margin": (0, 499), "guidance_min": (0, 100), "guidance_max": (0, 100),
    }  # fmt: skip
    weight: float = doc("lambda_ISG; 0: off", 1.0)
    loss: Literal["charbonnier", "l2"] = doc("as released, or the paper's Eq. 12", "charbonnier")
    midpoint: Literal["uniform", "adaptive"] = doc("law of t_mid; adaptive: by the teacher's xi(t)", "uniform")
    margin: float = doc("distance of t_mid from the segment's ends, thousandths", 50.0)
    margin_space: Literal["index", "sigma"] = doc(
        "of the margin and the uniform law: unshifted index or sigma", "index"
    )
    guidance_min: float = doc("teacher guidance: U(min, max) per sample", 1.5)
    guidance_max: float = doc("teacher guidance: U(min, max) per sample", 1.5)


@dataclass(frozen=True)
class Ida(Section):
    NAME = "ida"
    RANGES = {"lam": (0, 1)}
    lam: float = doc("phi <- lam phi + (1 - lam) theta; 1: off", 0.97)
    mode: Literal["fixed", "adaptive"] = doc("fixed lam, or by the measured gap", "fixed")


@dataclass(frozen=True)
class Disc(Section):
    NAME = "disc"
    RANGES = {
        "weight": (0, INF), "size": (14, 4096), "width": (0, 65536), "cmap": (1, 4096), "downsample": (0, 8),
        "d_weight": (0, INF), "taps": (-1, 39),
    }  # fmt: skip
    kind: Literal["vfm", "fake_features", "none"] = doc("discriminator", "vfm")
    backbone: str = doc("DINOv2 folder, file, hub id or timm name; empty: the embedded ViT-S", "")
    text: Literal["pooled", "clip-l"] = doc(
        "text vector D sees: the family's whole pooled one, or CLIP ViT-L/14's alone (SD 3.5, FLUX.1)", "pooled"
    )
    weight: float = doc("lambda_G, weight of the adversarial term", 0.1)
    omega: Literal["paper", "released-sd35", "released-sdxl", "one"] = doc("weight over t", "paper")
    omega_on_d: bool = doc("weigh D's own loss too (released), or not (paper's text)", True)
    taps: tuple[int, ...] = doc("backbone blocks; -1: patch embedding", (-1, 2, 5, 8))
    size: int = doc("side of the backbone's input, pixels", 56)
    width: int = doc("channels inside a head; 0: the backbone's", 64)
    cmap: int = doc("conditioning channels", 64)
    downsample: int = doc("stride-2 convolutions of a head", 1)
    augment: bool = doc("DiffAugment on x (never on r)", True)
    d_weight: float = doc("weight of DMD2's classifier loss", 0.01)
    moments: Literal["fp32", "8bit"] = doc("storage of Adam's moments of the heads", "fp32")
    checkpointing: bool = doc(
        "the generator's backward makes activations of the VAE's decoder and of the backbone again, layer by layer",
        False,
    )
    skip_silent: bool = doc(
        "leave out decode, backbone and D where omega is exactly 0 for every sample: same weights, bit for bit", True
    )
    keep_reference: bool = doc(
        "the backbone's features of the real pictures as the data have them: a cache of senseflow.prepare, or the "
        "embedded data, for which they are made once, at the start, where all take 256 MB or less and the run looks at "
        "each picture four times or more",
        True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.taps or len(set(self.taps)) < len(self.taps):
            raise UserError(f"disc.taps = {self.taps!r}: allowed is one or more different blocks, -1 to 39")


@dataclass(frozen=True)
class Rollout(Section):
    NAME = "rollout"
    RANGES = {"backward_prob": (0, 1)}
    backward_prob: float = doc("probability of backward simulation, else forward noising", 0.5)


@dataclass(frozen=True)
class Ema(Section):
    NAME = "ema"
    RANGES = {"decay": (0, 0.999999)}
    decay: float = doc("EMA of the student per student update; 0: off", 0.9)


@dataclass(frozen=True)
class Eval(Section):
    NAME = "eval"
    RANGES = {
        "every": (1, 10**9), "prompts": (0, 10**6), "grid": (1, 64), "teacher_steps": (1, 1000),
        "teacher_guidance": (0, 100), "teacher_shift": (0.01, 100),
    }  # fmt: skip
    every: int = doc("iterations between evaluations", 30)
    prompts: int = doc("prompts scored; 0: all of the data set", 0)
    grid: int = doc("columns of the picture grid", 16)
    teacher_steps: int = doc("Euler steps of the teacher's many-step samples", 50)
    teacher_guidance: float = doc("their guidance", 1.5)
    teacher_shift: float = doc("their shift", 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts == 1:  # a variance of one picture
            raise UserError("eval.prompts = 1: allowed is 0, all of them, or 2 or more")


@dataclass(frozen=True)
class Log(Section):
    NAME = "log"
    RANGES = {"every": (1, 10**6)}
    every: int = doc("iterations between drains of the metrics from the device", 10)
    tensorboard: bool = doc("write TensorBoard events", True)
    progress: bool = doc("show the progress bar", True)


@dataclass(frozen=True)
class Health(Section):
    NAME = "health"
    RANGES = {"rollbacks": (0, 1000), "slower": (1e-3, 1)}
    on_divergence: Literal["warn", "stop", "rollback"] = doc(
        "when a monitor says that the run diverges: say so, stop, or go back to the last checkpoint with lower rates",
        "warn",
    )
    rollbacks: int = doc("times a run goes back before it stops", 3)
    slower: float = doc("learning rates are multiplied by this each time", 0.5)


@dataclass(frozen=True)
class Memory(Section):
    NAME = "memory"
    RANGES = {"device_gb": (0, 1e5), "ranks": (0, 10**6), "reserve_gb": (0, 1e3)}
    device_gb: float = doc("of --dry-run: GB (1e9 bytes) of each GPU to plan for; 0: the device that is here", 0.0)
    ranks: int = doc("of --dry-run: GPUs that split weights and states, and the batch; 0: as many as there are", 0)
    reserve_gb: float = doc("of --dry-run: GB kept free for the context, libraries' workspaces and fragmentation", 3.0)


@dataclass(frozen=True)
class Kernels(Section):
    NAME = "kernels"
    strict: bool = doc("an unavailable kernel is an error, not another path", False)
    fuse: Literal["auto", "true", "false"] = doc(
        "MMDiT blocks of student, fake and teacher on the fused operations; auto: where their kernels run, and for the "
        "embedded teacher on a CPU, where they are fewer operators; SDXL's U-Net has no such blocks", "auto"
    )  # fmt: skip
    attention: Literal["auto", "fa3", "cudnn", "flash", "fa2", "xformers", "efficient", "math", "torch"] = doc(
        "attention backend of fused blocks; auto: SENSEFLOW_ATTENTION or the first of the published order that works",
        "auto",
    )
    compile: Literal["off", "blocks", "max"] = doc(
        "torch.compile of the transformer blocks, the backbone's and the VAE's decoder; max: kernels tuned for minutes",
        "off",
    )
    graphs: Literal["auto", "off", "on"] = doc(
        "iterations as CUDA graphs, from the second of a kind on; auto: small networks, on one GPU or by dist.mode ddp",
        "off",
    )


@dataclass(frozen=True)
class Config(Section):
    """A whole run."""

    RANGES = {"seed": (0, 2**31 - 1)}
    preset: str = doc("preset this config came from", "tiny")
    seed: int = doc("seed of every random number", 0)
    out: str = doc("run folder", "runs/tiny")
    model: Model = field(default_factory=Model)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    dist: Dist = field(default_factory=Dist)
    dmd: Dmd = field(default_factory=Dmd)
    fake: Fake = field(default_factory=Fake)
    isg: Isg = field(default_factory=Isg)
    ida: Ida = field(default_factory=Ida)
    disc: Disc = field(default_factory=Disc)
    rollout: Rollout = field(default_factory=Rollout)
    ema: Ema = field(default_factory=Ema)
    eval: Eval = field(default_factory=Eval)
    log: Log = field(default_factory=Log)
    health: Health = field(default_factory=Health)
    memory: Memory = field(default_factory=Memory)
    kernels: Kernels = field(default_factory=Kernels)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out:
            raise UserError("out = '': allowed is the name of a folder")
        for name, plain in (("train.precision", "fp32"), ("train.moments", "fp32"), ("disc.moments", "fp32"),
                            ("optim.in_backward", False), ("optim.host", False)):  # fmt: skip
            section, _, leaf = name.partition(".")
            value = getattr(getattr(self, section), leaf)
            if self.optim.name != "senseflow" and value != plain:
                allowed = str(plain).lower() if plain is False else plain
                raise UserError(f"{name} = {value!r}: allowed is {allowed} with optim.name = {self.optim.name!r}")
        if self.train.precision != "fp32" and self.model.dtype != "bf16":
            raise UserError(
                f"train.precision = {self.train.precision!r}: allowed is fp32 with model.dtype = {self.model.dtype!r}"
            )
