"""The layout of vLLM, and the plugin by which vLLM serves our own checkpoints."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat_template import VLLM_TEMPLATE_FILE, save_tokenizer
from .files import fold_temperature, llama_config, write_json

"""
What vLLM finds under its entry point `vllm.general_plugins`: with this package installed it serves checkpoints of type
`llama_bidirec` as they are.
"""

ARCHITECTURE = "LlamaBidirectionalForSequenceClassification"


def register() -> None:
    """Called by vLLM in each of its processes: transformers knows the configuration then, and vLLM the model."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"llama_bidir.checkpoints.vllm_model:{ARCHITECTURE}")


# vLLM builds no transformers model and does not read it. Whatever does would load the folder as a causal Llama that
# scores the last token: it finds no attention of this name, and stops.
ONLY_VLLM = "only_vllm_loads_this_folder"

USE = """
```bash
pip install vllm
vllm serve {model_id} --runner pooling --dtype {dtype} --max-model-len {config.rerank_max_length} \\
  --chat-template {model_id}/chat_template.jinja
```

```bash
curl localhost:8000/rerank -H 'Content-Type: application/json' -d '{{
  "model": "{model_id}",
  "query": "how do bees find their way?",
  "documents": ["Honey bees navigate by the position of the sun.", "The hive was painted white."],
  "truncate_prompt_tokens": {config.rerank_max_length}
}}'
```

The chat template is the prompt: without it the scores are of another input. Only vLLM loads this folder: its
`model_type` is `llama`, and transformers would score it with a causal mask. It stops instead, with an error about the
attention `only_vllm_loads_this_folder`.
"""


def write_vllm(reranker: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, model_id: str) -> str:
    """
    Writes a reranker as vLLM's own bidirectional Llama. Scores are raw logits; the temperature is part of the head.

    Args:
        reranker: a [`LlamaBidirectionalForSequenceClassification`].
        tokenizer: its tokenizer.
        folder: an empty folder.
        model_id: how the reranker will be found.

    Returns:
        what the model card says of its use.

    Raises:
        ValueError: vLLM cannot serve it: it has several labels or a causal mask.
    """
    config = reranker.config
    if config.num_labels != 1:
        raise ValueError(f"vLLM serves a reranker of one label, and this one has {config.num_labels}")
    if config.is_causal:
        raise ValueError("vLLM serves a bidirectional Llama, and this one has is_causal set")
    dtype = str(reranker.dtype).removeprefix("torch.")
    reranker.score.weight.data = fold_temperature(reranker)
    reranker.save_pretrained(folder)
    fields = llama_config(
        config,
        model_type="llama",
        architectures=["LlamaBidirectionalForSequenceClassification"],
        pooling=config.pooling,
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"},
        attn_implementation=ONLY_VLLM,
    )
    write_json(folder / "config.json", fields)
    save_tokenizer(tokenizer, folder, config)
    (folder / VLLM_TEMPLATE_FILE).replace(folder / "chat_template.jinja")
    return USE.format(model_id=model_id, config=config, dtype=dtype)
