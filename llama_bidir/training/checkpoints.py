"""Going on with a stopped run: which checkpoint is whole, and whether the run is still the same."""

import dataclasses
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import GroupDataset
from ..utils.outputs import write_whole
from ..utils.resume import describe_changes
from .arguments import CrossEncoderTrainingArguments
from .history import HISTORY_NAME, PLOT_NAME

logger = logging.getLogger(__name__)

RUN_NAME = "training_run.json"
SAVING_NAME = ".saving"

# The training arguments that change what is learned; the others may differ when a run goes on.
DECISIVE = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "data_seed",
    "dataloader_drop_last",
    "fp16",
    "gradient_accumulation_steps",
    "learning_rate",
    "loss",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "neftune_noise_alpha",
    "num_train_epochs",
    "optim",
    "optim_args",
    "per_device_train_batch_size",
    "seed",
    "train_sampling_strategy",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
)


def last_whole_checkpoint(output: Path) -> Path | None:
    """
    Returns the newest `checkpoint-N` that was written to its end, or None. The Trainer writes its state last.

    Raises:
        ValueError: it has no state of an optimizer.
    """
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := _CHECKPOINT.match(path.name))]
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning(f"{path} is not whole, as a stop while it was written leaves it: it is not used")
            continue
        if not (path / "scheduler.pt").exists() and not list(path.glob("global_step*")):
            raise ValueError(
                f"{os.fspath(path)!r} holds a model without the state of its optimizer (save_only_model): a run cannot "
                "go on from it; train anew with overwrite (--overwrite)"
            )
        return path
    return None


_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def run_arguments(
    model: Any,
    data: Any,
    training: CrossEncoderTrainingArguments,
    lora: Mapping[str, Any] | None,
    rows: Mapping[str, Any],
) -> dict[str, Any]:
    """
    What decides the outcome of a run, by dotted name.

    Args:
        model, data, training, lora: the blocks of a recipe.
        rows: what tells when the training data has changed.
    """
    decisive = {name: getattr(training, name) for name in DECISIVE if hasattr(training, name)}
    blocks = {
        "model": dataclasses.asdict(model),
        "data": {name: value for name, value in dataclasses.asdict(data).items() if not name.startswith("eval")},
        "training": {**decisive, "world_size": training.world_size},
        "lora": dict(lora or {}),
        "rows": dict(rows),
    }
    named = {f"{block}.{name}": value for block, values in blocks.items() for name, value in values.items()}
    return json.loads(json.dumps(named, default=str))


def describe_groups(groups: GroupDataset) -> dict[str, Any]:
    """
    Describes training data so that a resumed run can tell whether it has changed.

    Returns:
        the number of groups per epoch, and a checksum of all rows and of the documents that they name. It depends on
        the content alone, not on where the cache keeps it.
    """
    checksum = 0
    sources: Any = groups.sources
    for rows, _ in sources:
        checksum = _update_checksum(checksum, rows)
        if (transform := rows.format["format_kwargs"].get("transform")) is not None:
            checksum = _update_checksum(checksum, transform.documents)
    return {"groups_an_epoch": len(groups), "checksum": f"{checksum:08x}"}


def _update_checksum(checksum: int, dataset: Any) -> int:
    # Always blocks of 1,000 rows, copied to the start of their buffers: the file and its chunks leave no trace.
    for block in dataset.with_format("arrow").iter(1000):
        for batch in block.combine_chunks().to_batches():
            checksum = zlib.crc32(batch.serialize(), checksum)
    return checksum


def is_finished(output: Path) -> bool:
    """Whether a run has ended there, or another reranker is there."""
    if (output / RUN_NAME).is_file():
        return bool(_read_run(output)["finished"])
    return (output / "config.json").exists() or (output / "adapter_config.json").exists()


def check_removable(output: Path, *, keep: Sequence[str]) -> None:
    """
    Checks that [`remove_run`] may clear a folder.

    Args:
        output: the folder; it may be missing.
        keep: what the next run reads, such as its base model, which must not lie in the folder.

    Raises:
        FileExistsError: the folder holds something, and no run.
        ValueError: the next run would read from the folder.
    """
    if not output.exists() or not any(output.iterdir()):
        return
    inside = [name for name in keep if Path(name).exists() and Path(name).resolve().is_relative_to(output.resolve())]
    if inside:
        raise ValueError(f"{inside[0]!r} lies in training.output_dir, which overwrite clears: choose another folder")
    if not (output / RUN_NAME).is_file():
        raise FileExistsError(
            f"{os.fspath(output)!r} holds something else than a training run, which overwrite does not remove: choose "
            "another training.output_dir"
        )


def remove_run(output: Path) -> None:
    """Removes what a run has left in its output folder, and nothing else."""
    if not (output / RUN_NAME).is_file():
        return
    for name in (*_read_run(output).get("files", []), HISTORY_NAME, PLOT_NAME):
        (output / name).unlink(missing_ok=True)
    for folder in (*output.glob("checkpoint-*"), output / SAVING_NAME):
        if folder.is_dir():
            shutil.rmtree(folder)
    (output / RUN_NAME).unlink()


def _read_run(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / RUN_NAME).read_text(encoding="utf-8"))
    return content


def check_same_run(output: Path, arguments: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a run that is to go on had other arguments, with what has changed, or they are not known.
    """
    if not (output / RUN_NAME).is_file():
        raise ValueError(
            f"{os.fspath(output)!r} holds checkpoints of something else: choose another training.output_dir"
        )
    changes = describe_changes(_read_run(output)["arguments"], arguments)
    if changes:
        raise ValueError(
            f"{os.fspath(output)!r} holds a stopped run with other arguments: {changes}. Start with the "
            "same ones to go on, with overwrite (--overwrite) to train anew, or with another training.output_dir"
        )


def write_run(output: Path, arguments: Mapping[str, Any], *, files: Sequence[str] | None = None) -> None:
    """Notes the arguments of a run beside its checkpoints, and the files of the reranker where it is finished."""
    output.mkdir(parents=True, exist_ok=True)
    content = {"finished": files is not None, "files": list(files or []), "arguments": dict(arguments)}
    write_whole(output / RUN_NAME, json.dumps(content, indent=2) + "\n")
