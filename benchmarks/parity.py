"""Compares float32 scores of other tools with CrossEncoder: the largest difference relative to the largest score.

    python -m benchmarks.parity --tokenizer HuggingFaceTB/SmolLM2-135M [--vllm-python path/to/python] [--json out.json]

The rerankers are tiny and have random weights. vLLM runs in a separate environment, which also needs this package for
its plugin. Without --vllm-python, vLLM is left out.
"""

import argparse
import copy
import itertools
import json
import os
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification
from llama_bidir.checkpoints.chat_template import VLLM_TEMPLATE_FILE
from llama_bidir.checkpoints.export import FORMATS, export_reranker

from .machine import describe_machine

# Prompt templates, and whether the tokenizer puts its first special token before a text, as Llama's tokenizers do.
PROMPTS = (("question:{query} \n \n passage:{passage}", False), ("Query: {query}\nDocument: {passage}", True))
PAIRS = [
    ("how do bees find their way?", "Honey bees navigate by the position of the sun."),
    ("capital of France", "Paris, on the river Seine, is the capital of France and its largest city."),
    ("  {braces}  ", ""),
    (
        "what grew in the garden?",
        "The garden was full of clover; nobody counted the flowers. " * 20,
    ),  # too long: it is cut
]
MAX_LENGTH = 64
CASE = ("pooling", "temperature", "prompt", "adds_bos")
# Run once per engine: a second engine in the same process collides with the process groups of the first.
VLLM = """
import json, sys
from pathlib import Path
from vllm import LLM

folder, template, pairs, length = json.loads(sys.stdin.read())
llm = LLM(model=folder, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=length)
queries, passages = map(list, zip(*pairs))
template = Path(folder, template).read_text()
options = {"truncate_prompt_tokens": length}
outputs = llm.score(queries, passages, chat_template=template, tokenization_kwargs=options, use_tqdm=False)
print("SCORES", json.dumps([output.outputs.score for output in outputs]), flush=True)
"""
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id of a Llama tokenizer")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM and this package")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cases = []
        for number, case in enumerate(itertools.product(("avg", "cls", "last"), (1.0, 0.3), PROMPTS)):
            folders = {name: f"{folder}/{number}/{name}" for name in ("reranker", *FORMATS)}
            cases.append((case, folders, make_reranker(tokenizer, *case, folders)))
        served = score_with_vllm(args.vllm_python, [folders for _, folders, _ in cases]) if args.vllm_python else {}
        for number, ((pooling, temperature, (prompt, adds_bos)), folders, expected) in enumerate(cases):
            scores = {**score_here(folders), **{name: values[number] for name, values in served.items()}}
            worst = np.abs(expected).max()
            differences = {name: float(np.abs(values - expected).max() / worst) for name, values in scores.items()}
            case = {"pooling": pooling, "temperature": temperature, "prompt": prompt, "adds_bos": adds_bos}
            rows.append({**case, **differences})
    result: dict[str, Any] = {"machine": describe_machine("cpu"), "versions": versions(args.vllm_python), "rows": rows}
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def make_reranker(
    tokenizer: Any, pooling: str, temperature: float, prompt: tuple[str, bool], folders: dict[str, str]
) -> np.ndarray:
    """Saves a tiny reranker and its exports; returns its scores."""
    template, adds_bos = prompt
    if adds_bos:
        tokenizer = copy.deepcopy(tokenizer)
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=None, special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    torch.manual_seed(0)
    config = LlamaBidirectionalConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        pooling=pooling,
        temperature=temperature,
        prompt_template=template,
        rerank_max_length=MAX_LENGTH,
    )
    reranker = CrossEncoder(LlamaBidirectionalForSequenceClassification(config), tokenizer)
    reranker.save_pretrained(folders["reranker"])
    for format in FORMATS:
        export_reranker(folders["reranker"], folders[format], format=format)
    return reranker.predict(PAIRS)


def score_here(folders: dict[str, str]) -> dict[str, np.ndarray]:
    """Returns the scores of the tools in this environment."""
    from sentence_transformers import CrossEncoder as Peer

    return {
        "sentence-transformers": Peer(folders["sentence-transformers"], device="cpu").predict(PAIRS),
        "sentence-transformers, no export": Peer(folders["reranker"], device="cpu").predict(PAIRS),
        "onnxruntime": CrossEncoder(folders["onnx"], backend="onnx").predict(PAIRS),
        "back from sentence-transformers": CrossEncoder(folders["sentence-transformers"]).predict(PAIRS),
        "hub folder": CrossEncoder(folders["hub"]).predict(PAIRS),
    }


def score_with_vllm(python: str, folders: list[dict[str, str]]) -> dict[str, list[np.ndarray]]:
    """Returns vLLM's scores for the exports and for the folders that its plugin serves."""
    return {
        name: [run_vllm(python, paths[kind], template, PAIRS, MAX_LENGTH) for paths in folders]
        for name, kind, template in (
            ("vLLM", "vllm", "chat_template.jinja"),
            ("vLLM, plugin", "reranker", VLLM_TEMPLATE_FILE),
        )
    }


def run_vllm(python: str, folder: str, template: str, pairs: list[tuple[str, str]], max_length: int) -> np.ndarray:
    """Returns the scores of pairs by vLLM's offline interface, with a template of the folder."""
    output = subprocess.run(
        [python, "-c", VLLM],
        input=json.dumps([folder, template, pairs, max_length]),
        env={**os.environ, **VLLM_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in output.stdout.splitlines() if line.startswith("SCORES ")]
    if len(lines) != 1:
        raise RuntimeError(f"vLLM failed: {output.stderr[-3000:]}")
    return np.array(json.loads(lines[0].removeprefix("SCORES ")))


def versions(vllm_python: str | None) -> dict[str, str]:
    """Returns the versions of the tools."""
    found = {name: version(name) for name in ("sentence-transformers", "onnxruntime", "transformers", "torch")}
    if vllm_python:
        code = "from importlib.metadata import *; print(version(packages_distributions()['vllm'][0]))"
        found["vllm"] = subprocess.run([vllm_python, "-c", code], capture_output=True, text=True).stdout.strip()
    return found


def table(result: dict[str, Any]) -> str:
    """Returns a Markdown table with one line per tool: the largest difference over all cases."""
    tools = [name for name in result["rows"][0] if name not in CASE]
    lines = ["| tool | largest difference | cases |", "|---|---|---|"]
    for tool in tools:
        worst = max(result["rows"], key=lambda row: row[tool])
        lines.append(f"| {tool} | {worst[tool]:.1e} | {len(result['rows'])} |")
    return "\n".join([*lines, "", ", ".join(f"{name} {number}" for name, number in result["versions"].items())])


if __name__ == "__main__":
    main()
