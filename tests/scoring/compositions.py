"""
Scores random batches of random models, and compares each pair's score with its score alone.

    python -m tests.scoring.compositions --batches 10000

prints how many scores were compared in each layout, and the largest difference: absolute, for scores of magnitude 1.
"""

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from llama_bidir import LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification
from llama_bidir.scoring.engine import LocalEngine
from llama_bidir.scoring.packing import PACKED_ATTENTION, pack, pad

BOUND = 1e-5
VOCABULARY = 97
LONGEST = 96
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]
HEADS = [(4, 4), (4, 2), (4, 1)]  # multi-head, grouped-query and multi-query attention
POOLINGS = ["avg", "cls", "last"]
Sequences = list[list[int]]


def make_models() -> list[LlamaBidirectionalForSequenceClassification]:
    """One seeded model for each combination of heads, pooling, rotary embedding and attention."""
    models = []
    combinations = itertools.product(HEADS, POOLINGS, ROPES, ["sdpa", "eager"])
    for seed, ((num_heads, num_keys), pooling, rope, attention) in enumerate(combinations):
        torch.manual_seed(seed)
        config = LlamaBidirectionalConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1 + seed % 3,
            num_attention_heads=num_heads,
            num_key_value_heads=num_keys,
            max_position_embeddings=128,
            initializer_range=0.2,
            attention_bias=seed % 2 == 0,
            is_causal=seed % 5 == 0,
            num_labels=1 + seed % 2,
            temperature=1.0 if seed % 3 else 0.7,
            pooling=pooling,
            rope_parameters={"rope_theta": 10_000.0, **rope},
            attn_implementation=attention,
        )
        models.append(LlamaBidirectionalForSequenceClassification(config).eval())
    return models


def draw_batch(draw: random.Random) -> Sequences:
    """Up to 12 sequences, some of them equal in length, some repeated."""
    lengths = [draw.choice([1, 2, draw.randint(1, LONGEST), draw.randint(1, 16)]) for _ in range(draw.randint(1, 12))]
    batch = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
    return batch + draw.sample(batch, draw.choice([0, 0, 1]))


def padded(model: Any, batch: Sequences, draw: random.Random, side: str) -> torch.Tensor:
    """Scores with random ids as padding on one side, up to 20 more of them than needed."""
    longest = max(map(len, batch)) + draw.choice([0, 0, draw.randint(1, 20)])
    rows, masks = [], []
    for ids in batch:
        padding = [draw.randrange(VOCABULARY) for _ in range(longest - len(ids))]
        zeros, ones = [0] * len(padding), [1] * len(ids)
        rows.append(padding + ids if side == "left" else ids + padding)
        masks.append(zeros + ones if side == "left" else ones + zeros)
    return model(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks)).logits


def packed(model: Any, batch: Sequences, attention: str) -> torch.Tensor:
    """Scores of one stream of tokens, by the model's own forward."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        return model(**pack(batch)).logits
    finally:
        model.set_attn_implementation(before)


def by_engine(model: Any, batch: Sequences, draw: random.Random) -> torch.Tensor:
    """Scores as `CrossEncoder` computes them, in batches of a random size."""
    max_sequences = draw.choice([None, None, 1, 2, 5])
    return LocalEngine(model).logits(batch, max_tokens=draw.randint(1, 512), max_sequences=max_sequences)


Layout = Callable[[Any, Sequences, random.Random], torch.Tensor]
LAYOUTS: dict[str, Layout] = {
    "padded on the right": lambda model, batch, draw: padded(model, batch, draw, "right"),
    "padded on the left": lambda model, batch, draw: padded(model, batch, draw, "left"),
    "padded, as the engine pads": lambda model, batch, draw: model(**pad(batch)).logits,
    "packed, sdpa with a mask": lambda model, batch, draw: packed(model, batch, "sdpa"),
    "packed, without a mask": lambda model, batch, draw: packed(model, batch, PACKED_ATTENTION),
    "by the engine": by_engine,
}


@torch.inference_mode()
def compare(num_batches: int, *, seed: int = 0) -> dict[str, tuple[int, float]]:
    """Returns, for each layout, the number of scores that were compared and the largest difference from those alone."""
    draw = random.Random(seed)
    models = make_models()
    counts: Counter[str] = Counter()
    worst = dict.fromkeys(LAYOUTS, 0.0)
    for number in range(num_batches):
        model, batch = models[number % len(models)], draw_batch(draw)
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in batch])
        for name, layout in LAYOUTS.items():
            difference = (layout(model, batch, draw) - alone).abs() / alone.abs().clamp(min=1.0)
            counts[name] += difference.numel()
            worst[name] = max(worst[name], float(difference.nan_to_num(nan=torch.inf).max()))
    return {name: (counts[name], worst[name]) for name in LAYOUTS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    found = compare(arguments.batches, seed=arguments.seed)
    seconds = time.perf_counter() - start
    lines = [f"{arguments.batches:,} batches of {len(make_models())} models in {seconds:.0f} s"]
    for name, (count, difference) in found.items():
        lines.append(f"{name:<28} {count:>9,} scores, largest difference {difference:.1e}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if all(difference <= BOUND for _, difference in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
