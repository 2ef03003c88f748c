"""
What people write to serve sentence-transformers: a FastAPI endpoint around its CrossEncoder.

    python -m benchmarks.serving_peer --model FOLDER --dtype bfloat16 --port 8001

One request is computed at a time, which is faster here than several that share the cores.
"""

import argparse
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder


class Body(BaseModel):
    """A request."""

    query: str
    documents: list[str]


def main() -> None:
    """Serves the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    model = CrossEncoder(args.model, device="cpu", model_kwargs={"dtype": getattr(torch, args.dtype)})
    app, lock = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/rerank")
    def rerank(body: Body) -> dict[str, Any]:
        pairs = [(body.query, document) for document in body.documents]
        with lock:
            scores = model.predict(pairs, batch_size=args.batch_size, show_progress_bar=False).tolist()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        return {"results": [{"index": index, "relevance_score": scores[index]} for index in order]}

    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
