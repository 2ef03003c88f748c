"""The routes of the server."""

import asyncio
import hmac
import json
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from .. import __version__
from ..utils.errors import ScoreError
from .batching import ClosedError, QueueFullError
from .bodies import CLIENT_LEFT, Bodies, Limits, RefusedError
from .metrics import Metrics
from .requests import (
    BodyError,
    RerankBody,
    ScoreBody,
    TeiBody,
    is_tei,
    read_rerank,
    read_score,
    rerank_answer,
    score_answer,
    tei_answer,
)
from .scorer import ServedReranker, TooManyTokensError

logger = logging.getLogger(__name__)


def make_app(
    reranker: ServedReranker, metrics: Metrics, *, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """
    Returns the application.

    Args:
        reranker: computes the scores.
        metrics: counts the requests.
        limits: of the requests.
        api_key: what a client must send as `Authorization: Bearer KEY`, except to `/`, `/health`, `/docs` and
            `/openapi.json`. None lets everyone ask.
    """
    limits = limits or Limits()
    app = FastAPI(title="llama-bidir", version=__version__, summary=f"Reranking with {reranker.name}", redoc_url=None)
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    num_admitted = 0
    bodies = Bodies(limits)

    def check_key(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), (api_key or "").encode())
        if api_key is not None and not (scheme.lower() == "bearer" and is_right):
            message = "the API key is missing or wrong: send Authorization: Bearer KEY"
            raise RefusedError(401, message, **{"WWW-Authenticate": "Bearer"})

    async def answer(request: Request, respond: Callable[[Any, float], Awaitable[Any]]) -> Response:
        """Reads a body, answers it, counts the outcome, and logs one line without any text of the request."""
        started, route = time.monotonic(), request.url.path
        status, for_tei = 200, False
        headers: dict[str, str] = {}
        try:
            check_key(request)
            async with bodies.read(request) as body:
                content = await run_in_threadpool(_parse, body)
                for_tei = is_tei(content)
                answered = await respond(content, started + limits.seconds)
        except Exception as error:
            status, headers, message = _outcome(error)
            answered = _error_body(status, message, for_tei=for_tei)
            if status >= 500:  # the message could quote the texts of the request
                logger.error(f"{route} {status} {type(error).__name__}")
                logger.debug(message, exc_info=error)
        seconds = time.monotonic() - started
        metrics.requests.labels(route, status).inc()
        metrics.seconds.labels(route).observe(seconds)
        logger.info(f"{route} {status} {1000 * seconds:.0f} ms")
        return JSONResponse(answered, status_code=status, headers=headers)

    async def score(
        request: Request,
        pairs: list[tuple[str, str]],
        instruction: str | None,
        deadline: float,
        *,
        cuts: bool | None = True,
    ) -> tuple[torch.Tensor, int]:
        """Returns the logits of pairs and the number of their tokens. A request has its place from here on."""
        nonlocal num_admitted
        if num_admitted >= reranker.batcher.max_waiting:
            raise reranker.batcher.full_error()
        num_admitted += 1
        left = asyncio.ensure_future(_wait_until_left(request))
        has_stopped = threading.Event()

        async def wait_for(work: "asyncio.Future[Any]") -> Any:
            """Waits for work, but not beyond the deadline, and not for a client that has hung up."""
            waited: set[asyncio.Future[Any]] = {work, left}
            await asyncio.wait(waited, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
            if left.done() and not work.done():
                raise RefusedError(CLIENT_LEFT, "the client has hung up")
            if not work.done():
                raise RefusedError(504, f"no answer within {limits.seconds:g} s: send fewer documents, or ask later")
            return await work

        tasks: list[asyncio.Future[Any]] = []
        try:
            loop = asyncio.get_running_loop()
            tasks.append(
                loop.run_in_executor(reranker.tokenizing, reranker.encode, pairs, instruction, has_stopped.is_set)
            )
            encoded = await wait_for(tasks[-1])
            if encoded.num_truncated and not cuts:
                longest = reranker.cross_encoder.config.rerank_max_length
                raise RefusedError(
                    422,
                    f"{encoded.num_truncated} inputs have more than {longest} tokens: send truncate: true to cut them",
                )
            tasks.append(asyncio.wrap_future(reranker.submit(encoded)))
            values = await run_in_threadpool(reranker.scores, encoded, await wait_for(tasks[-1]))
        finally:
            has_stopped.set()
            for task in (left, *tasks):
                task.cancel()  # frees the place in the queue
            num_admitted -= 1
        metrics.pairs.inc(len(pairs))
        return values, encoded.num_tokens

    async def rerank(request: Request) -> Response:
        async def respond(content: Any, deadline: float) -> Any:
            body = await run_in_threadpool(read_rerank, content, limits.documents)
            texts = body.texts
            pairs = [(body.query, text) for text in texts]
            if isinstance(body, TeiBody):
                values, _ = await score(request, pairs, body.instruction, deadline, cuts=body.truncate)
                scores = values.tolist() if body.raw_scores else reranker.normalize(values)
                return tei_answer(body, scores, order=values.tolist())
            values, num_tokens = await score(request, pairs, body.instruction, deadline)
            return rerank_answer(
                body,
                reranker.activate(values),
                order=values.tolist(),
                model=reranker.name,
                num_tokens=num_tokens,
                is_first_version=not request.url.path.startswith("/v2"),
            )

        return await answer(request, respond)

    async def score_pairs(request: Request) -> Response:
        async def respond(content: Any, deadline: float) -> Any:
            body = await run_in_threadpool(read_score, content, limits.documents)
            values, num_tokens = await score(request, body.pairs(), body.instruction, deadline)
            return score_answer(reranker.activate(values), model=reranker.name, num_tokens=num_tokens)

        return await answer(request, respond)

    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        app.post(path, summary="Rank documents for a query", openapi_extra=_schema(RerankBody, TeiBody))(rerank)
    for path in ("/score", "/v1/score"):
        app.post(path, summary="Score pairs", openapi_extra=_schema(ScoreBody))(score_pairs)

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, error: RefusedError) -> Response:
        return JSONResponse(_error_body(error.status, str(error)), status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def tell(request: Request, error: HTTPException) -> Response:
        return JSONResponse(_error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health", summary="Whether the server is ready")
    @app.head("/health", include_in_schema=False)
    async def health() -> JSONResponse:
        is_ready = reranker.batcher.is_alive
        return JSONResponse({"status": "ready" if is_ready else "stopped"}, 200 if is_ready else 503)

    @app.get("/v1/models", summary="The reranker that is served")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        length = reranker.cross_encoder.config.rerank_max_length
        entry = {"id": reranker.name, "object": "model", "owned_by": "llama-bidir", "max_model_len": length}
        return {"object": "list", "data": [entry]}

    @app.get("/metrics", summary="Counters for Prometheus")
    async def show_metrics(request: Request) -> Response:
        check_key(request)
        metrics.waiting.set(reranker.batcher.num_waiting)
        text, content_type = metrics.text()
        return Response(text, media_type=content_type)

    return app


def _schema(*bodies: Any) -> dict[str, Any]:
    """Returns the description of a body for `/docs`."""
    schemas = [body.model_json_schema() for body in bodies]
    for schema in schemas:
        schema.pop("$defs", None)
    schema = schemas[0] if len(schemas) == 1 else {"oneOf": schemas}
    text = json.dumps(schema).replace('{"$ref": "#/$defs/Document"}', '{"type": "object", "required": ["text"]}')
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": json.loads(text)}}}}


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BodyError(f"the body is not JSON: {error}") from None


async def _wait_until_left(request: Request) -> None:
    """Returns when the client has hung up. The body has been read, so nothing else arrives."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _outcome(error: Exception) -> tuple[int, dict[str, str], str]:
    """Returns the HTTP status, the headers and the message of a request that has failed."""
    message = str(error).partition("\n")[0]
    if isinstance(error, RefusedError):
        return error.status, error.headers, message
    if isinstance(error, QueueFullError):
        return 429, {"Retry-After": str(math.ceil(error.retry_after))}, message
    if isinstance(error, ClosedError):
        return 503, {"Retry-After": "1"}, message
    if isinstance(error, TooManyTokensError):
        return 413, {}, message
    if isinstance(error, torch.OutOfMemoryError):
        return 507, {}, f"the device has no memory for this request: {message}"
    if isinstance(error, ScoreError):
        return 500, {}, message
    if isinstance(error, ValueError):  # of the body, or of a text that cannot be encoded
        return 422, {}, message
    return 500, {}, f"{type(error).__name__}: {message}"


def _error_body(status: int, message: str, *, for_tei: bool = False) -> dict[str, Any]:
    """Returns the body of an error, in the shape of the client's API."""
    if for_tei:
        kind = {429: "Overloaded", 503: "Unhealthy"}.get(status, "Validation" if status < 500 else "Backend")
        return {"error": message, "error_type": kind}
    kind = "invalid_request_error" if status < 500 else "server_error"
    # `message` is Cohere's field, `error` that of OpenAI and vLLM, and `detail` that of Jina.
    return {"message": message, "error": {"message": message, "type": kind, "code": status}, "detail": message}
