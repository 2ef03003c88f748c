"""The model card (README.md) that is saved and pushed with a reranker."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

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

TAGS = ["reranker", "cross-encoder", "llama-bidir"]

# The notices that the Llama licences ask for beside what is made from a Llama.
LLAMA_NOTICES = {
    license: f"{model} is licensed under the {model} Community License, Copyright (c) Meta Platforms, Inc. All Rights "
    "Reserved."
    for license, model in {
        "llama2": "Llama 2",
        "llama3": "Meta Llama 3",
        "llama3.1": "Llama 3.1",
        "llama3.2": "Llama 3.2",
        "llama3.3": "Llama 3.3",
    }.items()
}

LICENSE_SECTION = """
## Licence

Built with Llama. {notice} The licence (`{license}`) asks that the name of a model that is made from it and given to
others begins with "Llama", and that NOTICE stays beside the weights.
"""

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
    evaluation: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes README.md into the folder of a saved reranker.

    Args:
        directory: the folder.
        config: the reranker's configuration; its `name_or_path` says what the reranker was made from.
        model_id: what `from_pretrained` will be given, a Hub repository id or a path, for the code in the card.
        use: how the reranker is loaded, in Markdown; with this package and with transformers when not given.
        library: that the Hub will show code for.
        evaluation: what `llama-bidir evaluate --json` wrote, for the `model-index` and a table.
        metadata: more of what [`huggingface_hub.ModelCardData`] holds; its tags are added to the card's.

    Raises:
        ValueError: the evaluation is no such file.
    """
    base_model, license_id = find_base_model(config.name_or_path)
    title = model_id.rstrip("/").split("/")[-1]
    measures = {} if evaluation is None else read_measures(evaluation)
    fields: dict[str, Any] = {"base_model": base_model, "license": license_id, **(metadata or {})}
    fields["tags"] = [*TAGS, *(tag for tag in fields.get("tags") or [] if tag not in TAGS)]
    if measures:
        fields |= {"model_name": title, "eval_results": _results(measures, os.path.basename(str(evaluation)))}
    data = ModelCardData(library_name=library, pipeline_tag="text-ranking", **fields)
    body = BODY.format(
        title=title,
        use=USE.format(model_id=model_id) if use is None else use,
        base=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "not recorded",
        config=config,
        prompt=config.prompt_template.replace("\n", "\\n"),
    )
    if measures:
        rows = "".join(f"| {name} | {value:.4f} |\n" for name, value in measures.items())
        body += f"\n## Measures\n\n| | |\n|---|---|\n{rows}"
    if notice := LLAMA_NOTICES.get(str(fields["license"])):
        body += LICENSE_SECTION.format(notice=notice, license=fields["license"])
        Path(directory, "NOTICE").write_text(notice + "\n", encoding="utf-8")
    Path(directory, "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{body}", encoding="utf-8")


def read_measures(path: str | os.PathLike[str]) -> dict[str, float]:
    """Returns the aggregated measures of an evaluation; raises ValueError for another file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in content["aggregated"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)}: evaluation must be a file of llama-bidir evaluate --json, with aggregated measures "
            f"({type(error).__name__}: {error})"
        ) from None


def _results(measures: Mapping[str, float], dataset: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-ranking",
            dataset_type="custom",
            dataset_name=dataset.removesuffix(".json"),
            metric_type=name,
            metric_value=value,
        )
        for name, value in measures.items()
    ]


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
