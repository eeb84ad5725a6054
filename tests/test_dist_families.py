"""Real families, tiny and random, on two ranks, sharded by FSDP2 or as LoRAs with DDP: one process's training, within
test_dist's bounds."""

import pytest
from plans import REAL, WRITE
from ranks import config, launch
from test_dist import compare, train_all

from senseflow.models.families import FUSED

SWITCHES = (
    "--model.checkpointing", "full", "--disc.checkpointing", "true", "--model.teacher_dtype", "fp8",
)  # fmt: skip
LORA = ("--model.variant", "lora", "--lora.rank", "4")


@pytest.mark.slow
@pytest.mark.parametrize("preset", REAL)
def test_two_ranks_train_what_one_process_does(preset, tmp_path):
    """Plain; recomputed, with an 8-bit teacher and the fused operations where there are MMDiT blocks; as a LoRA."""
    teacher = WRITE[preset](tmp_path / "teacher")
    fused = config(teacher, preset=preset).model.family in FUSED
    cases = {"fsdp": (), "switches": (*SWITCHES, "--kernels.fuse", str(fused).lower())}
    cases |= {"lora": LORA} if preset in ("flux-dev", "sdxl") else {}
    launch(2, train_all, teacher, tmp_path, cases, preset)
    compare(teacher, tmp_path, cases, preset=preset)
