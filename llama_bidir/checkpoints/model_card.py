"""The model card (README.md) that is saved and pushed with a reranker."""

import json
import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils.hub import cached_file
from yaml import YAMLError

from ..configuration_llama_bidir import LlamaBidirectionalConfig
from ..fields_llama_bidir import takes_instruction
from ..utils.outputs import write_whole

logger = logging.getLogger(__name__)

TAGS = ["reranker", "cross-encoder", "llama-bidir"]
# Metadata that an export takes over from the reranker's own card.
CARRIED = (
    "base_model", "license", "license_name", "license_link", "datasets", "language", "model_name", "eval_results",
)  # fmt: skip
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Characters that Markdown may read as formatting. An underscore inside a word is literal as it is.
MARKDOWN = re.compile(r"[\\`*\[\]<>|&#~]|(?<![^\W_])_|_(?![^\W_])")

# Licence ids of the Hub for the usual base models, by the start of the repository id in lower case.
KNOWN_LICENSES = {
    "meta-llama/llama-2": "llama2",
    "meta-llama/meta-llama-3-": "llama3",
    "meta-llama/meta-llama-3.1": "llama3.1",
    "meta-llama/llama-3.1": "llama3.1",
    "meta-llama/llama-3.2": "llama3.2",
    "meta-llama/llama-3.3": "llama3.3",
    "huggingfacetb/smollm": "apache-2.0",
}

# What each Llama licence requires: the names of the model and the licence in the notice, what "Built with" must name,
# and how the name of a model made from it must begin.
LLAMA_LICENSES = {
    "llama2": ("Llama 2", "LLAMA 2", None, None),
    "llama3": ("Meta Llama 3", "Meta Llama 3", "Meta Llama 3", "Llama 3"),
    "llama3.1": ("Llama 3.1", "Llama 3.1", "Llama", "Llama"),
    "llama3.2": ("Llama 3.2", "Llama 3.2", "Llama", "Llama"),
    "llama3.3": ("Llama 3.3", "Llama 3.3", "Llama", "Llama"),
}

BODY = """
# {title}

A reranker: a bidirectional Llama that reads a query and a passage together and scores how relevant the passage is. The
score is a raw logit; higher means more relevant. Made with `llama-bidir`.

## Use
{use}
## Details

| | |
|---|---|
| Base model | {base} |
| Pooling | `{config.pooling}` |
| Temperature | {config.temperature} (logits are divided by it) |
| Longest pair | {config.rerank_max_length} tokens |
| Labels | {config.num_labels} |
{probability}
The prompt template, as a JSON string:

```json
{prompt}
```
{instruction}"""

PROBABILITY = "| Probability of relevance | sigmoid({slope:.6g} * score + {offset:.6g}) |\n"

INSTRUCTION = """
The instruction of a pair that is given none, as a JSON string:

```json
{instruction}
```
"""

SCORE_WITH_TRANSFORMERS = """\
text = model.config.prompt_template.format(
    query="how do bees find their way?",
    passage="Honey bees navigate by the position of the sun.",
    instruction=model.config.instruction or "",
)
inputs = tokenizer(text, truncation=True, max_length=model.config.rerank_max_length, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits)
"""

USE = (
    """
```bash
pip install llama-bidir
```

```python
from llama_bidir import CrossEncoder

reranker = CrossEncoder({model_id})
results = reranker.rank(
    "how do bees find their way?",
    ["Honey bees navigate by the position of the sun.", "The hive was painted white."],
    return_documents=True,
)
for result in results:
    print(f"{{result['score']:.3f}}  {{result['text']}}")
```

With the Auto classes of transformers:

```python
import llama_bidir
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({model_id})
tokenizer = AutoTokenizer.from_pretrained({model_id})
"""
    + SCORE_WITH_TRANSFORMERS
    + "```\n"
)


def write_model_card(
    directory: str | os.PathLike[str],
    config: LlamaBidirectionalConfig,
    model_id: str,
    *,
    use: str = USE,
    library: str = "transformers",
    evaluation: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes README.md into the folder of a saved reranker, and NOTICE where a Llama licence requires it.

    Args:
        directory: the folder.
        config: the reranker's configuration. Its `name_or_path` is the model that the reranker was made from.
        model_id: the Hub id or path that the code in the card loads.
        use: Markdown that explains how to load the reranker, with the fields `{model_id}` (quoted for Python and JSON),
            `{shell_id}` (quoted for a shell), `{dtype}` (of the weights) and `{config}`.
        library: the library that the Hub shows code for.
        evaluation: a file from `llama-bidir evaluate --json`, for the `model-index` and a table of measures.
        metadata: fields of [`huggingface_hub.ModelCardData`]; its tags are added to the card's.

    Raises:
        ValueError: the evaluation is not such a file.
    """
    title = model_id.rstrip("/").split("/")[-1]
    measures = {} if evaluation is None else read_measures(evaluation)
    fields: dict[str, Any] = {**find_origin(config.name_or_path), **(metadata or {})}
    fields["tags"] = [*TAGS, *(tag for tag in fields.get("tags") or [] if tag not in TAGS)]
    if measures:
        fields |= {"model_name": title, "eval_results": _results(measures, os.path.basename(str(evaluation)))}
    data = ModelCardData(library_name=library, pipeline_tag="text-ranking", **fields)
    body = BODY.format(
        title=_escape(title),
        use=use.format(
            model_id=_quote(model_id),
            shell_id=shlex.quote(model_id),
            dtype=str(config.dtype).removeprefix("torch."),
            config=config,
        ),
        base=_link(str(fields["base_model"])) if fields.get("base_model") else "not recorded",
        config=config,
        probability="" if config.calibration is None else PROBABILITY.format(**config.calibration),
        prompt=json.dumps(config.prompt_template, ensure_ascii=False),
        instruction=INSTRUCTION.format(instruction=json.dumps(config.instruction or "", ensure_ascii=False))
        if takes_instruction(config.prompt_template)
        else "",
    )
    if measures:
        rows = "".join(f"| {_escape(name)} | {value:.4f} |\n" for name, value in measures.items())
        body += f"\n## Measures\n\n| | |\n|---|---|\n{rows}"
    if (license := str(fields.get("license"))) in LLAMA_LICENSES:
        notice, section = _license_texts(license)
        body += section
        Path(directory, "NOTICE").write_text(notice, encoding="utf-8")
    Path(directory, "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{body}", encoding="utf-8")


def update_probability(directory: str | os.PathLike[str], calibration: Mapping[str, float]) -> None:
    """Writes the formula of a new calibration into the model card of a folder, if it is a card of this package."""
    path = Path(directory, "README.md")
    if not path.is_file() or has_other_card(directory):
        return
    text = path.read_text(encoding="utf-8")
    kept = re.sub(r"^\| Probability of relevance \|.*\n", "", text, flags=re.MULTILINE)
    place = re.search(r"^\| Labels \|.*\n", kept, flags=re.MULTILINE)
    if place is not None:
        write_whole(path, kept[: place.end()] + PROBABILITY.format(**calibration) + kept[place.end() :])


def has_other_card(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder has a README.md that is not a model card of this package."""
    path = Path(directory, "README.md")
    return path.is_file() and f"- {TAGS[-1]}\n" not in path.read_text(encoding="utf-8", errors="replace")


def read_measures(path: str | os.PathLike[str]) -> dict[str, float]:
    """Returns the aggregated measures in a file from `evaluate --json`; raises ValueError for any other file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in content["aggregated"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)}: evaluation must be a file of llama-bidir evaluate --json, with aggregated measures "
            f"({type(error).__name__}: {error})"
        ) from None


def find_origin(name_or_path: str | None) -> dict[str, Any]:
    """
    Finds out what is known about the model that a reranker was made from.

    The model card of a folder gives the base model and its licence. Any other name is taken for a Hub id: the licences
    of the usual base models are known, and others are read from the model card in the cache.

    Args:
        name_or_path: a folder or the id of a Hub repository.

    Returns:
        the metadata `base_model`, `license`, `license_name` and `license_link`, each only where it is known.
    """
    name = name_or_path or ""
    fields = ("license", "license_name", "license_link")
    if os.path.isdir(name):
        return read_card(name, ("base_model", *fields))
    if not HUB_ID.fullmatch(name):
        return {}
    known = [prefix for prefix in KNOWN_LICENSES if name.lower().startswith(prefix)]
    if known:
        return {"base_model": name, "license": KNOWN_LICENSES[max(known, key=len)]}
    return {"base_model": name, **read_card(name, fields, local_files_only=True)}


def read_card(name_or_path: str, fields: Sequence[str] = CARRIED, **source: Any) -> dict[str, Any]:
    """
    Reads metadata from the model card of a folder or a Hub repository.

    Args:
        name_or_path: the folder or the id of the repository.
        fields: names of the metadata to read.
        source: arguments of the Hub, such as `revision`.

    Returns:
        the fields that the card has; none when there is no card or it cannot be read.
    """
    try:
        path = cached_file(name_or_path, "README.md", _raise_exceptions_for_missing_entries=False, **source)
        data = ModelCard.load(path, ignore_metadata_errors=True).data if path else None
    except (OSError, ValueError, YAMLError) as error:
        logger.info(f"the model card of {name_or_path} cannot be read: {error}")
        return {}
    found = {field: value for field in fields if (value := getattr(data, field, None))}
    if isinstance(base_models := found.get("base_model"), list):
        found["base_model"] = base_models[0]
    return found


def _license_texts(license: str) -> tuple[str, str]:
    """The text of the file NOTICE and the section of the card for a Llama licence."""
    model, name, built_with, prefix = LLAMA_LICENSES[license]
    rights = "Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    notice = f"{model} is licensed under the {name} Community License, {rights}"
    display = f"Built with {built_with}. " if built_with else ""
    duty = "If you redistribute this model, you must include a copy of that agreement and the file NOTICE."
    naming = f' The name of the model has to begin with "{prefix}".' if prefix else ""
    return f"{notice}\n", f"\n## Licence\n\n{display}{notice} {duty}{naming}\n"


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


def _link(base_model: str) -> str:
    is_hub_id = HUB_ID.fullmatch(base_model)
    return f"[{base_model}](https://huggingface.co/{base_model})" if is_hub_id else _escape(base_model)


def _escape(text: str) -> str:
    """One line of Markdown that renders as `text`, in a heading as well as in a table."""
    return MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))


def _quote(text: str) -> str:
    """A string literal for Python and JSON, also inside a shell's single quotes."""
    return json.dumps(text, ensure_ascii=False).replace("'", "\\u0027")
