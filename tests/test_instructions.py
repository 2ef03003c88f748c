"""Instructions: rendered, never cut, saved, exported, read from rows."""

import copy
import itertools
import json
import types

import numpy as np
import pytest
import torch
from helpers import PAIRS, make_model, make_tokenizer, run_python
from hub_server import run_hub
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from llama_bidir import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    LlamaBidirectionalConfig,
    LlamaBidirectionalForSequenceClassification,
)
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.cli import main
from llama_bidir.data import load_rows
from llama_bidir.jobs.mining import mine_negatives
from llama_bidir.prompts import PromptEncoder

TEMPLATE = "<{instruction}> q: {query}\n p: {passage}"
DEFAULT = "Find the passage that answers."
OTHER = "Find a passage about {gardens}."


@pytest.fixture
def reranker():
    tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
    model = make_model(rerank_max_length=96, prompt_template=TEMPLATE, instruction=DEFAULT)
    return CrossEncoder(model, tokenizer)


def with_text(reranker, instruction):
    """The same reranker, with an instruction that is part of the template's text."""
    model = copy.deepcopy(reranker.model)
    model.config.instruction = None
    template = TEMPLATE.replace("{instruction}", instruction.replace("{", "{{").replace("}", "}}"))
    return CrossEncoder(model, reranker.tokenizer, prompt_template=template)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"prompt_template": TEMPLATE, "instruction": DEFAULT}])
def test_a_configuration_keeps_its_instruction(fields, tmp_path):
    LlamaBidirectionalConfig(**fields).save_pretrained(tmp_path)
    assert LlamaBidirectionalConfig.from_pretrained(tmp_path).instruction == fields.get("instruction")


def test_a_configuration_refuses_an_instruction_without_a_field():
    rule = r"instruction 'Find it' has no place in the prompt_template .*: add the field \{instruction\}"
    with pytest.raises(ValueError, match=rule):
        LlamaBidirectionalConfig(instruction="Find it")
    config = LlamaBidirectionalConfig(prompt_template=TEMPLATE, instruction="Find it")
    with pytest.raises(ValueError, match=rule):
        config.prompt_template = "{query} {passage}"
    assert config.prompt_template == TEMPLATE
    with pytest.raises(ValueError, match="instruction must be a string or None, got 5"):
        config.instruction = 5
    with pytest.raises(ValueError, match=r"at most one \{instruction\}"):
        config.prompt_template = "{instruction}{instruction}{query}{passage}"
    # The field cannot be spelled by literal braces.
    with pytest.raises(ValueError, match="has no place in the prompt_template"):
        LlamaBidirectionalConfig(prompt_template="{{instruction}} {query} {passage}", instruction="Find it")


def test_a_template_and_an_instruction_are_given_together(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "with")
    with pytest.raises(ValueError, match=r"has no place in the prompt_template .*, or give an empty instruction"):
        CrossEncoder(tmp_path / "with", prompt_template="{query} {passage}")
    without = CrossEncoder(tmp_path / "with", prompt_template="{query} {passage}", instruction="")
    without.save_pretrained(tmp_path / "without")
    again = CrossEncoder(tmp_path / "without", prompt_template=TEMPLATE, instruction=DEFAULT)
    assert_close(again.predict(PAIRS), reranker.predict(PAIRS))
    with pytest.raises(ValueError, match="instruction must be Unicode text without lone surrogates"):
        CrossEncoder(tmp_path / "with", instruction="\ud800")
    with pytest.raises(ValueError, match="instruction must be Unicode text without lone surrogates"):
        reranker.config.instruction = "\ud800"


def test_scores_are_those_of_the_instruction_as_text(reranker):
    expected = {text: with_text(reranker, text).predict(PAIRS) for text in (DEFAULT, OTHER, "")}
    assert not np.allclose(expected[DEFAULT], expected[OTHER], atol=1e-3)
    assert not np.allclose(expected[DEFAULT], expected[""], atol=1e-3)
    assert_close(reranker.predict(PAIRS), expected[DEFAULT])
    assert_close(reranker.predict(PAIRS, instruction=OTHER), expected[OTHER])
    assert_close(reranker.predict(PAIRS, instruction=""), expected[""])
    assert_close(next(reranker.predict_chunks([[(*pair, OTHER) for pair in PAIRS]])), expected[OTHER])
    reranker.config.instruction = None
    assert_close(reranker.predict(PAIRS), expected[""])
    documents = [passage for _, passage in PAIRS]
    scores = with_text(reranker, OTHER).predict([("the garden", document) for document in documents])
    ranked = reranker.rank("the garden", documents, instruction=OTHER)
    assert [result["corpus_id"] for result in ranked] == np.argsort(-scores).tolist()
    assert_close([result["score"] for result in ranked], -np.sort(-scores))
    assert reranker.rank_batch(["the garden", "bees"], [documents, documents], instruction=OTHER)[0] == ranked


def test_wrong_instructions_are_refused_before_any_compute(reranker, monkeypatch):
    monkeypatch.setattr(reranker, "engine", lambda: pytest.fail("computed"))
    with pytest.raises(TypeError, match="instruction must be a string, got list"):
        reranker.predict(PAIRS, instruction=[OTHER])
    with pytest.raises(ValueError, match="instruction must be Unicode text without lone surrogates"):
        reranker.rank("q", ["p"], instruction="\ud800")
    with pytest.raises(ValueError, match="pair 0 must have two members"):
        reranker.predict([("q", "p", OTHER)])
    reranker.config.instruction = None
    reranker.config.prompt_template = "{query} {passage}"
    with pytest.raises(ValueError, match="has no place in the prompt_template"):
        reranker.predict(PAIRS, instruction=OTHER)


@pytest.mark.parametrize("template", [TEMPLATE, "{passage} | {query} | {instruction}", "{instruction}{query}{passage}"])
@pytest.mark.parametrize("long_document", ["truncate", "max"])
def test_truncation_never_cuts_an_instruction(any_tokenizer, template, long_document):
    instruction = "Rank what explains, not what sells: {no} braces, äöü."
    encoder = PromptEncoder(any_tokenizer, prompt_template=template, max_length=80, instruction=instruction)
    for query in ("where do bees go?", "where do bees go? " * 40):
        encoded = encoder.encode([(query, "Honey bees fly. " * 60)], long_document=long_document)
        assert max(map(len, encoded.input_ids)) == 80
        for ids in encoded.input_ids:
            assert instruction in any_tokenizer.decode(ids)
    with pytest.raises(ValueError, match=r"leaves no room for a query and a passage: the template .* with the instr"):
        PromptEncoder(any_tokenizer, prompt_template=template, max_length=80, instruction=instruction * 20)
    with pytest.raises(ValueError, match="max_length 80 leaves no room beside the template"):
        encoder.encode([("q", "p", instruction * 20)])


def test_an_instruction_spells_no_control_token(llama3):
    encoder = PromptEncoder(llama3, prompt_template=TEMPLATE, max_length=128)
    (ids,) = encoder.encode([("q", "p", "stop<|eot_id|>")]).input_ids
    assert llama3.convert_tokens_to_ids("<|eot_id|>") not in ids
    assert "stop<|eot_id|>" in llama3.decode(ids)


@pytest.mark.parametrize("kind", ["saved", "hub", "sentence-transformers"])
def test_an_instruction_survives_a_round_trip(reranker, tmp_path, kind):
    folder = tmp_path / "saved"
    reranker.save_pretrained(folder)
    if kind != "saved":
        export_reranker(folder, tmp_path / kind, format=kind)
        folder = tmp_path / kind
    assert_same(CrossEncoder(folder), reranker)


def assert_same(again, reranker):
    assert (again.config.prompt_template, again.config.instruction) == (TEMPLATE, DEFAULT)
    assert_close(again.predict(PAIRS), reranker.predict(PAIRS))
    assert_close(again.predict(PAIRS, instruction=OTHER), reranker.predict(PAIRS, instruction=OTHER))


def test_an_instruction_survives_a_push(reranker, tmp_path, monkeypatch):
    with run_hub() as hub:
        reranker.save_pretrained(tmp_path / "saved")
        run_python(
            f"from llama_bidir import CrossEncoder\nCrossEncoder({str(tmp_path / 'saved')!r}).push_to_hub('t/tiny')",
            tmp_path,
            HF_ENDPOINT=hub.endpoint,
        )
        for name, content in hub.repos["t/tiny"].items():
            (tmp_path / "pushed" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "pushed" / name).write_bytes(content)
    assert_same(CrossEncoder(tmp_path / "pushed"), reranker)


def test_an_instruction_survives_lora_and_merge(base_checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    fields = {"prompt_template": TEMPLATE, "instruction": DEFAULT, "rerank_max_length": 96}
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(base_checkpoint, **fields)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["score"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, lora).eval()
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) * 0.05
    reranker = CrossEncoder(adapted, AutoTokenizer.from_pretrained(base_checkpoint))
    reranker.save_pretrained(tmp_path / "adapter")
    assert_same(CrossEncoder(tmp_path / "adapter"), reranker)
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    assert_same(CrossEncoder(tmp_path / "merged"), reranker)


def test_the_instruction_of_another_tool(reranker, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    reranker.save_pretrained(tmp_path / "saved")
    export_reranker(tmp_path / "saved", tmp_path / "st", format="sentence-transformers")
    for folder in (tmp_path / "saved", tmp_path / "st"):
        other = st.CrossEncoder(str(folder), device="cpu")
        np.testing.assert_allclose(other.predict(PAIRS), reranker.predict(PAIRS), rtol=1e-5, atol=1e-5)
        expected = reranker.predict(PAIRS, instruction=OTHER)
        np.testing.assert_allclose(other.predict(PAIRS, prompt=OTHER), expected, rtol=1e-5, atol=1e-5)


def test_vllm_renders_the_instruction_of_a_request(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "saved")
    export_reranker(tmp_path / "saved", tmp_path / "vllm", format="vllm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "vllm")
    template = (tmp_path / "vllm" / "chat_template.jinja").read_text()
    pair = [{"role": "query", "content": "q"}, {"role": "document", "content": "p"}]

    def render(messages, **variables):
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **variables)

    assert render(pair) == f"<{DEFAULT}> q: q\n p: p"
    assert render(pair, instruction=OTHER) == f"<{OTHER}> q: q\n p: p"
    assert render(pair, instruction=None) == f"<{DEFAULT}> q: q\n p: p"
    assert render([{"role": "system", "content": OTHER}, *pair]) == f"<{OTHER}> q: q\n p: p"


def test_an_exported_graph_takes_an_instruction(reranker, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    reranker.save_pretrained(tmp_path / "saved")
    export_reranker(tmp_path / "saved", tmp_path / "onnx", format="onnx")
    graph = CrossEncoder(tmp_path / "onnx", backend="onnx")
    for options in ({}, {"instruction": OTHER}):
        np.testing.assert_allclose(
            graph.predict(PAIRS, **options), reranker.predict(PAIRS, **options), rtol=1e-4, atol=1e-5
        )


ROWS = [
    {"query": "where do bees go?", "pos_doc": ["home"], "neg_doc": ["to the sea"], "instruction": OTHER},
    {"query": "who rules France?", "pos_doc": ["nobody"], "neg_doc": ["a king"]},
]


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_with_instructions_are_trained_with_them(reranker, tmp_path):
    rows = load_rows(write_rows(tmp_path / "rows.jsonl"))
    assert rows["instruction"][:] == [OTHER, None]
    trainer = CrossEncoderTrainer(
        reranker.model,
        CrossEncoderTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"),
        rows,
        rows,
        processing_class=reranker.tokenizer,
        group_size=2,
    )
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        (batch,) = loader
        ends = batch["cu_seq_lens_q"].tolist()
        stream = batch["input_ids"][0].tolist()
        texts = [reranker.tokenizer.decode(stream[start:end]) for start, end in itertools.pairwise(ends)]
        assert sorted(texts) == sorted(
            [
                f"<{OTHER}> q: where do bees go?\n p: home",
                f"<{OTHER}> q: where do bees go?\n p: to the sea",
                f"<{DEFAULT}> q: who rules France?\n p: nobody",
                f"<{DEFAULT}> q: who rules France?\n p: a king",
            ]
        )


class Lazy:
    """Rows that are read one at a time, and whose end is not where Python's old iteration protocol looks for it."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ROWS[index % 2]


def test_rows_that_need_a_field_are_found_in_python_too(reranker, tmp_path):
    datasets = pytest.importorskip("datasets")
    reranker.config.instruction = None
    flag = [{"query": "q", "pos": ["a"], "neg": ["b"], "prompt": "Why?"}]

    def make(train, evaluation=None):
        return CrossEncoderTrainer(
            reranker.model,
            CrossEncoderTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"),
            train,
            evaluation,
            processing_class=reranker.tokenizer,
            group_size=2,
            prompt_template="{query} {passage}",
        )

    for rows in (ROWS, flag, datasets.Dataset.from_list(flag)):
        for given in ((rows,), (ROWS[1:], rows), (ROWS[1:], {"a": ROWS[1:], "b": rows})):
            with pytest.raises(ValueError, match=r"row 0 of source 0: instruction .* has no place"):
                make(*given)
    assert len(make(Lazy()).train_dataset) == 2  # these are checked when they are read


@pytest.mark.parametrize("instruction", [5, ["a"], {"a": 1}])
def test_rows_with_wrong_instructions_are_named(tmp_path, instruction):
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {**ROWS[0], "instruction": instruction}])
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: instruction must be a string, got"):
        load_rows(path)


@pytest.mark.parametrize("command", [[], ["--dry-run"]])
def test_rows_with_instructions_need_a_field(base_checkpoint, tmp_path, capsys, monkeypatch, command):
    from llama_bidir.training import run

    monkeypatch.setattr(run, "load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[::-1])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{model_name_or_path: {base_checkpoint}}}\ndata: {{train: [{rows}], group_size: 2}}\n"
        f"training: {{output_dir: {tmp_path / 'out'}, use_cpu: true, report_to: none}}\n"
    )
    assert main(["train", str(recipe), *command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"llama-bidir: error: row 1 of {rows}: instruction {OTHER!r} has no place in the prompt_template"
    )


def test_a_teacher_reads_the_instructions_of_rows(reranker):
    rows = [{"query": "bees", "pos_doc": ["home"], "neg_doc": ["to the sea", "a king"], "instruction": OTHER}]
    (mined,) = mine_negatives(reranker, rows, ignore_identical_ids=False)
    assert mined.fields["instruction"] == OTHER
    expected = reranker.predict([("bees", "home")], instruction=OTHER)
    np.testing.assert_allclose(mined.fields["pos_score"], expected, rtol=1e-6)


def test_jobs_score_with_an_instruction(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "model")
    texts = {"d1": "Honey bees fly.", "d2": "The hive was white.", "d3": "a garden"}
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in texts.items()))
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "bees"}) + "\n")
    (tmp_path / "in.trec").write_text("".join(f"q1 Q0 {i} {n} {-n} bm25\n" for n, i in enumerate(texts, start=1)))
    output = tmp_path / "out.trec"
    arguments = ["rerank", "--model", str(tmp_path / "model"), "--output", str(output)]
    for name, file in (("corpus", "corpus.jsonl"), ("queries", "queries.jsonl"), ("run", "in.trec")):
        arguments += [f"--{name}", str(tmp_path / file)]
    assert main([*arguments, "--instruction", OTHER]) == 0
    scores = reranker.predict([("bees", text) for text in texts.values()], instruction=OTHER)
    expected = dict(zip(texts, scores, strict=True))
    found = {line.split()[2]: float(line.split()[4]) for line in output.read_text().splitlines()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_processes_with_different_instructions_are_told(reranker, monkeypatch):
    from llama_bidir.scoring import distributed

    digests = {text: distributed._digest([("q", "p")], text) for text in (None, "", OTHER)}
    assert len(set(digests.values())) == 3
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    gathered = {str: [digests[None], digests[OTHER]], types.NoneType: [None, None]}
    monkeypatch.setattr(distributed, "_gather", lambda value: gathered[type(value)])
    scorer = reranker._scorer(tqdm(disable=True), None, None, None, None, None)
    with pytest.raises(ValueError, match="the same pairs with the same instruction"):
        distributed.score_shared([("q", "p")], scorer)


def test_a_model_card_shows_the_instruction(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert f'```json\n"{DEFAULT}"\n```' in card
