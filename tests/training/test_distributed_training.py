import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROWS, lines, stop, write
from safetensors.torch import load_file

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from llama_bidir import CrossEncoder

SCRIPT = Path(__file__).parents[1] / "train_tiny.py"
FIELDS = ["max_steps=6", 'save_strategy="steps"', "save_steps=3", "per_device_eval_batch_size=3"]
MEASURES = ("eval_loss", "eval_accuracy@1", "eval_mrr@10", "eval_ndcg@10", "eval_tiny_ndcg@10", "eval_tiny_mrr@10")


@pytest.fixture(scope="module")
def train_in(tmp_path_factory, base_checkpoint):
    """Trains in one or two gloo processes on this CPU, and returns the output folder and the logs."""
    folder = tmp_path_factory.mktemp("distributed")
    train_rows, eval_rows = folder / "train.jsonl", folder / "eval.jsonl"
    # The fourth step ends an epoch with one group: the second process has none. Evaluation has an incomplete last batch
    # for each number of processes.
    for path, rows in ((train_rows, ROWS[:13]), (eval_rows, ROWS[:19])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    collection = folder / "collection"
    texts = list(dict.fromkeys(text for row in ROWS[:7] for text in (*row["pos_doc"], *row["neg_doc"])))
    write(collection / "corpus.jsonl", lines(*({"_id": f"d{n}", "text": text} for n, text in enumerate(texts))))
    write(collection / "queries.jsonl", lines(*({"_id": f"q{n}", "text": ROWS[n]["query"]} for n in range(7))))
    relevant = [f"q{n}\td{texts.index(ROWS[n]['pos_doc'][0])}\t1\n" for n in range(7)]
    write(collection / "qrels.tsv", "query-id\tcorpus-id\tscore\n" + "".join(relevant))
    run = [f"q{n} Q0 d{d} {d + 1} {-d} x\n" for n in range(7) for d in range(len(texts) - n)]
    write(collection / "run.trec", "".join(run))

    @cache
    def run(name, processes, *fields):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [
            str(SCRIPT),
            str(base_checkpoint),
            str(train_rows),
            str(eval_rows),
            str(folder / name),
            *FIELDS,
            *fields,
        ]
        environment = {**os.environ, "COLLECTION": str(collection)}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr
        return folder / name, json.loads((folder / name / "log_history.json").read_text())

    return run


@pytest.fixture(scope="module")
def alone(train_in):
    return train_in("alone", 1)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        ["fsdp=true", 'fsdp_config={"version": 2}'],
        ["fsdp=true", 'fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}'],
        ["max_pairs_per_forward=3"],
        ["max_pairs_per_forward=3", "fsdp=true", 'fsdp_config={"version": 2}'],
    ],
    ids=["ddp", "fsdp2-full", "fsdp2-sharded", "ddp-pieces", "fsdp2-pieces"],
)
def test_two_processes_equal_one(fields, alone, train_in, request):
    folder, history = alone
    other_folder, other_history = train_in(request.node.callspec.id, 2, *fields)
    first, other = ([entry["loss"] for entry in logs if "loss" in entry] for logs in (history, other_history))
    np.testing.assert_allclose(other, first, rtol=1e-4)
    measured, other_measured = (
        [[entry[name] for name in MEASURES] for entry in logs if "eval_loss" in entry]
        for logs in (history, other_history)
    )
    assert len(measured) == 2
    np.testing.assert_allclose(other_measured, measured, rtol=1e-4)
    for name, weight in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(load_file(other_folder / "model.safetensors")[name], weight, rtol=1e-4, atol=1e-5)
    pairs = [(row["query"], passage) for row in ROWS[:4] for passage in row["neg_doc"]]
    expected = CrossEncoder(folder).predict(pairs)
    for saved in (other_folder, other_folder / "checkpoint-6"):
        np.testing.assert_allclose(CrossEncoder(saved).predict(pairs), expected, rtol=1e-4, atol=1e-5)


def test_sharded_runs_resume(alone, train_in):
    fields = ["fsdp=true", 'fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}']
    folder, _ = train_in("fsdp2-sharded", 2, *fields)
    stop(folder, folder.with_name("stopped"), "checkpoint-3")
    resumed, history = train_in("stopped", 2, *fields)
    _, expected = alone
    last_losses, expected_losses = (
        [entry["loss"] for entry in logs if "loss" in entry][-3:] for logs in (history, expected)
    )
    np.testing.assert_allclose(last_losses, expected_losses, rtol=1e-4)
    assert (resumed / "config.json").exists()
