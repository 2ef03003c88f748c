"""The prompt as a chat template: the same token ids in every tool."""

import json
from pathlib import Path

import pytest
from helpers import PASSAGE_FIRST, make_model, make_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig
from llama_bidir.checkpoints import chat_template
from llama_bidir.checkpoints.chat_template import find_prompt_template, make_chat_template
from llama_bidir.checkpoints.export import export_reranker


def test_a_chat_template_writes_special_tokens_out():
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=None, special_tokens=ids
    )
    template = make_chat_template(tokenizer, PASSAGE_FIRST)
    messages = [{"role": "document", "content": "a passage"}, {"role": "query", "content": "a query"}]
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"]
    assert rendered == tokenizer(PASSAGE_FIRST.format(passage="a passage", query="a query"))["input_ids"]
    assert (rendered[0], rendered[-1]) == (ids[0][1], ids[1][1])
    lone = tokenizer.apply_chat_template(messages[:1], chat_template=template, tokenize=False)
    assert lone == "a passage"
    with pytest.raises(Exception, match="a pair is a message of role query and one of role document"):
        tokenizer.apply_chat_template([messages[0]] * 2, chat_template=template)


def test_a_prompt_that_no_chat_template_reproduces_is_left_out_with_a_warning(tmp_path, caplog, monkeypatch):
    tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
    monkeypatch.setattr(chat_template, "_renders_the_same", lambda *args: False)
    CrossEncoder(make_model(), tokenizer).save_pretrained(tmp_path)
    assert caplog.messages == [
        "saved without a chat template, so sentence-transformers will not know the prompt: the prompt template "
        "'question:{query} \\n \\n passage:{passage}' cannot be written as a chat template for "
        f"{type(tokenizer).__name__}, which returns different token ids when the text includes its special tokens"
    ]
    assert not (tmp_path / "chat_template.jinja").exists()
    with pytest.raises(ValueError, match="cannot be written as a chat template"):
        export_reranker(tmp_path, tmp_path / "st", format="sentence-transformers")


def test_vllm_puts_special_tokens_around_what_its_template_renders(tmp_path):
    tokenizer = make_tokenizer(bos_token="<s>", pad_token="<|pad|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    CrossEncoder(make_model(prompt_template=PASSAGE_FIRST), tokenizer).save_pretrained(tmp_path / "reranker")
    export_reranker(tmp_path / "reranker", tmp_path / "vllm", format="vllm")
    messages = [{"role": "query", "content": "a query"}, {"role": "document", "content": "a passage"}]
    expected = tokenizer(PASSAGE_FIRST.format(passage="a passage", query="a query"))["input_ids"]
    assert expected.count(tokenizer.bos_token_id) == 1
    for file in ("vllm/chat_template.jinja", "reranker/vllm_template.jinja"):
        saved = AutoTokenizer.from_pretrained((tmp_path / file).parent)
        template = (tmp_path / file).read_text(encoding="utf-8")
        # As vLLM does it: rendered to text, which is then tokenized as any other.
        rendered = saved.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert saved(rendered)["input_ids"] == expected
    # sentence-transformers tokenizes what it renders without special tokens.
    saved = AutoTokenizer.from_pretrained(tmp_path / "reranker")
    assert saved.apply_chat_template(messages, return_dict=True)["input_ids"] == expected


def test_the_prompt_of_nemo_automodel_is_recovered(save, tmp_path, caplog):
    prompt = 'Query: {query}\n\n"Text": {passage}'
    folder, _ = save()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # As NeMo AutoModel writes it; the configuration has no prompt.
    written = (
        "{%- if messages | length != 2 -%}{{- raise_exception('two') -}}{%- endif -%}{{- \"\" + "
        + json.dumps(prompt)
        + ".format(query=messages[0]['content'], passage=messages[1]['content']) + \"\" -}}"
    )
    tokenizer.chat_template = {"default": "{{ messages }}", "reranking": written}
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["prompt_template"]
    (folder / "config.json").write_text(json.dumps(config))
    recovered = CrossEncoder(folder)
    assert recovered.config.prompt_template == prompt
    export_reranker(folder, tmp_path / "hub", format="hub")
    assert CrossEncoder(tmp_path / "hub").config.prompt_template == prompt
    # A prompt that the configuration has goes before it.
    other = make_model(prompt_template=PASSAGE_FIRST)
    assert CrossEncoder(other, AutoTokenizer.from_pretrained(folder)).config.prompt_template == PASSAGE_FIRST
    config = LlamaBidirectionalConfig()
    unreadable = AutoTokenizer.from_pretrained(folder)
    unreadable.chat_template = {"reranking": "{{ messages[0] }}"}
    assert find_prompt_template(unreadable, config) == config.prompt_template
    assert "the chat template 'reranking' has no readable prompt template: pass prompt_template" in caplog.text
    # Saved by us, the prompt is in the configuration, and no template of NeMo's is left to contradict it.
    recovered.config.prompt_template = PASSAGE_FIRST
    recovered.save_pretrained(folder)
    assert CrossEncoder(folder).config.prompt_template == PASSAGE_FIRST
    assert not (Path(folder) / "additional_chat_templates").exists()
