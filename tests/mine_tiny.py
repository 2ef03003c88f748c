"""Mines in small windows, for tests that start it as a process of its own, or as several, and kill it.

Usage: mine_tiny.py MODEL SOURCE OUTPUT [SECONDS_PER_WINDOW]
"""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from llama_bidir.jobs.journal import StateFile
from llama_bidir.jobs.mining import mine_file


def main():
    model, source, output, *seconds = sys.argv[1:]
    torch.set_num_threads(1)
    append = StateFile.append

    def append_slowly(*args):
        time.sleep(float(*seconds))  # leaves time for a kill to fall into any window
        append(*args)

    StateFile.append = append_slowly
    result = mine_file(model, source, output, window_pairs=16)
    with open(f"{output}.summary", "w") as file:
        json.dump(result._asdict(), file)


if __name__ == "__main__":
    main()
