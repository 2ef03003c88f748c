"""The code of the model beside a checkpoint, for people who do not have this package."""

import json
import os
import shutil
from pathlib import Path

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
        shutil.copyfile(Path(__file__).with_name(name), Path(directory, name))
    path = Path(directory, "config.json")
    config = {**json.loads(path.read_text(encoding="utf-8")), "auto_map": AUTO_MAP}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
