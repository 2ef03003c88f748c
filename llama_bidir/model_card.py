"""The model card (README.md) that is saved and pushed with a reranker."""

import os
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .configuration_llama_bidir import LlamaBidirectionalConfig

# Hub licence ids of the families that a Llama reranker is usually made from, by the start of the repository id.
KNOWN_LICENSES = {
    "meta-llama/llama-2": "llama2",
    "meta-llama/meta-llama-3-": "llama3",
    "meta-llama/meta-llama-3.1": "llama3.1",
    "meta-llama/llama-3.1": "llama3.1",
    "meta-llama/llama-3.2": "llama3.2",
    "meta-llama/llama-3.3": "llama3.3",
    "huggingfacetb/smollm": "apache-2.0",
}

BODY = """
# {title}

A reranker: a bidirectional Llama that reads a query and a passage together and returns one relevance logit (higher is
more relevant). Made with `llama-bidir`.

## Use
{use}
## Details

| | |
|---|---|
| Base model | {base} |
| Pooling | `{config.pooling}` |
| Temperature | {config.temperature} (logits are divided by it) |
| Prompt | `{prompt}` |
| Longest pair | {config.rerank_max_length} tokens |
| Labels | {config.num_labels} |
"""

USE = """
```bash
pip install llama-bidir
```

```python
from llama_bidir import CrossEncoder

reranker = CrossEncoder("{model_id}")
results = reranker.rank(
    "how do bees find their way?",
    ["Honey bees navigate by the position of the sun.", "The hive was painted white."],
    return_documents=True,
)
for result in results:
    print(f"{{result['score']:.3f}}  {{result['text']}}")
```

With transformers alone:

```python
import llama_bidir
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{model_id}")
tokenizer = AutoTokenizer.from_pretrained("{model_id}")
text = model.config.prompt_template.format(
    query="how do bees find their way?", passage="Honey bees navigate by the position of the sun."
)
inputs = tokenizer(text, truncation=True, max_length=model.config.rerank_max_length, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits)
```
"""


def write_model_card(
    directory: str | os.PathLike[str],
    config: LlamaBidirectionalConfig,
    model_id: str,
    *,
    use: str | None = None,
    library: str = "transformers",
) -> None:
    """
    Writes README.md into the folder of a saved reranker.

    Args:
        directory: the folder.
        config: the reranker's configuration; its `name_or_path` says what the reranker was made from.
        model_id: what `from_pretrained` will be given, a Hub repository id or a path, for the code in the card.
        use: how the reranker is loaded, in Markdown; with this package and with transformers when not given.
        library: that the Hub will show code for.
    """
    base_model, license_id = find_base_model(config.name_or_path)
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text-ranking",
        tags=["reranker", "cross-encoder", "llama-bidir"],
        base_model=base_model,
        license=license_id,
    )
    body = BODY.format(
        title=model_id.rstrip("/").split("/")[-1],
        use=USE.format(model_id=model_id) if use is None else use,
        base=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "not recorded",
        config=config,
        prompt=config.prompt_template.replace("\n", "\\n"),
    )
    Path(directory, "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{body}", encoding="utf-8")


def find_base_model(name_or_path: str | None) -> tuple[str | None, str | None]:
    """
    Returns the Hub id and the licence id of what a reranker was made from, each None where it is not known.

    A folder is asked for them by its own model card; a name that is no folder is taken for a Hub id.
    """
    name = name_or_path or ""
    if os.path.isdir(name):
        card_path = Path(name, "README.md")
        if not card_path.is_file():
            return None, None
        data = ModelCard.load(card_path, ignore_metadata_errors=True).data
        base_model = data.base_model[0] if isinstance(data.base_model, list) else data.base_model
        return base_model, data.license
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None, None
    known = [prefix for prefix in KNOWN_LICENSES if name.lower().startswith(prefix)]
    return name, KNOWN_LICENSES[max(known, key=len)] if known else None
