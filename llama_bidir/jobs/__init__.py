"""Long work that resumes after a kill: reranking runs and mining negatives."""
