import itertools
import json
import shutil
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
from llama_bidir.training.plan import bytes_per_token, count_steps, estimate_memory, plan

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


def section(report, title):
    """The lines of a section, without their indent."""
    lines = iter(report.splitlines())
    assert any(line.startswith(title) for line in lines), title
    return [line.strip() for line in itertools.takewhile(lambda line: line.startswith("  "), lines)]


def test_data(base_checkpoint, rows_file):
    entry = {"path": str(rows_file), "weight": 0.5}
    report, _ = make_plan(base_checkpoint, rows_file, data={"train": [str(rows_file), entry], "eval": [str(rows_file)]})
    lines = section(report, "data")
    path = str(rows_file)
    assert [line.split() for line in lines[:4]] == [
        ["source", "rows", "bad", "rows", "weight", "groups"],
        ["train", path, "10", "0", "1", "10"],
        ["train", path, "10", "0", "0.5", "5"],
        ["eval", path, "10", "0", "1", "10"],
    ]
    assert lines[4].startswith("15 groups per epoch")


@pytest.mark.parametrize(("short_groups", "fate"), [("mask", "are smaller"), ("repeat", "repeat negatives")])
def test_passages(short_groups, fate, base_checkpoint, rows_file):
    report, _ = make_plan(base_checkpoint, rows_file, data={"short_groups": short_groups})
    assert section(report, "data")[2:] == [
        "10 groups per epoch with 2 to 5 passages, 3.30 on average",
        f"8 groups have fewer than 5 passages and {fate}",
    ]


def test_lengths_and_first_prompt(base_checkpoint, rows_file):
    report, _ = make_plan(base_checkpoint, rows_file)
    tokenizer = AutoTokenizer.from_pretrained(base_checkpoint)
    texts = [
        TEMPLATE.format(row["query"], passage) for row in make_rows() for passage in [*row["pos_doc"], *row["neg_doc"]]
    ]
    lengths = sorted(len(tokenizer(text)["input_ids"]) for text in texts)
    num_long = sum(length > 40 for length in lengths)
    assert 0 < num_long < len(lengths) == 33
    assert section(report, "tokens per pair (a sample: 10 of 10 groups, 33 pairs)") == [
        f"median {lengths[16]}, longest {lengths[-1]}",
        f"{num_long} of 33 pairs ({num_long / 33:.1%}) are longer than 40 and are cut",
    ]
    assert section(report, "first prompt") == [repr("question:where is hive 0? \n \n passage:Hive 0 is here. ")]


def test_the_sample_is_drawn_by_the_seed(base_checkpoint, rows_file, monkeypatch):
    monkeypatch.setattr("llama_bidir.training.plan.SAMPLE_GROUPS", 3)
    first, again, other = (
        section(make_plan(base_checkpoint, rows_file, seed=seed)[0], "tokens per pair (a sample: 3 of 10 groups")
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_steps_are_those_of_the_trainer(base_checkpoint, rows_file):
    report, arguments = make_plan(base_checkpoint, rows_file, save_strategy="no", disable_tqdm=True)
    assert section(report, "steps") == [
        "4 groups per step = 1 (processes) x 2 (groups at once) x 2 (accumulated); at most 20 pairs",
        "3 per epoch, 6 in total",  # 5 batches of 2 groups make 3 steps
    ]
    assert train(*arguments).state.max_steps == 6
    assert section(make_plan(base_checkpoint, rows_file, max_steps=7)[0], "steps")[1] == "3 per epoch, 7 in total"


@pytest.mark.parametrize(
    ("groups", "local", "processes", "accumulation", "drop_last", "per_epoch"),
    [
        (100, 4, 1, 8, False, 4),  # 25 batches
        (100, 4, 8, 1, False, 4),  # 25 batches, 4 per process
        (100, 4, 8, 1, True, 3),  # 25 batches, 3 per process
        (103, 4, 2, 2, True, 6),  # 25 batches, 12 per process
        (3, 4, 8, 4, False, 1),
    ],
)
def test_steps_of_several_processes(groups, local, processes, accumulation, drop_last, per_epoch):
    args = SimpleNamespace(
        train_batch_size=local,
        world_size=processes,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=drop_last,
        max_steps=-1,
        num_train_epochs=1.5,
    )
    assert count_steps(groups, args) == (per_epoch, -(-3 * per_epoch // 2))


def memory_args(**fields):
    defaults = {
        "world_size": 1,
        "fsdp": False,
        "fsdp_config": None,
        "bf16": False,
        "fp16": False,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
    }
    return SimpleNamespace(**{**defaults, **fields})


# Per token and layer in float32: 8 vectors of 32, keys and values of 16, and 4 vectors of 48.
FLOAT32_TOKEN = 2 * 4 * (8 * 32 + 2 * 16 + 4 * 48)
# In bfloat16: 4 vectors of 32 in float32; 7 vectors of 32, keys and values of 16, and 4 vectors of 48 in bfloat16.
BFLOAT16_LAYER = 4 * 4 * 32 + 2 * (7 * 32 + 2 * 16 + 4 * 48)


def test_memory_of_all_weights():
    assert WEIGHTS == 25_792
    memory = estimate_memory(make_model(), memory_args(), num_tokens=400)
    assert memory == (4 * WEIGHTS, (4 + 8) * WEIGHTS, 400 * FLOAT32_TOKEN)


def test_memory_of_bfloat16_with_checkpointing():
    linear = 2 * (LAYER - 2 * 32) + 32
    args = memory_args(bf16=True, gradient_checkpointing=True, optim="sgd")
    memory = estimate_memory(make_model(), args, num_tokens=400)
    assert memory == (4 * WEIGHTS + 2 * linear, 4 * WEIGHTS, 400 * (2 * 4 * 32 + BFLOAT16_LAYER))


def test_memory_of_several_processes():
    memory = estimate_memory(make_model(), memory_args(world_size=4, bf16=True), num_tokens=100)
    linear = 2 * (LAYER - 2 * 32) + 32
    # DDP sums the gradients in buckets of their size.
    assert memory == (4 * WEIGHTS + 2 * linear, (4 + 8 + 4) * WEIGHTS, 100 * 2 * BFLOAT16_LAYER)


def test_memory_of_sharded_weights():
    args = memory_args(world_size=4, bf16=True, fsdp=True, fsdp_config={"activation_checkpointing": True})
    memory = estimate_memory(make_model(num_hidden_layers=4), args, num_tokens=100)
    weights = WEIGHTS + 2 * LAYER
    # Beside its quarter, a process gathers all weights but those of two layers in bfloat16.
    expected_activations = 100 * (4 * 4 * 32 + BFLOAT16_LAYER)
    assert memory == (weights + 2 * (weights - 2 * LAYER), 3 * weights, expected_activations)


def make_adapter(model):
    """Rank 4 on the seven linear layers of each layer; the head is trained beside its frozen copy."""
    num_trained = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)) + 32
    return add_adapter(model, lora_config({"r": 4})), num_trained


def test_memory_of_an_adapter():
    model, num_trained = make_adapter(make_model().bfloat16())
    memory = estimate_memory(model, memory_args(), num_tokens=0)
    assert memory == (2 * WEIGHTS + 4 * num_trained, (4 + 8) * num_trained, 0)


def test_memory_of_4_bits():
    model, num_trained = make_adapter(make_model().bfloat16())
    linear = 2 * (LAYER - 2 * 32)
    memory = estimate_memory(model, memory_args(), num_tokens=0, is_4bit=True)
    others = WEIGHTS - linear + num_trained
    assert memory.weights == int(4 * others + linear * (1 / 2 + 1 / 64 + 4 / (64 * 256)))


def test_memory_is_printed_as_one_sum(base_checkpoint, rows_file):
    report, _ = make_plan(base_checkpoint, rows_file)
    # 2 groups of 5 passages of 40 tokens: 103,168 + 309,504 + 1,536,000 bytes.
    assert section(report, "memory per process (an estimate)") == [
        "1.9 MB = weights 103.2 kB + gradients and optimizer 309.5 kB + activations 1.5 MB",
        "25,792 of 25,792 weights are trained; activations are those of 400 tokens, if all pairs are as long as the "
        "longest",
    ]
    report, _ = make_plan(base_checkpoint, rows_file, lora={"r": 4}, model={"dtype": "bfloat16"})
    assert section(report, "memory")[1].startswith("3,744 of 29,536 weights are trained; ")


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
    if is_half:  # the copies of the linear layers, which the plan counts among the weights
        linear = (module.weight for module in model.modules() if isinstance(module, torch.nn.Linear))
        measured -= 2 * sum(weight.numel() for weight in linear)
    assert bytes_per_token(model.config, memory_args(bf16=is_half)) * 640 == pytest.approx(measured, rel=0.1)


def test_output(base_checkpoint, rows_file):
    before = sorted(rows_file.parent.iterdir())
    report, arguments = make_plan(base_checkpoint, rows_file, disable_tqdm=True, max_steps=2, save_steps=1)
    output = arguments[2].output_dir
    assert section(report, "output") == [output]
    assert sorted(rows_file.parent.iterdir()) == before
    train(*arguments)
    assert section(plan(*arguments), "output") == [
        f"{output} holds a finished reranker, which only --overwrite replaces"
    ]
    assert section(plan(*arguments, overwrite=True), "output") == [f"{output}, after its former run is removed"]
    (rows_file.parent / "out" / "training_run.json").unlink()
    (rows_file.parent / "out" / "config.json").unlink()
    assert section(plan(*arguments), "output") == [f"{output}, resuming from checkpoint-2"]


def test_bad_rows(base_checkpoint, rows_file):
    with rows_file.open("a") as file:
        file.write('{"query": "q"}\n{"query": 5}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:11: pos_doc is missing"):
        make_plan(base_checkpoint, rows_file)
    report, _ = make_plan(base_checkpoint, rows_file, data={"skip_bad_rows": True})
    assert section(report, "data")[1].split() == ["train", str(rows_file), "10", "2", "1", "10"]


def test_a_row_that_cannot_make_a_group(base_checkpoint, rows_file):
    with rows_file.open("a") as file:
        file.write('{"query": "q", "pos_doc": ["a"]}\n')
    with pytest.raises(ValueError, match=r"row 10 .query .q.. has no neg_doc beside its positives"):
        make_plan(base_checkpoint, rows_file)


def test_everything_that_cannot_be_read_is_named_in_one_error(base_checkpoint, rows_file, tmp_path):
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


def test_a_checkpoint_on_the_hub_that_cannot_be_reached(rows_file):
    with pytest.raises(FileNotFoundError, match=r"^model\.model_name_or_path: .*org/model.* names another\)$"):
        make_plan("org/model", rows_file)


def test_no_source():
    arguments = (ModelArguments(model_name_or_path="m"), DataArguments(), CrossEncoderTrainingArguments(use_cpu=True))
    with pytest.raises(ValueError, match=r"data\.train must name at least one source of training rows"):
        plan(*arguments)


def test_a_checkpoint_that_does_not_fit_is_refused_before_its_layers_are_counted(base_checkpoint, rows_file, tmp_path):
    folder = shutil.copytree(base_checkpoint, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match=f"num_hidden_layers is {10**9}, but the checkpoint holds 2 layers"):
        make_plan(folder, rows_file)
