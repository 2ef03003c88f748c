"""Reranks what BM25 finds in a BEIR folder, and prints how the ranking changes. Run it with:

python examples/rerank_beir.py my-reranker path/to/beir-folder [qrels/test.tsv]
"""

import sys
from pathlib import Path

from llama_bidir import CrossEncoder
from llama_bidir.evaluation import Dataset, evaluate_reranker, read_corpus, read_qrels, read_queries, search_bm25

DEPTH = 50

model, folder = sys.argv[1], Path(sys.argv[2])
qrels_file = folder / (sys.argv[3] if len(sys.argv) > 3 else "qrels/test.tsv")
qrels = read_qrels(qrels_file)
queries = read_queries(folder / "queries.jsonl", qrels, qrels_file)
corpus = read_corpus(folder / "corpus.jsonl")

run = search_bm25(corpus, queries, DEPTH)
reranker = CrossEncoder(model)
result = evaluate_reranker(reranker, Dataset(corpus, queries, qrels, run), depth=DEPTH, show_progress_bar=True)

print(f"\n{len(corpus):,} documents, {len(queries):,} queries, {result.num_pairs:,} pairs in {result.seconds:.1f} s")
print(f"\n{'':<10}{'BM25':>10}{'reranked':>10}{'change':>10}{'won':>7}{'lost':>7}{'p':>10}")
for each in result.comparisons:
    print(
        f"{each.measure:<10}{each.baseline:>10.4f}{each.run:>10.4f}{each.difference:>+10.4f}"
        f"{each.wins:>7}{each.losses:>7}{each.randomization:>10.4f}"
    )
