"""Files of training rows, as tests write and look at them."""

import gzip
import json
from pathlib import Path
from typing import Any

NO_SCORES = {"pos_score": None, "neg_score": None}


def write(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def arrow_bytes(dataset: Any) -> bytes:
    return b"".join(Path(file["filename"]).read_bytes() for file in dataset.cache_files)
