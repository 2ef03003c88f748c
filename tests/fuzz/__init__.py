"""
Random input for every entry point: texts, files with damaged bytes, configurations, recipes and command lines.

Each module holds targets for one kind of input. A target draws an input with hypothesis and checks a property of the
result: the right value, or an error that the documentation promises. `TARGETS` in `targets.py` lists them all. A new
entry point, such as the bodies of HTTP requests, gets a module of its own and a line there.

    python -m tests.fuzz --cases 50000        runs all targets and prints a table
    python -m pytest tests/fuzz               runs a small share, the same cases each time
"""

import atexit
import os
import shutil
import tempfile

# Before transformers and datasets are imported, as in conftest.py: no network, and no cache that outlives the run.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="llama-bidir-fuzz-cache-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
