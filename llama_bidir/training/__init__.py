"""Training with the Hugging Face Trainer."""

from ..utils.extras import require

require("accelerate", "train")

from .arguments import CrossEncoderTrainingArguments, DataArguments, ModelArguments  # noqa: E402
from .history import plot_history, read_history  # noqa: E402
from .lora import merge_adapter  # noqa: E402
from .run import train  # noqa: E402
from .trainer import CrossEncoderTrainer  # noqa: E402

__all__ = [
    "CrossEncoderTrainer",
    "CrossEncoderTrainingArguments",
    "DataArguments",
    "ModelArguments",
    "merge_adapter",
    "plot_history",
    "read_history",
    "train",
]
