"""The state of a run in its output folder: complete checkpoints, and the arguments that a resumed run must have."""

import dataclasses
import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import GroupDataset
from ..files_llama_bidir import INTERRUPTED_SAVE
from ..utils.extras import require
from ..utils.outputs import write_whole
from ..utils.resume import describe_changes
from ..utils.workspace import SAVING
from ..weights_llama_bidir import read_weights
from .arguments import CrossEncoderTrainingArguments
from .history import HISTORY_NAME, PLOT_NAME

logger = logging.getLogger(__name__)

RUN_NAME = "training_run.json"

# The training arguments that change what is learned. A resumed run may have different values of the others.
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
    "loss_temperature",
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
    Returns the newest complete `checkpoint-N`, or None.

    Raises:
        ValueError: the checkpoint holds no optimizer state.
    """
    found = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:  # the Trainer writes this file last
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning(f"{path} is incomplete, because the run stopped while it wrote it: it is ignored")
            continue
        if not (path / "scheduler.pt").exists() and not list(path.glob("global_step*")):
            raise ValueError(
                f"{os.fspath(path)!r} holds a model without the state of its optimizer (save_only_model), from which a "
                "run cannot resume: start over with overwrite (--overwrite)"
            )
        return path
    return None


def check_complete(checkpoint: Path, model: Any) -> None:
    """
    Checks that a checkpoint holds every weight of the model that resumes from it. The Trainer alone would only warn.

    Args:
        checkpoint: a folder that [`last_whole_checkpoint`] returned. FSDP and DeepSpeed check their own states.
        model: a reranker, or an adapter on one.

    Raises:
        ValueError: a weight is missing.
    """
    files = [*checkpoint.glob("model*.safetensors"), *checkpoint.glob("adapter_model.safetensors")]
    if not files or list(checkpoint.glob("global_step*")):
        return
    if hasattr(model, "peft_config"):
        names = require("peft", "train").get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    else:
        names = model.state_dict().keys()
    if missing := sorted(names - read_weights(map(os.fspath, files)).keys()):
        listed = f"{', '.join(missing[:3])}{' and others' if missing[3:] else ''}"
        raise ValueError(f"{os.fspath(checkpoint)!r} lacks {listed}: remove it to resume from the checkpoint before it")


def run_arguments(
    model: Any,
    data: Any,
    training: CrossEncoderTrainingArguments,
    lora: Mapping[str, Any] | None,
    rows: Mapping[str, Any],
) -> dict[str, Any]:
    """
    Returns the arguments that decide the outcome of a run, by dotted name, as JSON stores them.

    Args:
        model, data, training, lora: the blocks of a recipe.
        rows: what [`describe_groups`] returns.
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
    """Returns whether the folder holds a finished run or another reranker."""
    if (output / RUN_NAME).is_file():
        return bool(_read_run(output)["finished"])
    return (output / "config.json").exists() or (output / "adapter_config.json").exists()


def check_removable(output: Path, *, keep: Sequence[str]) -> None:
    """
    Checks that [`remove_run`] may clear a folder.

    Args:
        output: the folder, which may be missing.
        keep: paths and Hub ids that the next run reads, such as its base model. They must not lie in the folder.

    Raises:
        FileExistsError: the folder holds something that is not a run.
        ValueError: the next run would read from the folder.
    """
    if not output.exists() or not any(output.iterdir()):
        return
    inside = [name for name in keep if Path(name).exists() and Path(name).resolve().is_relative_to(output.resolve())]
    if inside:
        raise ValueError(f"{inside[0]!r} lies in training.output_dir, which overwrite clears: choose another folder")
    if not (output / RUN_NAME).is_file():
        raise FileExistsError(
            f"{os.fspath(output)!r} holds something other than a training run, which overwrite does not remove: "
            "choose another training.output_dir"
        )


def remove_run(output: Path) -> None:
    """Removes the files of a run from its output folder, and nothing else."""
    if not (output / RUN_NAME).is_file():
        return
    for name in (*_read_run(output).get("files", []), HISTORY_NAME, PLOT_NAME):
        (output / name).unlink(missing_ok=True)
    for folder in (*output.glob("checkpoint-*"), *output.glob(f"{SAVING}*"), output / INTERRUPTED_SAVE):
        if folder.is_dir():
            shutil.rmtree(folder)
    (output / RUN_NAME).unlink()


def _read_run(output: Path) -> dict[str, Any]:
    """Returns the content of the record of a run. Raises ValueError, which names the file, if it is not a record."""
    try:
        content = json.loads((output / RUN_NAME).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("arguments"), dict) or "finished" not in content:
        raise ValueError(
            f"{output / RUN_NAME} is not the record of a training run: move it away, or choose another "
            "training.output_dir"
        )
    return content


def check_same_run(output: Path, arguments: Mapping[str, Any]) -> None:
    """
    Checks that the stopped run in a folder had the same arguments.

    Raises:
        ValueError: it had different arguments (the message names what changed), or they are unknown.
    """
    if not (output / RUN_NAME).is_file():
        raise ValueError(
            f"{os.fspath(output)!r} holds checkpoints of an unknown run: choose another training.output_dir"
        )
    changes = describe_changes(_read_run(output)["arguments"], arguments)
    if changes:
        raise ValueError(
            f"{os.fspath(output)!r} holds a stopped run with different arguments: {changes}. To resume it, start with "
            "the same arguments. Otherwise pass overwrite (--overwrite) or choose another training.output_dir"
        )


def write_run(output: Path, arguments: Mapping[str, Any], *, files: Sequence[str] | None = None) -> None:
    """Writes the arguments of a run beside its checkpoints. A finished run also lists the files of its reranker."""
    output.mkdir(parents=True, exist_ok=True)
    content = {"finished": files is not None, "files": list(files or []), "arguments": dict(arguments)}
    write_whole(output / RUN_NAME, json.dumps(content, indent=2) + "\n")
