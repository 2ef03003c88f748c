"""The Hub layout: a checkpoint with the code of its model, for people who do not have this package."""

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from .chat_template import save_tokenizer
from .files import write_json
from .model_card import SCORE_WITH_TRANSFORMERS

CODE = tuple(
    f"{part}_llama_bidir.py" for part in ("configuration", "fields", "files", "modeling", "pretrained", "weights")
)
AUTO_MAP = {
    "AutoConfig": "configuration_llama_bidir.LlamaBidirectionalConfig",
    "AutoModel": "modeling_llama_bidir.LlamaBidirectionalModel",
    "AutoModelForSequenceClassification": "modeling_llama_bidir.LlamaBidirectionalForSequenceClassification",
}

USE = (
    """
Without `llama-bidir`, transformers (5.6 or newer) runs the code files in this folder:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({model_id}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({model_id}, trust_remote_code=True)
"""
    + SCORE_WITH_TRANSFORMERS
    + """```

With `llama-bidir` installed, `llama_bidir.CrossEncoder({model_id})` loads the model without running them.
"""
)


def add_code(directory: str | os.PathLike[str]) -> None:
    """
    Adds the model code to the folder of a saved reranker and names its files in the configuration. transformers runs
    the code with `trust_remote_code=True`, but not if this package is imported.
    """
    for name in CODE:
        shutil.copyfile(Path(__file__).parents[1] / name, Path(directory, name))
    path = Path(directory, "config.json")
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "auto_map": AUTO_MAP})


def write(
    reranker: LlamaBidirectionalForSequenceClassification, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Writes a reranker with the code of its model."""
    reranker.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, reranker.config)
    add_code(folder)
