"""Measurements of speed and memory against peers; see `scoring.py`."""

import os

# Read when tqdm is imported: the progress bars of the peers would break up the tables.
os.environ.setdefault("TQDM_DISABLE", "1")
