"""The model card: metadata, licence, measures."""

import ast
import json
import re
import shlex

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig
from llama_bidir.checkpoints.export import FORMATS, export_reranker
from llama_bidir.checkpoints.model_card import find_origin, write_model_card
from llama_bidir.cli import main


def test_card_of_a_known_base_model(tmp_path):
    config = LlamaBidirectionalConfig(temperature=0.5, pooling="last", name_or_path="meta-llama/Llama-3.2-1B")
    write_model_card(tmp_path, config, "me/reranker")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-ranking")
    assert {"reranker", "cross-encoder"} <= set(data.tags)
    assert (data.base_model, data.license) == ("meta-llama/Llama-3.2-1B", "llama3.2")
    details = (tmp_path / "README.md").read_text().split("## Details\n")[1].split("## Licence")[0]
    assert (
        details
        == r"""
| | |
|---|---|
| Base model | [meta-llama/Llama-3.2-1B](https://huggingface.co/meta-llama/Llama-3.2-1B) |
| Pooling | `last` |
| Temperature | 0.5 (logits are divided by it) |
| Longest pair | 512 tokens |
| Labels | 1 |

The prompt template, as a JSON string:

```json
"question:{query} \n \n passage:{passage}"
```

"""
    )


def test_a_prompt_cannot_break_the_card(tmp_path):
    prompt = '| {query} | `a` <b>\n```\n---\n{passage} \\ "end" '
    config = LlamaBidirectionalConfig(prompt_template=prompt, name_or_path="meta-llama/Llama-3.2-1B")
    write_model_card(tmp_path, config, "me/reranker", metadata={"datasets": ["a|b"]})
    text = (tmp_path / "README.md").read_text()
    block = text.split("as a JSON string:\n\n")[1].split("\n\n## Licence")[0]
    assert (
        block
        == r"""```json
"| {query} | `a` <b>\n```\n---\n{passage} \\ \"end\" "
```"""
    )
    assert json.loads(block.splitlines()[1]) == prompt
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.count("|") for row in rows] == [3] * 7
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.license, data.datasets) == ("meta-llama/Llama-3.2-1B", "llama3.2", ["a|b"])


def test_names_cannot_break_the_card(tmp_path):
    evaluation = tmp_path / "a|b: c.json"
    evaluation.write_text(json.dumps({"aggregated": {"P(rel=2)@10": 0.5, "a|b_c_": 0.25}}))
    metadata = {"base_model": "../base|*1*"}
    write_model_card(
        tmp_path, LlamaBidirectionalConfig(), '/x/y"z/a|b `c` *d* <e>/', evaluation=evaluation, metadata=metadata
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.model_name, card.data.base_model) == ("a|b `c` *d* <e>", "../base|*1*")
    results = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert results == [("a|b: c", "P(rel=2)@10", 0.5), ("a|b: c", "a|b_c_", 0.25)]
    assert card.text.startswith("\n# a\\|b \\`c\\` \\*d\\* \\<e\\>\n")
    assert "\n| Base model | ../base\\|\\*1\\* |\n" in card.text
    assert card.text.endswith("\n\n| | |\n|---|---|\n| P(rel=2)@10 | 0.5000 |\n| a\\|b_c\\_ | 0.2500 |\n")


@pytest.mark.parametrize("model_id", ["you/my_reranker", "a b/it's", 'C:\\new\\"x"', "$HOME/`id`"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_code_of_a_card_names_the_model_whatever_its_characters(tmp_path, format, model_id):
    config = LlamaBidirectionalConfig(dtype="bfloat16")
    write_model_card(tmp_path, config, model_id, use=FORMATS[format].use)
    text = (tmp_path / "README.md").read_text()
    python = "".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    for call in ast.walk(ast.parse(python)):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("CrossEncoder", "from_pretrained")):
            assert ast.literal_eval(call.args[0]) == model_id
    if format == "vllm":
        commands = [shlex.split(block) for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)]
        serve, curl = commands[0][commands[0].index("vllm", 3) :], commands[1]
        assert serve[:3] == ["vllm", "serve", model_id]
        assert serve[serve.index("--dtype") + 1] == "bfloat16"
        assert serve[serve.index("--chat-template") + 1] == f"{model_id}/chat_template.jinja"
        assert json.loads(curl[-1])["model"] == model_id


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama2"),
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3"),
        ("HuggingFaceTB/SmolLM2-135M", "apache-2.0"),
        ("someone/else", None),
    ],
)
def test_licence_of_the_base_model(name, expected):
    assert find_origin(name) == {"base_model": name, **({"license": expected} if expected else {})}


@pytest.mark.parametrize(
    ("base", "notice", "said"),
    [
        ("Llama-2-7b-hf", "Llama 2 is licensed under the LLAMA 2 Community", ()),
        ("Meta-Llama-3-8B", "Meta Llama 3 is licensed", ("Built with Meta Llama 3.", 'to begin with "Llama 3"')),
        ("Llama-3.2-1B", "Llama 3.2 is licensed under the Llama 3.2", ("Built with Llama.", 'to begin with "Llama"')),
    ],
)
def test_each_llama_licence_asks_for_something_else(tmp_path, base, notice, said):
    write_model_card(tmp_path, LlamaBidirectionalConfig(name_or_path=f"meta-llama/{base}"), "me/Llama-r")
    assert (tmp_path / "NOTICE").read_text().startswith(notice)
    text = (tmp_path / "README.md").read_text()
    assert all(words in text for words in said)
    assert ("Built with" in text) == bool(said)


def test_base_model_is_carried_from_card_to_card(tmp_path):
    config = LlamaBidirectionalConfig(name_or_path="meta-llama/Llama-3.1-8B")
    write_model_card(tmp_path, config, "me/first")
    assert find_origin(str(tmp_path)) == {"base_model": "meta-llama/Llama-3.1-8B", "license": "llama3.1"}
    (tmp_path / "README.md").unlink()
    assert find_origin(str(tmp_path)) == find_origin("") == find_origin(None) == find_origin("/gone/away") == {}


def test_a_base_model_that_cannot_be_asked_does_not_stop_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: [\n---\n")
    for name in ("gone/away", "no/such/id", str(tmp_path / "folder")):
        write_model_card(tmp_path, LlamaBidirectionalConfig(name_or_path=name), "me/reranker")
        assert "license" not in ModelCard.load(tmp_path / "README.md").data.to_dict()


def test_card_of_an_unknown_base_model_says_so(tmp_path):
    write_model_card(tmp_path, LlamaBidirectionalConfig(), "me/reranker")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert "base_model" not in data
    assert "license" not in data


def test_a_card_has_the_measures_and_the_notice_of_the_licence(tmp_path, tokenizer, model):
    model.config.name_or_path = "meta-llama/Llama-3.2-1B"
    evaluation = tmp_path / "nq.json"
    evaluation.write_text(json.dumps({"aggregated": {"nDCG@10": 0.41234, "RR@10": 0.5}, "per_query": {}}))
    CrossEncoder(model, tokenizer).save_pretrained(tmp_path / "out", model_id="you/Llama-r", evaluation=evaluation)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("llama3.2", "meta-llama/Llama-3.2-1B")
    results = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert results == [("nq", "nDCG@10", 0.41234), ("nq", "RR@10", 0.5)]
    assert "| nDCG@10 | 0.4123 |" in card.text
    notice = (tmp_path / "out" / "NOTICE").read_text()
    assert notice.startswith("Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright")
    assert notice.strip() in card.text
    evaluation.write_text("{}")
    with pytest.raises(ValueError, match=r"nq\.json: evaluation must be a file of llama-bidir evaluate --json"):
        CrossEncoder(model, tokenizer).save_pretrained(tmp_path / "out", evaluation=evaluation)


def test_the_card_of_an_export_says_what_the_rerankers_card_says(save, tmp_path):
    folder, _ = save()
    evaluation = tmp_path / "nq.json"
    evaluation.write_text(json.dumps({"aggregated": {"nDCG@10": 0.5}}))
    metadata = {"base_model": "meta-llama/Llama-3.2-1B", "license": "llama3.2", "datasets": ["squad"], "language": "en"}
    write_model_card(folder, LlamaBidirectionalConfig(), "Llama-r", evaluation=evaluation, metadata=metadata)
    export_reranker(folder, tmp_path / "hub", format="hub", model_id="you/Llama-r")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert {name: getattr(card.data, name) for name in metadata} == metadata
    assert [result.metric_value for result in card.data.eval_results] == [0.5]
    assert 'from_pretrained("you/Llama-r"' in card.text
    assert (tmp_path / "hub" / "NOTICE").read_text() == (folder / "NOTICE").read_text()
    evaluation.write_text(json.dumps({"aggregated": {"nDCG@10": 0.75}}))
    arguments = ["export", "--model", str(folder), "--format", "hub", "--output", str(tmp_path / "again")]
    assert main([*arguments, "--evaluation", str(evaluation)]) == 0
    assert ModelCard.load(tmp_path / "again" / "README.md").data.eval_results[0].metric_value == 0.75
