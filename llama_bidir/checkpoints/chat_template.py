"""
The prompt of a reranker as a chat template with the roles `query` and `document`: the form in which
sentence-transformers and vLLM read it.
"""

import copy
import json
import logging
import os
import re
import shutil
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..configuration_llama_bidir import DEFAULT_PROMPT_TEMPLATE, LlamaBidirectionalConfig, check_prompt_template

logger = logging.getLogger(__name__)

# vLLM's own file in a saved folder. Its tokenizer puts special tokens around what a template renders.
VLLM_TEMPLATE_FILE = "vllm_template.jinja"

SAMPLES = (("how do bees find their way?", "Honey bees, by the sun."), ("", ""), (" a  {b}", "\u00e9 \n c"))
# What NeMo AutoModel calls the template in which it keeps a reranker's prompt.
NEMO_TEMPLATE = "reranking"

# A lone text, of which sentence-transformers counts the tokens when it writes a model card, is rendered as it is.
TEMPLATE = """\
{{%- macro text(message) -%}}
{{{{- message["content"] if message["content"] is string else message["content"][0]["text"] -}}}}
{{%- endmacro -%}}
{{%- set query = messages | selectattr("role", "equalto", "query") | first -%}}
{{%- set document = messages | selectattr("role", "equalto", "document") | first -%}}
{{%- if query is defined and document is defined -%}}
{{{{- {expression} -}}}}
{{%- elif messages | length == 1 -%}}
{{{{- text(messages[0]) -}}}}
{{%- else -%}}
{{{{- raise_exception("a pair is a message of role query and one of role document") -}}}}
{{%- endif -%}}"""


def make_chat_template(tokenizer: PreTrainedTokenizerBase, prompt_template: str) -> str:
    """
    Writes a prompt template as a chat template (Jinja) that renders to the same token ids.

    Args:
        tokenizer: the special tokens that it puts around a text are written out, as a rendered chat template is
            tokenized without them, except by vLLM (see [`make_vllm_template`]).
        prompt_template: see [`LlamaBidirectionalConfig`].

    Raises:
        ValueError: the tokenizer gives other ids for text that has its special tokens in it.
    """
    before, after = _special_tokens(tokenizer)
    middle = _parts(prompt_template)
    # Some tokenizers of Llama 2 put a space before a text, but not behind a special token.
    for space in ("", " "):
        parts = [_quote(before + space)] * bool(before + space) + middle + [_quote(after)] * bool(after)
        template = TEMPLATE.format(expression=" + ".join(parts))
        if _renders_the_same(tokenizer, template, prompt_template):
            return template
    raise ValueError(
        f"the prompt template {prompt_template!r} cannot be written as a chat template for "
        f"{type(tokenizer).__name__}: with its special tokens written out, it gives other ids"
    )


def make_vllm_template(prompt_template: str) -> str:
    """Writes a prompt template as a chat template that renders to the bare prompt, whatever the tokenizer adds."""
    return TEMPLATE.format(expression=" + ".join(_parts(prompt_template)))


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike[str], config: LlamaBidirectionalConfig
) -> None:
    """
    Saves the tokenizer of a reranker, for tools that do not read the reranker's configuration: its chat template is the
    prompt, instead of the one for talking that its base may have had, and its longest input that of a pair. A file
    beside it holds the prompt for vLLM.

    Args:
        tokenizer: not changed.
        directory: where to.
        config: the reranker's.
    """
    saved = copy.deepcopy(tokenizer)
    saved.model_max_length = config.rerank_max_length
    try:
        saved.chat_template = make_chat_template(tokenizer, config.prompt_template)
    except ValueError as error:
        logger.warning(
            f"saved without a chat template, so that sentence-transformers does not know the prompt: {error}"
        )
        saved.chat_template = None
    # What the Trainer has saved of the base's, for one.
    Path(directory, "chat_template.jinja").unlink(missing_ok=True)
    shutil.rmtree(Path(directory, "additional_chat_templates"), ignore_errors=True)
    saved.save_pretrained(directory)
    Path(directory, VLLM_TEMPLATE_FILE).write_text(make_vllm_template(config.prompt_template), encoding="utf-8")


def find_prompt_template(tokenizer: PreTrainedTokenizerBase, config: LlamaBidirectionalConfig) -> str:
    """
    Returns the prompt template of a checkpoint: its configuration's, or where that has none of its own, what NeMo
    AutoModel has saved as a chat template.
    """
    recovered = _read_nemo_template(tokenizer) if config.prompt_template == DEFAULT_PROMPT_TEMPLATE else None
    return recovered or config.prompt_template


def _read_nemo_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    templates = tokenizer.chat_template
    written = templates.get(NEMO_TEMPLATE) if isinstance(templates, Mapping) else None
    found = re.search(r'("(?:[^"\\]|\\.)*")\s*\.format\(', written or "")
    if found is None:
        if written is not None:
            logger.warning(f"the chat template {NEMO_TEMPLATE!r} holds no prompt template that can be read: pass one")
        return None
    return check_prompt_template(json.loads(found[1]))


def _parts(prompt_template: str) -> list[str]:
    """Expressions of Jinja, whose values joined are the prompt."""
    parts = []
    for literal, field, _, _ in string.Formatter().parse(check_prompt_template(prompt_template)):
        parts += [_quote(literal)] * bool(literal)
        parts += {"query": ["text(query)"], "passage": ["text(document)"]}.get(str(field), [])
    return parts


def _quote(text: str) -> str:
    """A string of Jinja, which reads surrogate escapes of JSON as two characters."""
    return json.dumps(text, ensure_ascii=False)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the tokenizer puts before and after a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    ids, is_special = encoding["input_ids"], encoding["special_tokens_mask"]
    inside = [index for index, special in enumerate(is_special) if not special]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return "".join(tokens[: inside[0]]), "".join(tokens[inside[-1] + 1 :])


def _renders_the_same(tokenizer: PreTrainedTokenizerBase, template: str, prompt_template: str) -> bool:
    for query, passage in SAMPLES:
        messages = [{"role": "query", "content": query}, {"role": "document", "content": passage}]
        rendered: Any = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=True)
        if rendered["input_ids"] != tokenizer(prompt_template.format(query=query, passage=passage))["input_ids"]:
            return False
    return True
