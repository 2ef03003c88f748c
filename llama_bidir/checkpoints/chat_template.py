"""
The prompt as a chat template with the roles `query` and `document`, and `system` for an instruction, which
sentence-transformers and vLLM read.
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

from ..configuration_llama_bidir import LlamaBidirectionalConfig
from ..fields_llama_bidir import DEFAULT_PROMPT_TEMPLATE, check_prompt_template
from ..utils.tokenization import stop_sampling

logger = logging.getLogger(__name__)

# vLLM adds special tokens to a rendered template, so a saved folder has a template of its own for vLLM.
VLLM_TEMPLATE_FILE = "vllm_template.jinja"
# The name of the chat template in which NeMo AutoModel keeps a reranker's prompt.
NEMO_TEMPLATE = "reranking"
SAMPLES = (
    ("how do bees find their way?", "Honey bees, by the sun.", None),
    ("", "", ""),
    (" a  {b}", "\u00e9 \n c", "Find the passage that answers."),
)

# A single message is rendered as it is: sentence-transformers counts the tokens of one text for its model card.
TEMPLATE = """\
{{%- macro text(message) -%}}
{{{{- message["content"] if message["content"] is string else message["content"][0]["text"] -}}}}
{{%- endmacro -%}}
{{%- set query = messages | selectattr("role", "equalto", "query") | first -%}}
{{%- set document = messages | selectattr("role", "equalto", "document") | first -%}}
{instruction}{{%- if query is defined and document is defined -%}}
{{{{- {expression} -}}}}
{{%- elif messages | length == 1 -%}}
{{{{- text(messages[0]) -}}}}
{{%- else -%}}
{{{{- raise_exception("a pair is a message of role query and one of role document") -}}}}
{{%- endif -%}}"""
# sentence-transformers sends a prompt as a system message. vLLM passes arguments of a request on as variables.
INSTRUCTION = """\
{{%- set system = messages | selectattr("role", "equalto", "system") | first -%}}
{{%- set otherwise = instruction if instruction is string else {default} -%}}
{{%- set given = text(system) if system is defined else otherwise -%}}
"""


def make_chat_template(tokenizer: PreTrainedTokenizerBase, prompt_template: str, instruction: str | None = None) -> str:
    """
    Writes a prompt template as a chat template (Jinja) that renders to the same token ids. A message of role `system`,
    or the variable `instruction`, replaces the instruction.

    The template includes the special tokens that the tokenizer adds to a text, because tools tokenize a rendered chat
    template without adding any. Only vLLM adds them, so its template leaves them out (see [`save_tokenizer`]).

    Args:
        tokenizer: the reranker's.
        prompt_template, instruction: see [`LlamaBidirectionalConfig`].

    Raises:
        ValueError: the tokenizer returns different ids when the text includes its special tokens.
    """
    before, after = _special_tokens(tokenizer)
    # Some tokenizers of Llama 2 put a space before a text, but not after a special token.
    for space in ("", " "):
        template = _write_template(before + space, prompt_template, after, instruction)
        if _renders_the_same(tokenizer, template, prompt_template, instruction):
            return template
    raise ValueError(
        f"the prompt template {prompt_template!r} cannot be written as a chat template for "
        f"{type(tokenizer).__name__}, which returns different token ids when the text includes its special tokens"
    )


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike[str], config: LlamaBidirectionalConfig
) -> None:
    """
    Saves the tokenizer of a reranker for tools that do not read the reranker's configuration.

    The prompt replaces the chat template of the base model, and the length of a pair its `model_max_length`. A file
    beside the tokenizer holds the prompt for vLLM. A prompt that cannot be written as a chat template is left out with
    a warning.

    Args:
        tokenizer: the reranker's; it is not changed.
        directory: the folder to save to.
        config: the reranker's.
    """
    saved = copy.deepcopy(tokenizer)
    stop_sampling(saved)
    saved.model_max_length = config.rerank_max_length
    try:
        saved.chat_template = make_chat_template(saved, config.prompt_template, config.instruction)
    except ValueError as error:
        logger.warning(f"saved without a chat template, so sentence-transformers will not know the prompt: {error}")
        saved.chat_template = None
    # The folder may hold templates of the base model, for example saved by the Trainer.
    Path(directory, "chat_template.jinja").unlink(missing_ok=True)
    shutil.rmtree(Path(directory, "additional_chat_templates"), ignore_errors=True)
    saved.save_pretrained(directory)
    for_vllm = _write_template("", config.prompt_template, "", config.instruction)
    Path(directory, VLLM_TEMPLATE_FILE).write_text(for_vllm, encoding="utf-8")


def find_prompt_template(tokenizer: PreTrainedTokenizerBase, config: LlamaBidirectionalConfig) -> str:
    """
    Returns the prompt template of a checkpoint: the configuration's, unless that is the default and NeMo AutoModel has
    saved another one as a chat template.
    """
    recovered = _read_nemo_template(tokenizer) if config.prompt_template == DEFAULT_PROMPT_TEMPLATE else None
    return recovered or config.prompt_template


def _read_nemo_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    templates = tokenizer.chat_template
    written = templates.get(NEMO_TEMPLATE) if isinstance(templates, Mapping) else None
    if written is None:
        return None
    found = re.search(r'("(?:[^"\\]|\\.)*")\s*\.format\(', written)
    if found is None:
        logger.warning(f"the chat template {NEMO_TEMPLATE!r} has no readable prompt template: pass prompt_template")
        return None
    return check_prompt_template(json.loads(found[1]))


def _write_template(before: str, prompt_template: str, after: str, instruction: str | None) -> str:
    """Returns a chat template that renders a pair to the prompt between `before` and `after`."""
    parts = [_quote(before)]
    for literal, field, _, _ in string.Formatter().parse(check_prompt_template(prompt_template)):
        parts.append(_quote(literal))
        if field is not None:
            parts.append({"query": "text(query)", "passage": "text(document)", "instruction": "given"}[field])
    parts.append(_quote(after))
    return TEMPLATE.format(
        instruction=INSTRUCTION.format(default=_quote(instruction or "")) if "given" in parts else "",
        expression=" + ".join(part for part in parts if part != _quote("")),
    )


def _quote(text: str) -> str:
    """Returns a string literal of Jinja, which would read JSON's surrogate escapes as two characters."""
    return json.dumps(text, ensure_ascii=False)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Returns the special tokens that the tokenizer adds before and after a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    ids, is_special = encoding["input_ids"], encoding["special_tokens_mask"]
    inside = [index for index, special in enumerate(is_special) if not special]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return "".join(tokens[: inside[0]]), "".join(tokens[inside[-1] + 1 :])


def _renders_the_same(
    tokenizer: PreTrainedTokenizerBase, template: str, prompt_template: str, instruction: str | None
) -> bool:
    for query, passage, given in SAMPLES:
        messages = [{"role": "query", "content": query}, {"role": "document", "content": passage}]
        messages += [] if given is None else [{"role": "system", "content": given}]
        rendered: Any = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=True)
        chosen = (instruction if given is None else given) or ""
        prompt = prompt_template.format(query=query, passage=passage, instruction=chosen)
        if rendered["input_ids"] != tokenizer(prompt)["input_ids"]:
            return False
    return True
