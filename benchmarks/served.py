"""The implementation in vLLM, in this process. It needs an environment that vLLM is installed in."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .models import export_once
from .peers import Scorer
from .workloads import Pair

# The other implementations are on the same device.
MEMORY_SHARE = 0.3


def export_for_vllm(folder: str) -> str:
    """Exports a checkpoint for vLLM, once, and returns the folder."""
    return export_once(folder, "vllm")


def load_vllm(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """vLLM's offline interface, which batches by itself, on this package's export for it."""
    # vLLM computes in this process, so that its memory counts and ends with it.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    target = export_for_vllm(folder)
    options: dict[str, Any] = {"gpu_memory_utilization": MEMORY_SHARE, "enable_prefix_caching": False}
    model = LLM(model=target, runner="pooling", dtype=dtype, max_model_len=max_length, **options)
    template = Path(target, "chat_template.jinja").read_text(encoding="utf-8")

    def score(pairs: Sequence[Pair], batch_size: int | None) -> np.ndarray:
        queries, passages = (list(texts) for texts in zip(*pairs, strict=True))
        outputs = model.score(
            queries,
            passages,
            chat_template=template,
            tokenization_kwargs={"truncate_prompt_tokens": max_length},
            use_tqdm=False,
        )
        return np.array([output.outputs.score for output in outputs], np.float32)

    return Scorer(None, score, "offline, defaults without prefix caching")
