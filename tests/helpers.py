"""What tests of several rooms share: tiny seeded models, files of rows and runs, and arguments for a CPU."""

import gzip
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llama_bidir import LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification
from llama_bidir.evaluation import System, compare, evaluate_queries, make_report, render_report

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = Path(__file__).with_name("golden")
TEXTS = [
    "question: where do bees find their way? passage: Honey bees navigate by the position of the sun.",
    "The hive was painted white, and the garden was full of clover; nobody counted the flowers.",
    "What is the capital of France? Paris is the capital and largest city of France, on the river Seine.",
]

# Models and tokenizers


def make_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special_tokens.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def tiny_config(**kwargs: object) -> dict[str, object]:
    """Fields of a Llama small enough for every test: 2 layers, grouped-query attention, about 30 thousand weights."""
    return {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        **kwargs,
    }


def make_model(seed: int = 0, **kwargs: object) -> LlamaBidirectionalForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaBidirectionalForSequenceClassification(LlamaBidirectionalConfig(**tiny_config(**kwargs))).eval()


PAIRS = [
    ("where do bees find their way?", "Honey bees navigate by the position of the sun."),
    (" capital  {France}", ""),
    ("", "The hive was painted white."),
    ("the garden", "The garden was full of clover; nobody counted the flowers. " * 8),  # is cut at 64 tokens
]
PASSAGE_FIRST = "<{passage}\n{{k}} {query} !"
SEQUENCES = [[5], [7, 9, 11, 2, 3], list(range(20, 37)), list(range(40, 80))]


def pad(sequences, side):
    longest = max(map(len, sequences))
    rows, masks = [], []
    for ids in sequences:
        padding = [0] * (longest - len(ids))
        ones = [1] * len(ids)
        rows.append(padding + ids if side == "left" else ids + padding)
        masks.append(padding + ones if side == "left" else ones + padding)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def pack(sequences):
    starts = torch.tensor([0, *map(len, sequences)]).cumsum(0).int()
    longest = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([[token for ids in sequences for token in ids]]),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in sequences])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@torch.no_grad()
def logits_by_layout(model, sequences):
    return {
        "alone": torch.cat([model(torch.tensor([ids])).logits for ids in sequences]),
        "right": model(**pad(sequences, "right")).logits,
        "left": model(**pad(sequences, "left")).logits,
        "packed": model(**pack(sequences)).logits,
    }


# Files

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


def names(folder):
    return sorted(path.name for path in folder.iterdir())


HIVE_WORDS = [
    "bees",
    "hive",
    "garden",
    "clover",
    "sun",
    "river",
    "white",
    "capital",
    "nobody",
    "flowers",
    "Paris",
]


class Collection(NamedTuple):
    corpus: Path
    queries: Path
    run: Path

    def arguments(self) -> dict[str, Path]:
        return self._asdict()


def write_collection(folder: Path, *, num_queries: int = 12, num_documents: int = 30, depth: int = 10) -> Collection:
    """Queries q0 to qN, all but q3 with `depth` candidates, which are in the run by rank but not by query number."""
    draw = random.Random(7)
    documents = [
        {
            "_id": f"d{n}",
            "title": f"Hive {n}" if n % 2 else "",
            "text": " ".join(draw.choices(HIVE_WORDS, k=n % 9)),
        }
        for n in range(num_documents)
    ]
    queries = [{"_id": f"q{n}", "text": " ".join(draw.choices(HIVE_WORDS, k=3)) + f" {n}?"} for n in range(num_queries)]
    rows = []
    for query in reversed(queries):
        if query["_id"] != "q3":
            found = draw.sample(documents, depth)
            rows += [f"{query['_id']} Q0 {d['_id']} {rank} {50 - rank} x" for rank, d in enumerate(found, 1)]
    return Collection(
        write(folder / "corpus.jsonl", lines(*documents)),
        write(folder / "queries.jsonl", lines(*queries)),
        write(folder / "run.trec", "\n".join(rows) + "\n"),
    )


def read_lines_of(path: Path) -> dict[str, list[tuple[str, int, float, str]]]:
    """(doc_id, rank, score, tag) of each line, by query."""
    found: dict[str, list[tuple[str, int, float, str]]] = {}
    for line in path.read_text().splitlines():
        query_id, q0, doc_id, rank, score, tag = line.split(" ")
        assert q0 == "Q0"
        found.setdefault(query_id, []).append((doc_id, int(rank), float(score), tag))
    return found


def count_windows(journal: Path) -> int:
    """Windows in the state file of a job that may be running: it is neither locked nor changed."""
    if not journal.exists():
        return 0
    with closing(sqlite3.connect(f"{journal.as_uri()}?immutable=1", uri=True)) as database:
        try:
            return database.execute("SELECT count(*) FROM windows").fetchone()[0]
        except sqlite3.Error:  # in the middle of a transaction
            return 0


def command(files, checkpoint, output, *options):
    values = {"model": checkpoint, **files._asdict(), "output": output}
    return ["rerank", *(f"--{name}={value}" for name, value in values.items()), *map(str, options)]


# Training

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


# Reports

ATTACK = """<script>window.attacked = 1</script><img src="http://example.org/x" onerror='window.attacked = 1'>&"""


def make_systems(num_queries: int = 1200) -> tuple[dict[str, dict[str, int]], System, System]:
    """A baseline that ranks at random, and a run that ranks half of the queries better and a few worse."""
    generator = random.Random(0)
    qrels, run, baseline = {}, {}, {}
    for number in range(num_queries):
        query_id = f"q{number}"
        doc_ids = [f"d{number}-{rank}" for rank in range(20)]
        relevant = generator.sample(doc_ids, 2)
        qrels[query_id] = {relevant[0]: 2, relevant[1]: 1, f"gone{number}": 1}
        baseline[query_id] = {doc_id: generator.gauss(0, 1) for doc_id in doc_ids}
        shift = 2.0 if number % 2 else generator.choice([0.0, -1.0])
        run[query_id] = {doc_id: score + shift * (doc_id in relevant) for doc_id, score in baseline[query_id].items()}
    measures = ("nDCG@10", "RR@10", "R@100")
    systems = [
        System(name, each, evaluate_queries(qrels, each, measures))
        for name, each in ((f"run {ATTACK}", run), ("baseline", baseline))
    ]
    return qrels, systems[0], systems[1]


def write_report(path: Path) -> Path:
    """Writes a page of all sections, whose texts attack it."""
    qrels, system, baseline = make_systems()
    report = make_report(qrels, system, baseline, compare(system.evaluation, baseline.evaluation))
    texts = [ATTACK, "what is a bee? " * 60, "ما هي عاصمة فرنسا؟", "x" * 400]
    page = render_report(
        report,
        queries={query_id: texts[number % 4] for number, query_id in enumerate(qrels)},
        documents={doc_id: texts[number % 4] for number, doc_id in enumerate(sorted(report.doc_ids))},
        latency={query_id: 0.01 * number for number, query_id in enumerate(qrels)},
    )
    path.write_text(page, encoding="utf-8")
    return path


# Processes


def run_python(code, path, **environment):
    """Runs code in a process of its own, which reads the Hub's address when it starts."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_HOME": str(path / "hf"), "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=path,
        env={**variables, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
