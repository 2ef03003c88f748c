"""Distils a large reranker into a small one. The large one mines and scores negatives; the small one learns its scores:

python examples/distil.py nvidia/llama-nemotron-rerank-1b-v2 HuggingFaceTB/SmolLM2-135M-Instruct rows.jsonl small
"""

import sys

from llama_bidir.jobs.mining import Selection, mine_file
from llama_bidir.training import CrossEncoderTrainingArguments, DataArguments, ModelArguments, train

teacher, student, rows, output = sys.argv[1:]

# Takes negatives of all kinds, easy and hard, so that the student sees the whole range of the teacher's scores.
selection = Selection(num_negatives=15, relative_margin=1, absolute_margin=-1000, sampling="random")
scored = f"{output}-rows.jsonl.gz"
print(mine_file(teacher, rows, scored, selection=selection))

train(
    ModelArguments(model_name_or_path=student),
    DataArguments(train=[scored], group_size=8),
    CrossEncoderTrainingArguments(
        output,
        loss={"mse": 1.0, "listwise_cross_entropy": 1.0},  # the teacher's scores, and the labels
        learning_rate=5e-5,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        report_to="none",
    ),
)
