"""What the study of `benchmarks.quality` varies, and the rows and sets that it trains and evaluates on."""

import gzip
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llama_bidir import CrossEncoder
from llama_bidir.evaluation import Dataset, load_dataset
from llama_bidir.jobs.mining import Selection, mine_negatives
from llama_bidir.losses import needs_teacher

HELD_OUT_GROUPS = 64
# Weights of the train sets: how often an epoch shows each row.
MIXES: dict[str, dict[str, float]] = {
    "questions": {
        "squad": 1.0,
        "newwiki": 1.0,
        "nq": 2.0,
        "boolq": 0.5,
        "selqa": 1.0,
        "hotpot": 1.0,
        "lfrqa": 0.25,
        "medquad2": 0.5,
        "scifact": 3.0,
        "pubmedqa": 1.0,
        "bioasq": 2.0,
        "scitldr": 0.5,
        "classicir": 4.0,
    },
    "squad": {"squad": 1.0},
}
# Of an evaluation set: its folder, how the ids of its queries start, and how its documents are scored.
EVAL_SETS: dict[str, tuple[str, str, str]] = {
    "squad-dev": ("squad-dev", "", "truncate"),
    "nq": ("nq", "", "truncate"),
    "scifact": ("scifact", "", "truncate"),
    "cranfield": ("cranfield", "", "truncate"),
    "xquad-en": ("xquad", "en-", "truncate"),
    "longdoc": ("longdoc", "", "max"),
    "longdoc, first_max": ("longdoc", "", "first_max"),
    "longdoc, truncate": ("longdoc", "", "truncate"),
}
FIRST_STAGE = "run.bm25.trec"


@dataclass(frozen=True)
class Cell:
    """
    The settings of one training run of the study.

    Args:
        layers: how many of the first layers of the base to keep.
        mask: `bidirectional` or `causal`.
        pooling, temperature: see [`LlamaBidirectionalConfig`].
        loss: a name in [`~losses.LOSSES`].
        group_size, max_length: passages per query, and tokens per pair in training.
        groups, steps: queries per step, and steps.
        learning_rate: the highest one; it rises in the first tenth of the steps and then falls along a cosine.
        tuning: `full`, or `lora` for an adapter of rank 16 on all linear layers.
        mix: a name in `MIXES`.
        negatives: `bm25`, those of the rows; `mixed`, as many random passages of the same set beside them; or `mined`,
            seven of the mixed ones that the teacher, the reranker of the first cell, scores highest below its margins.
        rows: how many rows of the mix to train on, spread over its sets in proportion; 0 takes all.
        seed: of the new head, the order of the groups and the negatives that are drawn.
    """

    layers: int
    steps: int
    groups: int
    learning_rate: float
    max_length: int
    mask: str = "bidirectional"
    pooling: str = "avg"
    loss: str = "listwise_cross_entropy"
    group_size: int = 8
    temperature: float = 1.0
    tuning: str = "full"
    mix: str = "questions"
    negatives: str = "mixed"
    rows: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """A name for a folder."""
        return "-".join(str(value) for value in asdict(self).values())

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher scores the rows."""
        return self.negatives == "mined" or needs_teacher(self.loss)

    @property
    def setting(self) -> "Cell":
        """The cell without its seed: runs of one setting differ in the seed alone."""
        return replace(self, seed=0)

    def recipe(self, base: Path, rows: Mapping[Path, float], held_out: Path, output: Path) -> dict[str, Any]:
        """
        Returns the recipe of the run (see docs/training.md).

        Args:
            base: a plain Llama with the layers of this cell.
            rows: files of training rows, each with its weight.
            held_out: rows that choose the best step.
            output: where the reranker is saved.
        """
        recipe: dict[str, Any] = {
            "model": {
                "model_name_or_path": str(base),
                "is_causal": self.mask == "causal",
                "pooling": self.pooling,
                "temperature": self.temperature,
            },
            "data": {
                "train": [{"path": str(path), "weight": weight} for path, weight in rows.items()],
                "eval": [str(held_out)],
                "group_size": self.group_size,
                "rerank_max_length": self.max_length,
            },
            "training": {
                "output_dir": str(output),
                "loss": self.loss,
                "max_steps": self.steps,
                "per_device_train_batch_size": self.groups,
                "learning_rate": self.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": self.steps // 10,
                "eval_strategy": "steps",
                "eval_steps": max(1, self.steps // 5),
                "save_strategy": "steps",
                "save_steps": max(1, self.steps // 5),
                "save_total_limit": 1,
                "load_best_model_at_end": True,
                "metric_for_best_model": "eval_ndcg@10",
                "report_to": "none",
                "seed": self.seed,
            },
        }
        if self.tuning == "lora":
            recipe["lora"] = {"r": 16, "lora_alpha": 32}
        return recipe


# A GPU trains all layers for a quarter of a million pairs; a CPU trains the first layers for 13 thousand pairs.
BASE = {
    "cuda": Cell(layers=30, steps=1000, groups=32, learning_rate=1e-4, max_length=256),
    "cpu": Cell(layers=6, steps=200, groups=16, group_size=4, learning_rate=3e-4, max_length=128),
}
ALL_LAYERS = BASE["cuda"].layers
# A CPU takes minutes to score the rows of this many groups with the teacher. A GPU scores all rows.
SCORED_ROWS = {"cuda": 0, "cpu": 3200}
# Keeps all passages and adds their scores.
ALL = Selection(num_negatives=100, absolute_margin=-1e6, relative_margin=1.0)


def cells(base: Cell, scored_rows: int = 0) -> list[Cell]:
    """Returns the cells of the study, the most informative ones first."""
    causal = replace(base, mask="causal", pooling="last")
    found = [replace(cell, seed=seed) for seed in range(3) for cell in (base, causal)]
    found += [replace(base, mask="causal"), replace(base, pooling="last"), replace(base, pooling="cls")]
    found += [replace(base, loss=loss) for loss in ("binary_cross_entropy", "ranknet", "lambda")]
    pairs = base.groups * base.group_size
    found += [replace(base, group_size=size, groups=pairs // size) for size in (4, 8, 16) if size != base.group_size]
    found += [replace(base, tuning="lora", learning_rate=rate) for rate in (2e-4, 1e-3)]
    few = replace(base, rows=scored_rows)
    mined = replace(few, negatives="mined")
    found += [cell for cell in (few, mined) if cell not in found]
    if base.layers < ALL_LAYERS:  # takes a CPU about an hour
        found.append(replace(mined, layers=ALL_LAYERS, steps=240, learning_rate=1e-4))
    student = replace(few, layers=max(2, base.layers // 5))
    found += [replace(student, loss=loss) for loss in (base.loss, "mse", "kl_div")]
    found += [replace(base, learning_rate=base.learning_rate * factor) for factor in (0.5, 2)]
    found += [replace(base, max_length=length) for length in (192, 384)]
    found += [replace(base, temperature=temperature) for temperature in (0.5, 2.0)]
    found += [replace(base, negatives="bm25"), replace(base, mix="squad")]
    return found


def write_rows(cell: Cell, data: Path, output: Path, teacher: Path | None) -> tuple[dict[Path, float], Path]:
    """
    Writes the rows of a cell, without `HELD_OUT_GROUPS` rows that are spread over its sets in proportion. Files that a
    teacher has scored are not written again.

    Args:
        cell: names the mix, the kind of the negatives and the number of rows. The held-out rows keep their negatives.
        data: a folder with `NAME-train.jsonl.gz`.
        output: the folder of all rows.
        teacher: scores the rows if the cell needs it.

    Returns:
        the files of training rows with their weights, and the file of the held-out rows.
    """
    kind = "scored" if needs_teacher(cell.loss) else cell.negatives
    output = output / f"{cell.mix}-{kind}-{cell.rows}"
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    mix = MIXES[cell.mix]
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in mix:
        with gzip.open(data / f"{name}-train.jsonl.gz", "rt", encoding="utf-8") as file:
            rows[name] = [json.loads(line) for line in file]
        rng.shuffle(rows[name])
    shown = {name: len(rows[name]) * weight for name, weight in mix.items()}
    held_out: list[dict[str, Any]] = []
    weights = {}
    for name, weight in mix.items():
        count = max(1, round(HELD_OUT_GROUPS * shown[name] / sum(shown.values())))
        held_out += rows[name][:count]
        kept = rows[name][count:]
        if cell.negatives != "bm25":
            add_random_negatives(kept, rng)
        if cell.rows:  # each of them is shown once
            kept, weight = kept[: max(1, round(cell.rows * shown[name] / sum(shown.values())))], 1.0
        path = output / f"{name}.jsonl"
        if cell.needs_teacher and not path.exists():
            kept = score_rows(kept, teacher, ALL if kind == "scored" else Selection())
        if not cell.needs_teacher or not path.exists():
            write_lines(path, kept)
        weights[path] = weight
    write_lines(output / "held-out.jsonl", held_out)
    return weights, output / "held-out.jsonl"


def score_rows(rows: list[dict[str, Any]], teacher: Path | None, selection: Selection) -> list[dict[str, Any]]:
    """Returns rows with the negatives that a selection takes, and the scores of the teacher."""
    mined = mine_negatives(CrossEncoder(teacher), rows, selection, ignore_identical_ids=False)
    return [row.fields for row in mined if row.fields["neg_doc"]]


def add_random_negatives(rows: list[dict[str, Any]], rng: random.Random) -> None:
    """Gives each row as many random negatives as it has, because a first-stage run contains both kinds."""
    passages = [passage for row in rows for passage in row["pos_doc"]]
    for row in rows:
        known = {*row["pos_doc"], *row["neg_doc"]}
        drawn = rng.sample(passages, min(len(passages), 2 * len(known)))
        row["neg_doc"] = row["neg_doc"] + [each for each in drawn if each not in known][: len(row["neg_doc"])]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_eval_set(data: Path, name: str, depth: int) -> Dataset:
    """Returns an evaluation set with the texts of the first `depth` documents per query."""
    folder, start, _ = EVAL_SETS[name]
    found = load_dataset(data / folder, run=FIRST_STAGE, depth=depth)
    return found._replace(qrels={key: judged for key, judged in found.qrels.items() if key.startswith(start)})


def encode_values(values: Mapping[str, float]) -> str:
    """Returns the values of the queries in one string, which takes one line of a JSON file."""
    return " ".join(f"{value:.4f}".rstrip("0").rstrip(".") for value in values.values())


def decode_values(text: str) -> list[float]:
    """Returns the values that [`encode_values`] wrote."""
    return [float(value) for value in text.split()]


def cell_of(row: Mapping[str, Any]) -> Cell:
    """Returns the cell of a row."""
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})
