import json
import logging

import pytest
from helpers import ROWS, arguments, make_model, make_tokenizer

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from llama_bidir import CrossEncoderTrainer, CrossEncoderTrainingArguments
from llama_bidir.training import read_history
from llama_bidir.training.checkpoints import RUN_NAME, check_same_run, is_finished, remove_run


def test_history_and_curves_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    trainer = CrossEncoderTrainer(
        make_model(),
        arguments(CrossEncoderTrainingArguments, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2),
        ROWS,
        ROWS[:4],
        make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"),
    )
    trainer.train()
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert history == trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in history if "eval_ndcg@10" in entry] == [2, 4]
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_lines_that_are_not_logs_are_left_out(tmp_path, caplog):
    entries = [{"loss": 0.5, "step": 1}, {"loss": 0.25, "step": 2.0}]
    bad = [b"\xff\xfe", b'{"loss": 1', b"[]", b"7", b'{"loss": 1}', b'{"step": "2"}', b"[" * 100_000]
    lines = [json.dumps(entries[0]).encode(), *bad, json.dumps(entries[1]).encode()]
    path = tmp_path / "history.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with caplog.at_level(logging.WARNING):
        assert read_history(path) == entries
    assert caplog.messages == [f"{path}: ignored a line that is not the log of a step: {line[:80]!r}" for line in bad]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{}", b'{"finished": true}', b"[" * 100_000])
@pytest.mark.parametrize("read", [is_finished, remove_run, lambda output: check_same_run(output, {})])
def test_a_damaged_record_of_a_run_is_named(tmp_path, read, content):
    (tmp_path / RUN_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=r"training_run\.json is not the record of a training run: move it away, or "):
        read(tmp_path)
