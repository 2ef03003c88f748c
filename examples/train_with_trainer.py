"""Fine-tunes a reranker pointwise with the plain Hugging Face Trainer. Run it with:

python examples/train_with_trainer.py HuggingFaceTB/SmolLM2-135M rows.jsonl output
"""

import sys

import datasets
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from llama_bidir import CrossEncoder, LlamaBidirectionalForSequenceClassification
from llama_bidir.data import load_rows

base, rows, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = LlamaBidirectionalForSequenceClassification.from_pretrained(base, dtype="float32")
encoder = CrossEncoder(model, tokenizer)  # adds a pad token if the tokenizer has none

pairs = [
    {"text": encoder.config.prompt_template.format(query=row["query"], passage=passage), "labels": label}
    for row in load_rows(rows)
    for label, passages in ((1.0, row["pos_doc"]), (0.0, row["neg_doc"]))
    for passage in passages
]
dataset = datasets.Dataset.from_list(pairs).map(
    lambda pair: tokenizer(pair["text"], truncation=True, max_length=encoder.config.rerank_max_length)
)
arguments = TrainingArguments(output, max_steps=100, learning_rate=1e-5, logging_steps=10, report_to="none")
trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), dataset, processing_class=tokenizer)
trainer.train()
CrossEncoder(model, tokenizer).save_pretrained(output)
