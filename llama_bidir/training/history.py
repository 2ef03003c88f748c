"""The history of a training run: every log as a line of JSON, and the curves as a picture."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..utils.extras import require
from ..utils.outputs import write_whole

logger = logging.getLogger(__name__)

HISTORY_NAME = "history.jsonl"
PLOT_NAME = "training.png"
FIRST_STAGE = "first-stage run"


class HistoryCallback(TrainerCallback):
    """
    Appends each log to `history.jsonl` in the output folder, and draws `training.png` when training ends.

    A run that resumes at step n keeps the lines up to n, so each step is there once.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = _history_path(args)
        kept = [entry for entry in read_history(path) if state.global_step and entry["step"] <= state.global_step]
        write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            with _history_path(args).open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = _history_path(args)
        try:
            plot_history(read_history(path), path.with_name(PLOT_NAME))
        except ImportError as error:
            logger.info(f"no {PLOT_NAME}: {error}")


def _history_path(args: TrainingArguments) -> Path:
    """Returns the path of the history, in an output folder that is made if it is missing."""
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / HISTORY_NAME


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """
    Reads the logs of a run. Returns an empty list if there is no file. A line that is not a complete JSON object with
    a `step` is ignored with a warning.
    """
    entries = []
    for line in filter(None, Path(path).read_bytes().split(b"\n") if Path(path).is_file() else ()):
        try:
            entry = json.loads(line.decode())
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("step"), (int, float)):
            entries.append(entry)
        else:
            logger.warning(f"{os.fspath(path)}: ignored a line that is not the log of a step: {line[:80]!r}")
    return entries


def plot_history(history: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """
    Draws the losses, the measures of evaluation and the learning rate over the steps. Each collection that is reranked
    has a panel with nDCG@10, and a dashed line for that of its first-stage run.

    Args:
        history: as [`read_history`] returns it.
        path: the PNG file to write. None is written for a history without curves.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", "eval")
    from matplotlib.figure import Figure

    panels = [
        ("loss", [("loss", "training"), ("eval_loss", "evaluation")]),
        ("measure", [(f"eval_{name}", name) for name in ("ndcg@10", "mrr@10", "accuracy@1")]),
        *_rerank_panels(history),
        ("learning rate", [("learning_rate", "learning rate")]),
    ]
    curves = {
        key: [(entry["step"], float(entry[key])) for entry in history if entry.get(key) is not None]
        for _, keys in panels
        for key, _ in keys
    }
    panels = [(title, [item for item in keys if curves[item[0]]]) for title, keys in panels]
    panels = [(title, keys) for title, keys in panels if keys]
    if not panels:
        return
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key, label in keys:
            steps, values = zip(*curves[key], strict=True)
            style = {"linestyle": "--", "color": "gray"} if label == FIRST_STAGE else {}
            axes.plot(steps, values, label=label, marker="." if len(steps) < 30 and not style else None, **style)
        axes.set(xlabel="optimizer step", title=title)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend()
    figure.savefig(path, dpi=150)


def _rerank_panels(history: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns the panels of the collections that were reranked, each with the names of its logs and their labels."""
    start, end = "eval_", "_run_ndcg@10"
    names = dict.fromkeys(key[len(start) : -len(end)] for entry in history for key in entry if key.endswith(end))
    return [
        (f"nDCG@10 on {name}", [(f"{start}{name}_ndcg@10", "reranked"), (f"{start}{name}{end}", FIRST_STAGE)])
        for name in names
    ]
