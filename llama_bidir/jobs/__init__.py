"""Work on files: reranking runs and mining negatives, which resume after a kill, quantization and calibration."""
