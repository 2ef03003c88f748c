r"""
Load on servers over loopback: `llama-bidir serve`, a plain FastAPI endpoint around sentence-transformers, and vLLM's
server for CPUs, with the same reranker and the same requests.

    python -m benchmarks.serving --model my-reranker --data path/to/beir/nq --clients 1 8 32 128 --rates 0.4 0.8 \
        --seconds 30 --vllm-python path/to/python --json benchmarks/serving-cpu.json

Run it from the root of the repository, after `pip install -e ".[all]" sentence-transformers httpx`. Each of `--clients`
sends a query with `--documents` passages, waits for the answer, and sends the next one. `--rates` are loads of requests
that arrive at random times (a Poisson process), whether or not earlier ones are answered. The servers run at the same
time and are asked in turn, load by load, so that each has the machine to itself while it is measured. Latencies are
those of the clients, from the time at which a request arrives. Memory is the resident memory of a server after its last
request. `--soak` then sends many small requests to the first server, and prints its memory ten times.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from llama_bidir import CrossEncoder
from llama_bidir.checkpoints.export import export_reranker

from .machine import describe_machine
from .parity import VLLM_ENVIRONMENT
from .workloads import read_collection, spread

FIRST_PORT = 8100
START_SECONDS = 300
TIMEOUT = 600


def main() -> None:
    """Starts the servers, loads them, and prints a table."""
    args = parse_arguments()
    collection = read_collection(args.data)
    requests = [
        {
            "query": collection.queries[query_id],
            "documents": collection.passages(query_id)[: args.documents],
            "truncate_prompt_tokens": args.max_length,  # for vLLM
        }
        for query_id in spread(list(collection.run), args.queries)
    ]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        servers = {
            name: stack.enter_context(start(name, command, FIRST_PORT + number, environment))
            for number, (name, command, environment) in enumerate(commands(args, Path(work)))
        }
        check_scores(args.model, servers, requests[0], args.max_length)
        for kind, amount in [*(("clients", each) for each in args.clients), *(("rate", each) for each in args.rates)]:
            for name, (port, process) in servers.items():
                row = asyncio.run(load(port, requests, args.seconds, **{kind: amount}))
                row = {"server": name, kind: amount, **row, "memory_mib": memory(process)}
                print(json.dumps(row), flush=True)
                rows.append(row)
        soaked = soak(*next(iter(servers.values())), requests, args.soak) if args.soak else []
    result = {"machine": describe_machine("cpu"), "documents": args.documents, "dtype": args.dtype, "rows": rows}
    result["soak"] = {"requests": args.soak, "memory_mib": soaked}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a reranker")
    parser.add_argument("--data", required=True, type=Path, help="BEIR folder with a first-stage run")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="requests per second that arrive at random")
    parser.add_argument("--soak", type=int, default=0, help="small requests after the loads")
    parser.add_argument("--seconds", type=float, default=30, help="of each load (default: 30)")
    parser.add_argument("--documents", type=int, default=20, help="passages per request (default: 20)")
    parser.add_argument("--queries", type=int, default=50, help="different requests (default: 50)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens per pair (default: 256)")
    parser.add_argument("--dtype", default="bfloat16", help="of all servers (default: bfloat16)")
    parser.add_argument("--int8-model", help="folder of the same reranker from llama-bidir quantize, to serve in int8")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM; leave out to skip it")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args()


def commands(args: argparse.Namespace, work: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Yields the name, the command and the environment of each server, after the export that it needs."""
    ours = ["-m", "llama_bidir", "serve", "--model", args.model, "--max-length", str(args.max_length)]
    yield "llama-bidir", [sys.executable, *ours, "--dtype", args.dtype], {}
    if args.int8_model:
        ours[ours.index(args.model)] = args.int8_model
        yield "llama-bidir, int8", [sys.executable, *ours, "--dtype", "int8"], {}
    shortened = work / "shortened"
    reranker = CrossEncoder(args.model, dtype="float32", device="cpu", max_length=args.max_length)
    reranker.save_pretrained(shortened)
    export_reranker(shortened, work / "st", format="sentence-transformers")
    peer = ["-m", "benchmarks.serving_peer", "--model", str(work / "st"), "--dtype", args.dtype]
    yield "FastAPI and sentence-transformers", [sys.executable, *peer], {}
    if args.vllm_python:
        export_reranker(shortened, work / "vllm", format="vllm")
        options = ["--model", str(work / "vllm"), "--runner", "pooling", "--dtype", args.dtype]
        options += ["--max-model-len", str(args.max_length), "--chat-template", str(work / "vllm/chat_template.jinja")]
        environment = {**VLLM_ENVIRONMENT, "OMP_NUM_THREADS": str(os.cpu_count())}
        yield "vLLM", [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", *options], environment


@contextmanager
def start(name: str, command: list[str], port: int, environment: dict[str, str]) -> Iterator[tuple[int, Any]]:
    """Yields the port and the process of a server that is ready, and stops it in the end."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env={**os.environ, **environment}, stdout=log, stderr=log
        )
        try:
            for _ in range(2 * START_SECONDS):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        break
                    time.sleep(0.5)
            if process.poll() is not None:
                log.seek(0)
                raise RuntimeError(f"{name} did not start: {log.read()[-2000:]}")
            yield port, process
        finally:
            process.terminate()
            process.wait()


def check_scores(model: str, servers: dict[str, tuple[int, Any]], request: dict[str, Any], max_length: int) -> None:
    """Prints the largest difference of each server's scores from float32, over the largest score."""
    reranker = CrossEncoder(model, dtype="float32", device="cpu", max_length=max_length)
    expected = reranker.predict([(request["query"], text) for text in request["documents"]])
    for name, (port, _) in servers.items():
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/rerank", json=request, timeout=TIMEOUT).json()
        found = {each["index"]: each["relevance_score"] for each in answer["results"]}
        difference = max(abs(found[index] - score) for index, score in enumerate(expected)) / np.abs(expected).max()
        print(f"{name}: scores differ from float32 by {difference:.3f}", flush=True)


async def load(
    port: int,
    requests: list[dict[str, Any]],
    seconds: float,
    *,
    clients: int | None = None,
    rate: float | None = None,
) -> dict[str, Any]:
    """Sends requests for a time, from clients that wait for their answers or at a rate. Returns what they saw."""
    numbers, latencies, errors = count(), [], 0
    url = f"http://127.0.0.1:{port}/v1/rerank"
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=httpx.Limits(max_connections=None)) as client:
        await client.post(url, json=requests[0])
        started = time.perf_counter()

        async def ask(sent: float) -> None:
            nonlocal errors
            request = requests[next(numbers) % len(requests)]
            answer = await client.post(url, json=request)
            if answer.status_code == 200 and len(answer.json()["results"]) == len(request["documents"]):
                latencies.append(time.perf_counter() - sent)
            else:
                errors += 1

        async def ask_repeatedly() -> None:
            while time.perf_counter() - started < seconds:
                await ask(time.perf_counter())

        async def ask_at(arrival: float) -> None:
            await asyncio.sleep(started + arrival - time.perf_counter())
            await ask(started + arrival)

        if clients is not None:
            await asyncio.gather(*(ask_repeatedly() for _ in range(clients)))
        else:
            assert rate is not None
            arrivals = np.random.default_rng(0).exponential(1 / rate, int(2 * rate * seconds) + 10).cumsum()
            await asyncio.gather(*(ask_at(float(each)) for each in arrivals if each < seconds))
        elapsed = time.perf_counter() - started
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]).tolist()
    return {
        "requests": len(latencies),
        "errors": errors,
        "requests_per_second": len(latencies) / elapsed,
        "p50": p50,
        "p95": p95,
        "p99": p99,
    }


def soak(port: int, process: Any, requests: list[dict[str, Any]], num_requests: int) -> list[float]:
    """Sends requests of one short passage, eight at a time. Returns the memory (MiB) after each tenth of them."""
    small = [{"query": each["query"], "documents": [each["documents"][0][:200]]} for each in requests]

    async def send(first: int, last: int) -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT) as client:

            async def ask(start: int) -> None:
                for number in range(start, last, 8):
                    answer = await client.post(f"http://127.0.0.1:{port}/v1/rerank", json=small[number % len(small)])
                    answer.raise_for_status()

            await asyncio.gather(*(ask(first + offset) for offset in range(8)))

    found = []
    for tenth in range(10):
        asyncio.run(send(num_requests * tenth // 10, num_requests * (tenth + 1) // 10))
        found.append(memory(process))
        print(f"{num_requests * (tenth + 1) // 10} requests: {found[-1]:.0f} MiB", flush=True)
    return found


def memory(process: Any) -> float:
    """Returns the resident memory of a process and its children, in MiB."""
    root = psutil.Process(process.pid)
    return sum(each.memory_info().rss for each in (root, *root.children(recursive=True))) / 2**20


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| load | server | requests | requests/s | p50 (s) | p95 (s) | p99 (s) | errors | memory (MiB) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed = f"{row['requests_per_second']:.2f} | {row['p50']:.2f} | {row['p95']:.2f} | {row['p99']:.2f}"
        kind = f"{row['clients']} clients" if "clients" in row else f"{row['rate']:g} per second"
        lines.append(
            f"| {kind} | {row['server']} | {row['requests']} | {speed} | {row['errors']} | {row['memory_mib']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
