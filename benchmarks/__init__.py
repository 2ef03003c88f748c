"""Measurements of speed and memory against peers; see `scoring.py`."""

import os

# tqdm reads this variable at import. The peers' progress bars would break up the tables.
os.environ.setdefault("TQDM_DISABLE", "1")
