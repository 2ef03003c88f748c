"""An HTTP server for a reranker, with the requests of Cohere, Jina, vLLM and Text Embeddings Inference."""

from ..utils.extras import require

for _module in ("fastapi", "uvicorn", "prometheus_client"):
    require(_module, "serve")
