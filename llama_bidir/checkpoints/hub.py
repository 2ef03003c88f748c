"""The code of the model beside a checkpoint, for people who do not have this package."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat_template import save_tokenizer

CODE = ("configuration_llama_bidir.py", "modeling_llama_bidir.py")
AUTO_MAP = {
    "AutoConfig": "configuration_llama_bidir.LlamaBidirectionalConfig",
    "AutoModel": "modeling_llama_bidir.LlamaBidirectionalModel",
    "AutoModelForSequenceClassification": "modeling_llama_bidir.LlamaBidirectionalForSequenceClassification",
}


def add_code(directory: str | os.PathLike[str]) -> None:
    """
    Puts the two model files into the folder of a saved reranker, and their names into its configuration, so that
    transformers runs them under `trust_remote_code=True`. Where this package is imported, they are never run.
    """
    for name in CODE:
        shutil.copyfile(Path(__file__).parents[1] / name, Path(directory, name))
    path = Path(directory, "config.json")
    config = {**json.loads(path.read_text(encoding="utf-8")), "auto_map": AUTO_MAP}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


USE = """
Without this package, the two code files in the folder are run (transformers 5.6 or newer):

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{model_id}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{model_id}", trust_remote_code=True)
text = model.config.prompt_template.format(
    query="how do bees find their way?", passage="Honey bees navigate by the position of the sun."
)
inputs = tokenizer(text, truncation=True, max_length=model.config.rerank_max_length, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits)
```

With it (`pip install llama-bidir`), they are not: `llama_bidir.CrossEncoder("{model_id}")`.
"""


def write_hub(reranker: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, model_id: str) -> str:
    """
    Writes a reranker with the code of its model, which transformers runs under `trust_remote_code=True`.

    Args:
        reranker: a [`LlamaBidirectionalForSequenceClassification`].
        tokenizer: its tokenizer.
        folder: an empty folder.
        model_id: how the reranker will be found.

    Returns:
        what the model card says of its use.
    """
    reranker.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, reranker.config)
    add_code(folder)
    return USE.format(model_id=model_id)
