"""The vLLM layout, and the plugin with which vLLM serves checkpoints of type `llama_bidirec` without an export."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from .chat_template import VLLM_TEMPLATE_FILE, save_tokenizer
from .files import fold_temperature, llama_config, write_json

ARCHITECTURE = "LlamaBidirectionalForSequenceClassification"
# transformers would load this folder as a causal Llama that scores the last token. The name makes it stop with an error
# instead. From 5.0 on, it does not know an attention implementation of this name. Until 4.57, it overwrites the name of
# the attention, but it does not know a weight format of this name. vLLM reads neither.
ONLY_VLLM = "only_vllm_loads_this_folder"

USE = """
```bash
pip install vllm
vllm serve {shell_id} --runner pooling --dtype {dtype} --max-model-len {config.rerank_max_length} \\
  --chat-template {shell_id}/chat_template.jinja
```

```bash
curl localhost:8000/rerank -H 'Content-Type: application/json' -d '{{
  "model": {model_id},
  "query": "how do bees find their way?",
  "documents": ["Honey bees navigate by the position of the sun.", "The hive was painted white."],
  "truncate_prompt_tokens": {config.rerank_max_length}
}}'
```

The chat template holds the prompt. vLLM uses it only when `--chat-template` names the file; without it, vLLM scores a
different input. If the model is a repository on the Hub, download the file first and name the local copy.

Only vLLM loads this folder. Its `model_type` is `llama`, so transformers would score it with a causal mask. To prevent
that, it names an attention and a weight format that do not exist, so transformers stops with an error that
quotes `only_vllm_loads_this_folder`.
"""


def register() -> None:
    """
    Registers the model with vLLM, which calls this function in each of its processes (entry point
    `vllm.general_plugins`). Importing this package has already registered the configuration with transformers.
    """
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"llama_bidir.checkpoints.vllm_model:{ARCHITECTURE}")


def write(
    reranker: LlamaBidirectionalForSequenceClassification, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """
    Writes a reranker as vLLM's own bidirectional Llama. Scores are raw logits; the temperature is part of the head.

    Raises:
        ValueError: vLLM cannot serve the reranker, because it has several labels or a causal mask.
    """
    config = reranker.config
    if config.num_labels != 1:
        raise ValueError(f"vLLM serves a reranker of one label, and this one has {config.num_labels}")
    if config.is_causal:
        raise ValueError("vLLM serves a bidirectional Llama, and this one has is_causal set")
    reranker.score.weight.data = fold_temperature(reranker)
    reranker.save_pretrained(folder)
    for path in sorted(folder.glob("*.safetensors")):
        named = path.with_name(f".{path.name}")
        save_file(load_file(path), named, metadata={"format": ONLY_VLLM})
        named.replace(path)
    fields = llama_config(
        config,
        model_type="llama",
        architectures=[ARCHITECTURE],
        pooling=config.pooling,
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"},
        attn_implementation=ONLY_VLLM,
    )
    write_json(folder / "config.json", fields)
    save_tokenizer(tokenizer, folder, config)
    (folder / VLLM_TEMPLATE_FILE).replace(folder / "chat_template.jinja")
