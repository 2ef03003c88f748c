"""The bodies of requests, and the answers, in the shapes of the APIs that clients know."""

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class Document(_Body):
    """A passage as an object."""

    text: str


class RerankBody(_Body):
    """A request as Cohere, Jina and vLLM define it."""

    query: str
    documents: list[str | Document] = Field(min_length=1, fail_fast=True)
    top_n: int | None = Field(None, ge=0)  # 0 is vLLM's word for all
    return_documents: bool | None = False
    instruction: str | None = None
    model: str | None = None

    @property
    def texts(self) -> list[str]:
        """The passages."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


class TeiBody(_Body):
    """A request as Text Embeddings Inference defines it, with `texts`."""

    query: str
    texts: list[str] = Field(min_length=1, fail_fast=True)
    raw_scores: bool | None = False
    return_text: bool | None = False
    truncate: bool | None = False
    instruction: str | None = None


class ScoreBody(_Body):
    """A request to `/score` as vLLM defines it: a text against each of several, or pairs of two lists."""

    text_1: str | Annotated[list[str], Field(fail_fast=True)]
    text_2: str | Annotated[list[str], Field(fail_fast=True)]
    instruction: str | None = None
    model: str | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """
        Returns the pairs.

        Raises:
            ValueError: the two lists differ in length, or one is empty.
        """
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        first = [self.text_1] * len(second) if isinstance(self.text_1, str) else self.text_1
        first = first * len(second) if len(first) == 1 else first
        if len(first) != len(second) or not first:
            raise ValueError(
                f"text_1 must be one text, or as many as text_2, and at least one; got {len(first)} and {len(second)}"
            )
        return list(zip(first, second, strict=True))


class BodyError(ValueError):
    """The body of a request breaks a rule. The message names the field and the rule."""


def is_tei(content: Any) -> bool:
    """Returns whether a body is a request of Text Embeddings Inference."""
    return isinstance(content, Mapping) and "texts" in content and "documents" not in content


def read_rerank(content: Any, max_documents: int) -> RerankBody | TeiBody:
    """Returns the request to a rerank route. One with `texts` is that of Text Embeddings Inference."""
    if not isinstance(content, Mapping):
        raise BodyError(f"the body must be a JSON object with query and documents, got {type(content).__name__}")
    _check_lengths(content, ("documents", "texts"), max_documents)
    return _validate(TeiBody if is_tei(content) else RerankBody, content)


def read_score(content: Any, max_documents: int) -> ScoreBody:
    """Returns the request to `/score`. In vLLM, `queries` and `documents`, or `data_1` and `data_2`, name the texts."""
    if not isinstance(content, Mapping):
        raise BodyError(f"the body must be a JSON object with text_1 and text_2, got {type(content).__name__}")
    _check_lengths(content, content.keys(), max_documents)
    renamed = dict(content)
    for ours, names in (("text_1", ("queries", "data_1", "query")), ("text_2", ("documents", "data_2", "items"))):
        for name in names:
            if ours not in renamed and name in renamed:
                renamed[ours] = renamed[name]
    return _validate(ScoreBody, renamed)


def _check_lengths(content: Mapping[str, Any], names: Iterable[str], most: int) -> None:
    """Raises BodyError for a list that is too long, before anything looks at its elements."""
    for name in names:
        if isinstance(content.get(name), list) and len(content[name]) > most:
            raise BodyError(f"{name}: at most {most} are allowed, got {len(content[name])}")


def _validate(kind: Any, content: Mapping[str, Any]) -> Any:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # Pydantic adds the name of the union member, which is not a field of the body.
        place = [
            str(part) for part in first["loc"] if not str(part).startswith(("str", "list[", "Document", "constrained"))
        ]
        rule = "must be a string or an object with text" if place[0] == "documents" and place[1:] else first["msg"]
        raise BodyError(f"{'.'.join(place)}: {rule}") from None


def rerank_answer(
    body: RerankBody,
    scores: Sequence[float],
    *,
    order: Sequence[float],
    model: str,
    num_tokens: int,
    is_first_version: bool,
) -> dict[str, Any]:
    """
    Returns the response to a Cohere-style request: the best passages. Equal scores keep the order of the request.

    Args:
        body: the request.
        scores: of its passages.
        order: what they are sorted by, because probabilities near 1 are equal after rounding.
        model, num_tokens: for the answer.
        is_first_version: whether the client uses the first version of Cohere's API.
    """
    ranked = sorted(range(len(scores)), key=lambda index: -order[index])[: body.top_n or None]
    texts = body.texts
    results = []
    for index in ranked:
        document = {"document": {"text": texts[index]}} if body.return_documents else {}
        results.append({"index": index, "relevance_score": scores[index], **document})
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": model,
        "results": results,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        "meta": {"api_version": {"version": "1" if is_first_version else "2"}, "billed_units": {"search_units": 1}},
    }


def tei_answer(body: TeiBody, scores: Sequence[float], *, order: Sequence[float]) -> list[dict[str, Any]]:
    """Returns the answer to a request of Text Embeddings Inference, as [`rerank_answer`] does."""
    return [
        {"index": index, "score": scores[index], **({"text": body.texts[index]} if body.return_text else {})}
        for index in sorted(range(len(scores)), key=lambda index: -order[index])
    ]


def score_answer(scores: Sequence[float], *, model: str, num_tokens: int) -> dict[str, Any]:
    """Returns the answer to a request to `/score`, in the order of its pairs."""
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0},
    }
