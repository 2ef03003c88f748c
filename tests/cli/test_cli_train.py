import json
import subprocess
import sys

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import numpy as np
import torch

from llama_bidir import CrossEncoder
from llama_bidir.cli import main

PAIRS = [("where is hive 1?", "Hive 1 is here."), ("where is hive 1?", "Hive 2 is there."), ("bees", "")]


@pytest.fixture
def rows_file(tmp_path):
    """Rows in NeMo AutoModel's corpus-id layout: 12 questions with 1 to 4 negatives of a corpus of 16 documents."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "merlin_metadata.json").write_text(json.dumps({"class": "TextQADataset", "corpus_id": "hives"}))
    documents = [{"id": f"d{n}", "text": f"Hive {n} is here. " + "bees " * n} for n in range(16)]
    (corpus / "train.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    rows = [
        {
            "question_id": f"q{n}",
            "question": f"where is hive {n}?",
            "corpus_id": "hives",
            "pos_doc": [{"id": f"d{n}"}],
            "neg_doc": [{"id": f"d{n + k + 1}"} for k in range(n % 4 + 1)],
        }
        for n in range(12)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"corpus": {"path": "corpus"}, "data": rows}))
    return path


@pytest.fixture
def train_command(base_checkpoint, rows_file, tmp_path):
    """Returns a function that makes a command line for training 4 steps, of which 3 are an epoch."""

    def command(recipe="llama3_2_1b", *options):
        values = {
            "model.model_name_or_path": base_checkpoint,
            "data.train": rows_file,
            "data.rerank_max_length": 40,
            "training.output_dir": tmp_path / "out",
            "training.global_batch_size": 4,
            "training.max_steps": 4,
        }
        return ["train", recipe, *(f"--{key}={value}" for key, value in values.items()), *options]

    return command


def test_dry_run(train_command, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert main(train_command("llama3_2_1b", "--dry-run")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "data"
    assert printed[2].split() == ["train", str(tmp_path / "rows.json"), "12", "0", "1", "12"]
    assert printed[3:6] == [
        "  12 groups per epoch with 2 to 5 passages, 3.50 on average",
        "  9 groups have fewer than 5 passages and repeat negatives",
        "tokens per pair (a sample: 12 of 12 groups, 42 pairs)",
    ]
    assert printed[8:14] == [
        "first prompt",
        "  'question:where is hive 0? \\n \\n passage:Hive 0 is here. '",
        "steps",
        "  4 groups per step = 1 (processes) x 4 (groups at once) x 1 (accumulated); at most 20 pairs",
        "  3 per epoch, 4 in total",
        "memory per process (an estimate)",
    ]
    assert printed[-1] == f"  {tmp_path / 'out'}"
    assert sorted(tmp_path.iterdir()) == before


def test_train_with_evaluation(train_command, rows_file, tmp_path, capsys):
    options = ["--data.eval", str(rows_file), str(rows_file), "--eval-steps", "2", "--lr-scheduler-type", "constant"]
    assert main(train_command("llama3_2_1b", *options)) == 0
    printed = capsys.readouterr().out.splitlines()
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4]
    measures = {name: evaluations[-1][f"eval_{name}"] for name in ("loss", "accuracy@1", "mrr@10", "ndcg@10")}
    assert printed[-2:] == [
        "evaluation at step 4: " + ", ".join(f"{name} {value:.4f}" for name, value in measures.items()),
        f"reranker: {tmp_path / 'out'}",
    ]
    config = CrossEncoder(tmp_path / "out").config
    assert (config.pooling, config.rerank_max_length, config.dtype) == ("avg", 40, torch.bfloat16)


def test_a_finished_reranker_is_replaced_only_with_overwrite(train_command, tmp_path, capsys):
    assert main(train_command("llama3_2_1b")) == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert main(train_command("llama3_2_1b", "--seed", "7")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"llama-bidir: error: '{tmp_path / 'out'}' holds a finished reranker: pass overwrite (--ov")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert main(train_command("llama3_2_1b", "--seed", "7", "--overwrite")) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != weights


def test_adapter_and_merge(train_command, tmp_path, capsys):
    options = ["--lora.r", "4", "--model.dtype", "float32", "--lr-scheduler-type", "constant", "--learning-rate=1e-1"]
    assert main(train_command("llama3_2_1b_lora", *options)) == 0
    adapter, merged = tmp_path / "out", tmp_path / "merged"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"adapter: {adapter}",
        f"to make it a plain checkpoint: llama-bidir merge --adapter {adapter} --output {adapter}-merged",
    ]
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    assert main(["merge", "--adapter", str(adapter), "--output", str(merged)]) == 0
    assert capsys.readouterr().out == f"reranker: {merged}\n"
    scores = CrossEncoder(merged).predict(PAIRS)
    np.testing.assert_allclose(scores, CrossEncoder(adapter).predict(PAIRS), rtol=1e-4, atol=1e-5)
    assert main(["merge", "--adapter", str(adapter), "--output", str(merged)]) == 2
    assert capsys.readouterr().err == (
        f"llama-bidir: error: '{merged}' exists: pass overwrite (--overwrite) to replace it, or choose another output\n"
    )
    assert main(["merge", "--adapter", str(merged), "--output", str(merged), "--overwrite"]) == 2
    assert "has no adapter_config.json: it is a whole checkpoint already" in capsys.readouterr().err


def test_bad_rows(train_command, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "q", "pos_doc": ["a"], "neg_doc": ["b", "c"]}\n{"query": "q"}\n')
    options = ["--dry-run", f"--data.train={rows}"]
    assert main(train_command("llama3_2_1b", *options)) == 2
    assert capsys.readouterr().err == f"llama-bidir: error: {rows}:2: pos_doc is missing; " + (
        "it must be a passage or a list of passages\n"
    )
    assert main(train_command("llama3_2_1b", *options, "--skip-bad-rows")) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["train", str(rows), "1", "1", "1", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "nope",
            "there is no recipe 'nope': pass a YAML file or one of llama3_1_8b, llama3_2_1b, llama3_2_1b_lora, qui",
        ),
        (
            "llama3_2_1b --training.learning_rat 1",
            "unknown option '--training.learning_rat'; the nearest is '--training.l",
        ),
        ("llama3_2_1b --overwrit", "unknown option '--overwrit'; the nearest is '--overwrite'"),
        ("llama3_2_1b --training.learning_rate x", "llama3_2_1b: training: learning_rate must be a number, got 'x'"),
        ("llama3_2_1b --training.max_steps -1.5", "llama3_2_1b: training: max_steps must be a whole number, got -1.5"),
        ("llama3_2_1b --data.train=", "data.train must name at least one source of training rows"),
        ("llama3_2_1b --data.train= --dry-run", "data.train must name at least one source of training rows"),
    ],
)
def test_user_errors_are_one_line(arguments, message, tmp_path, capsys):
    assert main(["train", *arguments.split(), "--training.output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"llama-bidir: error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_exist(train_command, capsys):
    assert main(train_command("llama3_2_1b", "--model.model_name_or_path", "org/model")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("llama-bidir: error: ")
    assert "Traceback" not in error


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no recipe 'nope'"):
        main(["train", "nope", "--debug"])


@pytest.mark.slow
def test_two_processes_print_once(train_command, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "llama_bidir", *train_command("llama3_2_1b", "--training.global_batch_size=8")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "training.fsdp is left out" not in result.stderr
    assert result.stdout.splitlines()[-1] == f"reranker: {tmp_path / 'out'}"
    assert result.stdout.count("reranker: ") == 1
    assert np.isfinite(CrossEncoder(tmp_path / "out").predict(PAIRS)).all()
