"""An HTTP server for a reranker, with the requests of Cohere, Jina, vLLM and Text Embeddings Inference."""
