"""A folder that `sentence_transformers.CrossEncoder` loads: a Llama without its causal mask, pooling, and a head."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedTokenizerBase

from ..chat_template import make_chat_template, save_tokenizer
from ..sentence_transformers_layout import DENSE, MODULES, POOLING, POOLING_MODES, TRANSFORMER
from .files import fold_temperature, llama_config, write_json

USE = """
```bash
pip install "sentence-transformers>=6.2"
```

```python
from sentence_transformers import CrossEncoder

reranker = CrossEncoder("{model_id}")
results = reranker.rank("how do bees find their way?", ["Honey bees navigate by the position of the sun.", "The hive."])
```

sentence-transformers computes head and scores in the dtype of the weights. Where they are half precision,
`model_kwargs={{"dtype": "float32"}}` keeps the digits.
"""


def write_sentence_transformers(reranker: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, model_id: str) -> str:
    """
    Writes a reranker in the layout of sentence-transformers. Scores are raw logits; the temperature is in the head.

    Args:
        reranker: a [`LlamaBidirectionalForSequenceClassification`].
        tokenizer: its tokenizer.
        folder: an empty folder.
        model_id: how the reranker will be found.

    Returns:
        what the model card says of its use.

    Raises:
        ValueError: the prompt cannot be written as a chat template.
    """
    config = reranker.config
    make_chat_template(tokenizer, config.prompt_template)  # there is no other way to the prompt
    reranker.model.save_pretrained(folder)
    fields = llama_config(config, architectures=["LlamaModel"])
    # Not read by sentence-transformers; for the way back.
    fields |= {"prompt_template": config.prompt_template, "rerank_max_length": config.rerank_max_length}
    LlamaConfig(**fields).save_pretrained(folder)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    save_tokenizer(tokenizer, folder, config)
    write_json(folder / MODULES, [TRANSFORMER, POOLING, DENSE])
    write_json(
        folder / POOLING["path"] / "config.json",
        {
            "embedding_dimension": config.hidden_size,
            "pooling_mode": POOLING_MODES[config.pooling],
            "include_prompt": True,
        },
    )
    head = folder / DENSE["path"]
    write_json(
        head / "config.json",
        {
            "in_features": config.hidden_size,
            "out_features": config.num_labels,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
            "module_input_name": "sentence_embedding",
            "module_output_name": "scores",
        },
    )
    save_file({"linear.weight": fold_temperature(reranker)}, head / "model.safetensors", metadata={"format": "pt"})
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": output, "message": {**output, "format": "flat"}},
            "module_output_name": "token_embeddings",
        },
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "CrossEncoder",
            "activation_fn": "torch.nn.modules.linear.Identity",
            "prompts": {},
            "default_prompt_name": None,
            "requirements": {"transformers": ">=5.2"},
        },
    )
    return USE.format(model_id=model_id)
