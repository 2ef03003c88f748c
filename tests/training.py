"""What the tests of training share: rows that are learned in a few steps, and arguments for a CPU."""

import json
import shutil
from pathlib import Path
from typing import Any

WORDS = ["bees", "hive", "clover", "sun", "Paris", "France", "Seine", "garden", "flowers", "white"]
ROWS = [
    {
        "query": f"where is the {word}?",
        "pos_doc": [f"The {word} is here."],
        "neg_doc": [f"The {other} is here." for other in WORDS if other != word][: 3 + number % 3],
    }
    for number, word in enumerate(WORDS * 2)
]


def arguments(cls: Any, path: Any, **kwargs: Any) -> Any:
    fields = {
        "output_dir": str(path),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return cls(**{**fields, **kwargs})


def losses(trainer: Any) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def stop(finished: Path, stopped: Path, checkpoint: str) -> None:
    """Makes a folder as it is after a run was stopped behind one of its checkpoints."""
    stopped.mkdir()
    shutil.copytree(finished / checkpoint, stopped / checkpoint)
    run = json.loads((finished / "training_run.json").read_text())
    (stopped / "training_run.json").write_text(json.dumps({**run, "finished": False, "files": []}))
