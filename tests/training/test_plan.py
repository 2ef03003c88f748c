import json
from types import SimpleNamespace

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import torch
from helpers import make_model
from transformers import AutoTokenizer

from llama_bidir.scoring.packing import PACKED_ATTENTION, pack
from llama_bidir.training import CrossEncoderTrainingArguments, DataArguments, ModelArguments, train
from llama_bidir.training.arguments import lora_config
from llama_bidir.training.lora import add_adapter
from llama_bidir.training.plan import _activations, _count_steps, _estimate_memory, plan
from llama_bidir.training.run import load_model

# The tiny checkpoint: embeddings, two layers (attention, feed-forward, norms), the last norm and the head.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
WEIGHTS = 320 * 32 + 2 * LAYER + 32 + 32
TEMPLATE = "question:{} \n \n passage:{}"


def make_rows():
    """Ten rows with 1, 2, 3 and 4 negatives in turn."""
    return [
        {
            "query": f"where is hive {n}?",
            "pos_doc": [f"Hive {n} is here. " + "clover " * n],
            "neg_doc": [f"{n} {k} " + "bees " * (4 * k) for k in range(n % 4 + 1)],
        }
        for n in range(10)
    ]


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    return path


def make_plan(base_checkpoint, rows_file, *, lora=None, model=None, data=None, **training):
    fields = {
        "output_dir": str(rows_file.parent / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "use_cpu": True,
        "report_to": "none",
        **training,
    }
    arguments = (
        ModelArguments(model_name_or_path=str(base_checkpoint), **(model or {})),
        DataArguments(**{"train": [str(rows_file)], "rerank_max_length": 40, **(data or {})}),
        CrossEncoderTrainingArguments(**fields),
        lora,
    )
    return plan(*arguments), arguments


def test_data(base_checkpoint, rows_file):
    entry = {"path": str(rows_file), "weight": 0.5}
    report, _ = make_plan(base_checkpoint, rows_file, data={"train": [str(rows_file), entry], "eval": [str(rows_file)]})
    path = str(rows_file)
    assert report.sources == [
        ("train", path, 10, 0, 1.0, 10),
        ("train", path, 10, 0, 0.5, 5),
        ("eval", path, 10, 0, 1.0, 10),
    ]
    assert report.groups == 15


@pytest.mark.parametrize("short_groups", ["mask", "repeat"])
def test_passages(short_groups, base_checkpoint, rows_file):
    report, _ = make_plan(base_checkpoint, rows_file, data={"short_groups": short_groups})
    assert report.passages == (2, 5, pytest.approx(3.3), 8)
    fate = "are smaller" if short_groups == "mask" else "show negatives again"
    assert f"8 groups have fewer than 5 passages and {fate}\n" in report.format()


def test_lengths_and_first_prompt(base_checkpoint, rows_file):
    report, _ = make_plan(base_checkpoint, rows_file)
    tokenizer = AutoTokenizer.from_pretrained(base_checkpoint)
    texts = [
        TEMPLATE.format(row["query"], passage) for row in make_rows() for passage in [*row["pos_doc"], *row["neg_doc"]]
    ]
    expected = sorted(len(tokenizer(text)["input_ids"]) for text in texts)
    assert sorted(report.lengths.lengths) == expected
    num_long = sum(length > 40 for length in expected)
    assert 0 < num_long < len(expected)
    assert report.lengths.num_truncated == num_long
    assert [name for name, _ in report.lengths.buckets()] == [
        *(f"{low} to {low + 4}" for low in range(1, 41, 5)),
        "over 40",
    ]
    assert sum(count for _, count in report.lengths.buckets()) == len(expected) == 33
    assert report.lengths.buckets()[-1] == ("over 40", num_long)
    assert report.first_prompt == "question:where is hive 0? \n \n passage:Hive 0 is here. "
    text = report.format()
    assert "tokens of a pair (a sample: 10 of 10 groups, 33 pairs)" in text
    assert f"{num_long} of 33 pairs ({num_long / 33:.1%}) are longer than 40 and are cut" in text


def test_the_sample_is_drawn_by_the_seed(base_checkpoint, rows_file, monkeypatch):
    monkeypatch.setattr("llama_bidir.training.plan.SAMPLE_GROUPS", 3)
    first, again, other = (make_plan(base_checkpoint, rows_file, seed=seed)[0].lengths for seed in (1, 1, 2))
    assert first.num_groups == 3
    assert first == again
    assert first != other


def test_steps_are_those_of_the_trainer(base_checkpoint, rows_file):
    report, arguments = make_plan(base_checkpoint, rows_file, save_strategy="no", disable_tqdm=True)
    assert report.steps == (1, 2, 2, 3, 6)  # 5 batches of 2 make 3 steps
    assert train(*arguments).state.max_steps == 6
    assert make_plan(base_checkpoint, rows_file, max_steps=7)[0].steps.total == 7


@pytest.mark.parametrize(
    ("groups", "local", "processes", "accumulation", "drop_last", "an_epoch"),
    [
        (100, 4, 1, 8, False, 4),  # 25 batches
        (100, 4, 8, 1, False, 4),  # 25 batches, 4 a process
        (100, 4, 8, 1, True, 3),  # 25 batches, 3 a process
        (103, 4, 2, 2, True, 6),  # 25 batches, 12 a process
        (3, 4, 8, 4, False, 1),
    ],
)
def test_steps_of_several_processes(groups, local, processes, accumulation, drop_last, an_epoch):
    args = SimpleNamespace(
        train_batch_size=local,
        world_size=processes,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=drop_last,
        max_steps=-1,
        num_train_epochs=1.5,
    )
    steps = _count_steps(groups, args)
    assert steps.an_epoch == an_epoch
    assert steps.total == -(-3 * an_epoch // 2)
    assert steps.groups == local * processes * accumulation


def test_memory_of_all_weights(base_checkpoint, rows_file):
    report, _ = make_plan(base_checkpoint, rows_file)
    assert WEIGHTS == report.num_weights == report.num_trained == 25_792
    tokens = 2 * 5 * 40
    # In float32, a token and layer: 8 vectors of 32, keys and values of 16, and 4 vectors of 48.
    token = 2 * 4 * (8 * 32 + 2 * 16 + 4 * 48)
    assert [part[:2] for part in report.memory] == [
        ("weights", 4 * 25_792),
        ("gradients", 4 * 25_792),
        ("optimizer (adamw_torch_fused)", 8 * 25_792),
        ("activations", tokens * token),
    ]
    assert report.memory[0].arithmetic == "25,792 x 4 bytes"
    assert report.memory[3].arithmetic == "400 tokens x 3,840 bytes, if all pairs are as long as the longest"
    text = report.format()
    assert "memory of a process (an estimate; 25,792 of 25,792 weights are trained)" in text
    assert "weights                        103.2 kB  25,792 x 4 bytes\n" in text


def test_memory_of_bfloat16(base_checkpoint, rows_file):
    report, _ = make_plan(base_checkpoint, rows_file, bf16=True, gradient_checkpointing=True, optim="sgd")
    linear = 2 * (LAYER - 2 * 32) + 32
    layer = 4 * 4 * 32 + 2 * (7 * 32 + 2 * 16 + 4 * 48)
    assert [part[:2] for part in report.memory] == [
        ("weights", 4 * 25_792),
        ("gradients", 4 * 25_792),
        ("optimizer (sgd)", 0),
        ("half-precision copies", 2 * linear),
        ("activations", 400 * (2 * 4 * 32 + layer)),
    ]


def test_memory_of_an_adapter(base_checkpoint, rows_file):
    report, arguments = make_plan(base_checkpoint, rows_file, lora={"r": 4}, model={"dtype": "bfloat16"})
    # Rank 4 on the seven linear layers of each layer; the head is trained beside its frozen copy.
    adapter = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert (report.num_trained, report.num_weights) == (adapter + 32, 25_792 + adapter + 32)
    model = add_adapter(load_model(*arguments[:2], has_adapter=True), lora_config({"r": 4}))
    assert report.memory[0].num_bytes == sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert report.memory[1][:2] == ("gradients", 4 * (adapter + 32))


def test_memory_of_4_bits(base_checkpoint, rows_file):
    report, _ = make_plan(base_checkpoint, rows_file, lora={"r": 4}, model={"dtype": "bfloat16", "load_in_4bit": True})
    linear = 2 * (LAYER - 2 * 32)
    others = report.num_weights - linear
    assert report.memory[0].num_bytes == int(4 * others + linear * (1 / 2 + 1 / 64 + 4 / (64 * 256)))
    assert report.memory[0].arithmetic == f"{others:,} x 4 bytes + {linear:,} x 0.5159 bytes"


@pytest.mark.parametrize("fsdp", [True, False])
def test_memory_of_several_processes(fsdp):
    args = SimpleNamespace(
        world_size=4,
        fsdp=fsdp,
        fsdp_config={"activation_checkpointing": True},
        bf16=True,
        fp16=False,
        optim="adamw_torch",
        gradient_checkpointing=False,
    )
    model_args = SimpleNamespace(load_in_4bit=False)
    parts = {part.name: part for part in _estimate_memory(make_model(), model_args, args, num_tokens=100)}
    if fsdp:
        assert parts["weights"] == ("weights", 25_792, "25,792 x 4 bytes / 4 shards (FSDP)")
        assert parts["gradients"].num_bytes == 25_792
        assert parts["optimizer (adamw_torch)"].num_bytes == 2 * 25_792
        assert parts["gathered weights"].num_bytes == 2 * 25_792  # the model has no more than two layers
        assert parts["activations"].num_bytes == 100 * (2 * 128 + 1408)
    else:
        assert parts["weights"].num_bytes == 4 * 25_792
        assert parts["gradient buckets"].num_bytes == 4 * 25_792
        assert parts["activations"].num_bytes == 100 * 2 * 1408


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_activations_are_what_autograd_keeps(is_packed, is_half):
    model = make_model(hidden_size=128, intermediate_size=512, num_hidden_layers=4).train()
    if is_packed:
        model.set_attn_implementation(PACKED_ATTENTION)
    ids = torch.randint(0, 320, (10, 64))
    inputs = pack(ids.tolist()) if is_packed else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_half),
    ):
        model(**inputs)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    measured = sum(size for pointer, size in storages.items() if pointer not in weights)
    if is_half:  # the copies of the linear layers, which the plan counts by themselves
        linear = (module.weight for module in model.modules() if isinstance(module, torch.nn.Linear))
        measured -= 2 * sum(weight.numel() for weight in linear)
    args = SimpleNamespace(gradient_checkpointing=False, fsdp=False, fsdp_config=None)
    assert _activations(model.config, args, 640, is_half=is_half).num_bytes == pytest.approx(measured, rel=0.15)


def test_output(base_checkpoint, rows_file):
    before = sorted(rows_file.parent.iterdir())
    report, arguments = make_plan(base_checkpoint, rows_file, disable_tqdm=True, max_steps=2, save_steps=1)
    output = arguments[2].output_dir
    assert report.output == output
    assert sorted(rows_file.parent.iterdir()) == before
    train(*arguments)
    assert plan(*arguments).output == f"{output} holds a finished reranker, which only --overwrite replaces"
    (rows_file.parent / "out" / "training_run.json").unlink()
    (rows_file.parent / "out" / "config.json").unlink()
    assert plan(*arguments).output == f"{output}, going on from checkpoint-2"


def test_bad_rows(base_checkpoint, rows_file):
    with rows_file.open("a") as file:
        file.write('{"query": "q"}\n{"query": 5}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:11: pos_doc is missing"):
        make_plan(base_checkpoint, rows_file)
    report, _ = make_plan(base_checkpoint, rows_file, data={"skip_bad_rows": True})
    assert report.sources == [("train", str(rows_file), 10, 2, 1.0, 10)]


def test_a_row_that_makes_no_group(base_checkpoint, rows_file):
    with rows_file.open("a") as file:
        file.write('{"query": "q", "pos_doc": ["a"]}\n')
    with pytest.raises(ValueError, match=r"row 10 .query .q.. has no neg_doc beside its positives"):
        make_plan(base_checkpoint, rows_file)


def test_what_can_not_be_read_is_named_at_once(base_checkpoint, rows_file, tmp_path):
    gone = tmp_path / "gone"
    arguments = (
        ModelArguments(model_name_or_path=str(gone)),
        DataArguments(train=[f"{gone}.jsonl", str(rows_file)], eval=["hf://org/repo/subset"]),
        CrossEncoderTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none"),
    )
    with pytest.raises(FileNotFoundError) as error_info:
        plan(*arguments)
    checkpoint, train_source, eval_source = str(error_info.value).split("; ")
    assert checkpoint.startswith(f"model.model_name_or_path: '{gone}' is not a checkpoint: there is no such folder.")
    assert checkpoint.endswith("(--model.model_name_or_path names another)")
    assert train_source.startswith("data.train: ")
    assert f"{gone}.jsonl" in train_source
    assert train_source.endswith("(--data.train names another)")
    assert eval_source.startswith("data.eval: hf://org/repo/subset: cannot be read from the Hub")
    assert eval_source.endswith("(--data.eval names another)")


def test_a_checkpoint_on_the_hub_that_can_not_be_reached(rows_file):
    with pytest.raises(FileNotFoundError, match=r"^model\.model_name_or_path: .*org/model.* names another\)$"):
        make_plan("org/model", rows_file)


def test_no_source():
    arguments = (ModelArguments(model_name_or_path="m"), DataArguments(), CrossEncoderTrainingArguments(use_cpu=True))
    with pytest.raises(ValueError, match=r"data\.train must name at least one source of training rows"):
        plan(*arguments)
