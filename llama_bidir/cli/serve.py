"""Serve a reranker over HTTP."""

import argparse
import logging
from pathlib import Path
from typing import Any

from .options import DTYPES, positive_float, positive_int, read_devices, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.epilog = (
        "POST /v1/rerank, /v2/rerank and /rerank take the requests of Cohere, Jina, vLLM and Text Embeddings "
        "Inference, and /score those of vLLM. GET / is a page for trying it, /docs describes the requests, /metrics "
        "counts them, and /health answers once the reranker is ready. On SIGTERM, the server finishes the requests in "
        "progress and exits."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="folder or Hub id of a reranker or of an adapter")
    add("--host", default="127.0.0.1", metavar="H", help="address to listen on; %(default)s, 0.0.0.0 for all")
    add("--port", type=port, default=8000, metavar="P", help="%(default)s; 0 takes a free one")
    add("--name", metavar="N", help="what the answers call the reranker; the value of --model when not given")
    add("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    add("--device", nargs="+", metavar="D", help="such as cuda:1; several get one worker process each")
    add("--dtype", choices=DTYPES, help="the checkpoint's when not given")
    add("--max-length", type=positive_int, metavar="N", help="most tokens per pair; the checkpoint's when not given")
    add(
        "--long-document",
        choices=["truncate", "max", "first_max"],
        default="truncate",
        help="cut a document that does not fit, or score it in windows",
    )
    add("--probability", action="store_true", help="answer with calibrated probabilities instead of raw logits")
    add("--api-key-file", metavar="FILE", help="file with the key that clients must send as Authorization: Bearer KEY")
    add("--max-body-mb", type=positive_float, default=16.0, metavar="N", help="most megabytes per request; %(default)s")
    add(
        "--max-bodies-mb",
        type=positive_float,
        default=1024.0,
        metavar="N",
        help="most megabytes of all requests that are read, waiting or in progress; %(default)s",
    )
    add("--max-documents", type=positive_int, default=10_000, metavar="N", help="most per request; %(default)s")
    add("--max-tokens", type=positive_int, default=1_000_000, metavar="N", help="most per request; %(default)s")
    add(
        "--max-queue",
        type=positive_int,
        default=2048,
        metavar="N",
        help="most requests, waiting or in progress; %(default)s",
    )
    add(
        "--max-queue-tokens",
        type=positive_int,
        default=20_000_000,
        metavar="N",
        help="most tokens of all requests, waiting or in progress; %(default)s",
    )
    add("--max-tokens-per-batch", type=positive_int, metavar="N", help="chosen for the device when not given")
    add("--timeout", type=positive_float, default=300.0, metavar="S", help="seconds until a request fails; %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Loads the reranker, warms it up, and serves it until SIGTERM or Ctrl-C."""
    from transformers.utils import logging as transformers_logging

    from ..serving.server import listen

    api_key = None if arguments.api_key_file is None else read_key(Path(arguments.api_key_file))
    transformers_logging.disable_progress_bar()
    log_with_times()
    with listen(arguments.host, arguments.port) as (listener, address):
        serve_model(arguments, listener, address, api_key)


def serve_model(arguments: argparse.Namespace, listener: Any, address: str, api_key: str | None) -> None:
    """Loads a reranker and serves it on a bound socket."""
    from .. import CrossEncoder
    from ..serving.app import make_app
    from ..serving.bodies import Limits
    from ..serving.metrics import Metrics
    from ..serving.scorer import ServedReranker
    from ..serving.server import serve

    cross_encoder = CrossEncoder(
        arguments.model,
        revision=arguments.revision,
        device=read_devices(arguments.device),
        dtype=arguments.dtype,
        max_length=arguments.max_length,
        long_document=arguments.long_document,
    )
    metrics = Metrics()
    reranker = ServedReranker(
        cross_encoder,
        arguments.name or arguments.model,
        activation_fn="probability" if arguments.probability else None,
        max_tokens_per_batch=arguments.max_tokens_per_batch,
        max_tokens_per_request=arguments.max_tokens,
        max_waiting=arguments.max_queue,
        max_waiting_tokens=arguments.max_queue_tokens,
        on_batch=metrics.count_batch,
    )
    limits = Limits(
        body_bytes=int(arguments.max_body_mb * 1e6),
        all_bodies_bytes=int(arguments.max_bodies_mb * 1e6),
        documents=arguments.max_documents,
        seconds=arguments.timeout,
    )
    is_forced = False
    try:
        reranker.warm_up()
        app = make_app(reranker, metrics, limits=limits, api_key=api_key)
        is_forced = serve(app, listener, seconds=arguments.timeout + 1, on_start=lambda: say(f"ready: {address}"))
    finally:
        reranker.close(cancel=is_forced)


def port(text: str) -> int:
    """Reads a port, or 0."""
    value = int(text)
    if not 0 <= value < 65536:
        raise ValueError
    return value


def log_with_times() -> None:
    """Makes the server log its requests, each line with the time."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    serving = logging.getLogger("llama_bidir.serving")
    serving.addHandler(handler)
    serving.setLevel(logging.INFO)
    serving.propagate = False


def read_key(path: Path) -> str:
    """
    Returns the key in a file, without white space around it.

    Raises:
        FileNotFoundError, OSError: the file cannot be read.
        ValueError: it holds no key, or one that no header can hold.
    """
    key = path.read_text(encoding="utf-8").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(f"--api-key-file: {path} must hold one key of printable ASCII characters")
    return key
