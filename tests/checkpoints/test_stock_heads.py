"""Plain Llamas with a head that someone else trained: nobody's head is used in another way without being asked."""

import json

import numpy as np
import pytest
import torch
from helpers import ROWS, SEQUENCES, lines, logits_by_layout, make_tokenizer, tiny_config, write
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from llama_bidir import (
    CrossEncoder,
    LlamaBidirectionalConfig,
    LlamaBidirectionalForSequenceClassification,
    LlamaBidirectionalModel,
)
from llama_bidir.cli import main

STOCK = {"is_causal": True, "pooling": "last"}
LOADERS = {
    "CrossEncoder": CrossEncoder,
    "class": LlamaBidirectionalForSequenceClassification.from_pretrained,
    "body": LlamaBidirectionalModel.from_pretrained,
    "config": LlamaBidirectionalConfig.from_pretrained,
    "Auto class": lambda folder: AutoModelForSequenceClassification.from_pretrained(
        folder, config=LlamaBidirectionalConfig.from_pretrained(folder)
    ),
}


@pytest.fixture
def stock(tmp_path):
    """Saves a plain Llama with a head, and its tokenizer."""

    def stock(cls=LlamaForSequenceClassification, **fields):
        torch.manual_seed(5)
        model = cls(LlamaConfig(**tiny_config(pad_token_id=0, **fields))).eval()
        model.save_pretrained(tmp_path / "stock")
        make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(tmp_path / "stock")
        return model, tmp_path / "stock"

    return stock


def edit_config(folder, **fields):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_a_stock_head_is_refused_with_what_to_pass(stock, num_labels, loader):
    _, folder = stock(num_labels=num_labels)
    with pytest.raises(
        ValueError, match="stock' holds a LlamaForSequenceClassification, whose head was trained under "
    ) as error:
        LOADERS[loader](folder)
    assert "pass is_causal=True and pooling='last'" in str(error.value)
    assert "pass is_causal=False and pooling='avg'" in str(error.value)
    assert "ignore_mismatched_sizes" not in str(error.value)


@pytest.mark.parametrize(
    ("cls", "architecture"),
    [
        (LlamaForTokenClassification, None),
        (LlamaForQuestionAnswering, None),
        (LlamaForSequenceClassification, "LlamaForRewardModel"),
        (LlamaForSequenceClassification, "LlamaForRewardModelWithGating"),
        (LlamaForSequenceClassification, "LlamaForScore"),
        (LlamaForCausalLM, "AutoModelForCausalLMWithValueHead"),
    ],
)
@pytest.mark.parametrize("loader", LOADERS)
def test_other_heads_are_refused_by_name(stock, cls, architecture, loader):
    _, folder = stock(cls)
    if architecture is not None:
        edit_config(folder, architectures=[architecture])
    with pytest.raises(
        ValueError, match=f"holds a {architecture or cls.__name__}, whose head was trained under a causal"
    ):
        LOADERS[loader](folder)


@pytest.mark.parametrize("architectures", [None, ["LlamaForCausalLM"]])
def test_a_head_of_an_unknown_architecture_is_refused_too(stock, architectures):
    _, folder = stock(num_labels=1)
    edit_config(folder, architectures=architectures)
    with pytest.raises(
        ValueError, match=r"holds a score\.weight of a plain Llama, whose head was trained under a causal"
    ):
        CrossEncoder(folder)
    assert CrossEncoder(folder, model_kwargs=STOCK).config.is_causal


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_a_stock_head_scores_as_transformers_does(stock, num_labels, caplog):
    model, folder = stock(num_labels=num_labels)
    ours = LlamaBidirectionalForSequenceClassification.from_pretrained(folder, **STOCK)
    assert caplog.text == ""
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids])).logits for ids in SEQUENCES])
    for logits in logits_by_layout(ours, SEQUENCES).values():
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    reranker = CrossEncoder(folder, model_kwargs=STOCK)
    ids = reranker.tokenizer("question:a \n \n passage:b", return_tensors="pt").input_ids
    with torch.no_grad():
        np.testing.assert_allclose(reranker.predict(("a", "b")), model(ids).logits.squeeze(), rtol=1e-5, atol=1e-6)


def test_a_stock_head_is_taken_over_where_the_caller_says_so(stock, tmp_path, caplog):
    model, folder = stock()
    config = LlamaBidirectionalConfig.from_pretrained(folder, is_causal=False, pooling="avg")
    assert config.num_labels == 2
    ours = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    assert torch.equal(ours.score.weight, model.score.weight)
    ours.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert (again.config.pooling, again.config.is_causal, again.config.num_labels) == ("avg", False, 2)
    with pytest.raises(
        ValueError, match=r"has num_labels 1, so score\.weight should have shape \[1, 32\], .* \[2, 32\] in"
    ):
        CrossEncoder(folder, num_labels=1, model_kwargs=STOCK)


def test_a_pooling_alone_takes_a_head_over_with_a_warning(stock, caplog):
    _, folder = stock(num_labels=1)
    CrossEncoder(folder, model_kwargs={"pooling": "avg"})
    LlamaBidirectionalModel.from_pretrained(folder, pooling="avg")  # has no head, so there is nothing to say
    [said] = caplog.messages
    assert said.startswith(f"score.weight of {folder} was trained under a causal mask: with pooling='avg' and without ")
    assert said.endswith(
        "needs training before its scores mean anything. Pass is_causal too, to say which mask you want"
    )
    caplog.clear()
    CrossEncoder(folder, model_kwargs={"pooling": "avg", "is_causal": False})
    CrossEncoder(folder, model_kwargs={"pooling": "last"})
    assert caplog.text == ""


def test_heads_that_no_score_can_come_from_stay_refused(stock):
    _, folder = stock(LlamaForTokenClassification)
    with pytest.raises(ValueError, match=r"holds score\.bias, which this model does not have"):
        CrossEncoder(folder, model_kwargs=STOCK)
    _, folder = stock(LlamaForQuestionAnswering)
    with pytest.raises(ValueError, match=r"holds no weights of a Llama: .*the first is '(qa_outputs|transformer)"):
        CrossEncoder(folder, model_kwargs=STOCK)


def test_a_new_head_says_which_head_it_leaves_out(stock, caplog):
    _, folder = stock(LlamaForCausalLM)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "v_head.summary.weight": torch.ones(1, 32)}, folder / "model.safetensors", {"format": "pt"})
    CrossEncoder(folder)
    [said] = [line for line in caplog.messages if line.startswith("score.weight is new: ")]
    assert "stock has no score head that this model could use (v_head.summary.weight was left out), so one was" in said


@pytest.mark.parametrize("cls", [LlamaForCausalLM, LlamaModel])
@pytest.mark.parametrize("architectures", [..., None, ["LLaMAForCausalLM"]])
def test_plain_bases_need_no_argument(stock, cls, architectures, caplog):
    _, folder = stock(cls)
    if architectures is not ...:
        edit_config(folder, architectures=architectures)
    CrossEncoder(folder)
    assert [line.split(":")[0] for line in caplog.messages] == ["score.weight is new"]


def test_transformers_own_classes_are_left_alone(stock):
    model, folder = stock(num_labels=3)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(loaded) is LlamaForSequenceClassification
    assert torch.equal(loaded.score.weight, model.score.weight)


def test_training_asks_the_same_question(stock, tmp_path, capsys):
    _, folder = stock(num_labels=1)
    rows = write(tmp_path / "rows.jsonl", lines(*ROWS))
    recipe = {
        "model": {"model_name_or_path": str(folder)},
        "data": {"train": [str(rows)], "group_size": 2},
        "training": {"output_dir": str(tmp_path / "out"), "max_steps": 1, "use_cpu": True, "report_to": "none"},
    }
    path = write(tmp_path / "recipe.yaml", json.dumps(recipe))
    assert main(["train", str(path)]) == 2
    assert "holds a LlamaForSequenceClassification, whose head was trained" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
