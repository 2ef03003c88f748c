"""Counters and histograms in the text format of Prometheus."""

from typing import Any

from ..utils.extras import require

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = tuple(2**power for power in range(6, 21, 2))


class Metrics:
    """What a server counts. Each server has a registry of its own."""

    def __init__(self) -> None:
        client: Any = require("prometheus_client", "serve")
        self._client, self.registry = client, client.CollectorRegistry()
        make = {"registry": self.registry, "namespace": "llama_bidir"}
        self.requests = client.Counter("requests", "Requests by route and status.", ["route", "status"], **make)
        self.seconds = client.Histogram(
            "request_seconds", "Seconds from the request to its answer.", ["route"], buckets=SECONDS, **make
        )
        self.pairs = client.Counter("pairs", "Pairs that were scored.", **make)
        self.tokens = client.Counter("tokens", "Tokens that were computed.", **make)
        self.batch_tokens = client.Histogram("batch_tokens", "Tokens of a batch.", buckets=TOKENS, **make)
        self.batch_seconds = client.Histogram("batch_seconds", "Seconds of a batch.", buckets=SECONDS, **make)
        self.waiting = client.Gauge("waiting_requests", "Requests that wait or are computed.", **make)

    def count_batch(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """Counts a batch."""
        self.tokens.inc(num_tokens)
        self.batch_tokens.observe(num_tokens)
        self.batch_seconds.observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """Returns all values, and the content type of their format."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST
