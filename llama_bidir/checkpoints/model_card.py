"""The model card (README.md) that is saved and pushed with a reranker."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils.hub import cached_file
from yaml import YAMLError

from ..configuration_llama_bidir import LlamaBidirectionalConfig

logger = logging.getLogger(__name__)

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

LLAMA_NOTICE = (
    "{model} is licensed under the {license} Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
)

LICENSE_SECTION = """
## Licence

{built_with}{notice} Who gives this model to others has to give them that agreement and the file NOTICE as well{naming}.
"""


class LlamaLicense(NamedTuple):
    """What a Llama licence asks of a model that is made from a Llama: the names in its notice, and a name to show."""

    model: str
    license: str
    built_with: str | None = None
    prefix: str | None = None

    @property
    def notice(self) -> str:
        """The text of the file NOTICE."""
        return LLAMA_NOTICE.format(model=self.model, license=self.license)

    @property
    def section(self) -> str:
        """What a model card says about it."""
        built_with = f"Built with {self.built_with}. " if self.built_with else ""
        naming = f', and its name has to begin with "{self.prefix}"' if self.prefix else ""
        return LICENSE_SECTION.format(built_with=built_with, notice=self.notice, naming=naming)


LLAMA_LICENSES = {
    "llama2": LlamaLicense("Llama 2", "LLAMA 2"),
    "llama3": LlamaLicense("Meta Llama 3", "Meta Llama 3", "Meta Llama 3", "Llama 3"),
    "llama3.1": LlamaLicense("Llama 3.1", "Llama 3.1", "Llama", "Llama"),
    "llama3.2": LlamaLicense("Llama 3.2", "Llama 3.2", "Llama", "Llama"),
    "llama3.3": LlamaLicense("Llama 3.3", "Llama 3.3", "Llama", "Llama"),
}
# What an export says as the reranker's own card does.
CARRIED = (
    "base_model", "license", "license_name", "license_link", "datasets", "language", "model_name", "eval_results",
)  # fmt: skip

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
    title = model_id.rstrip("/").split("/")[-1]
    measures = {} if evaluation is None else read_measures(evaluation)
    fields: dict[str, Any] = {**find_origin(config.name_or_path), **(metadata or {})}
    base_model = fields.get("base_model")
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
    if license := LLAMA_LICENSES.get(str(fields.get("license"))):
        body += license.section
        Path(directory, "NOTICE").write_text(license.notice + "\n", encoding="utf-8")
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


def find_origin(name_or_path: str | None) -> dict[str, Any]:
    """
    Returns what a card says of the model that a reranker was made from, as far as it is known: its Hub id as
    `base_model`, and the fields of its licence.

    A folder is asked for them by its own model card; a name that is no folder is taken for a Hub id, of which only the
    licence is read, where the card is in the cache.
    """
    name = name_or_path or ""
    fields = ("license", "license_name", "license_link")
    if os.path.isdir(name):
        return read_card(name, ("base_model", *fields))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return {}
    known = [prefix for prefix in KNOWN_LICENSES if name.lower().startswith(prefix)]
    if known:
        return {"base_model": name, "license": KNOWN_LICENSES[max(known, key=len)]}
    return {"base_model": name, **read_card(name, fields, local_files_only=True)}


def read_card(name_or_path: str, fields: Sequence[str] = CARRIED, **source: Any) -> dict[str, Any]:
    """
    Returns those fields that the model card of a folder or of a Hub repository has; none where no card can be read.

    Args:
        source: arguments of the Hub, such as `revision`.
    """
    try:
        path = cached_file(name_or_path, "README.md", _raise_exceptions_for_missing_entries=False, **source)
        data = ModelCard.load(path, ignore_metadata_errors=True).data if path else None
    except (OSError, ValueError, YAMLError) as error:
        logger.info(f"no model card was read of {name_or_path}: {error}")
        return {}
    found = {field: value for field in fields if (value := getattr(data, field, None))}
    if isinstance(base_models := found.get("base_model"), list):
        found["base_model"] = base_models[0]
    return found
