"""Mines in small windows, for tests that start it as a process of its own and kill it.

Usage: mine_tiny.py MODEL SOURCE OUTPUT
"""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from llama_bidir.jobs.mining import job, mine_file


def main():
    model, source, output = sys.argv[1:]
    torch.set_num_threads(1)
    append = job.Journal.append

    def append_slowly(*args):
        time.sleep(float(os.environ.get("WINDOW_SECONDS", 0)))  # leaves time for a kill to fall into any window
        append(*args)

    job.Journal.append = append_slowly
    result = mine_file(model, source, output, window_pairs=16)
    with open(f"{output}.summary", "w") as file:
        json.dump(result._asdict(), file)


if __name__ == "__main__":
    main()
