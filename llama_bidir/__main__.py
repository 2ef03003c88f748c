"""`python -m llama_bidir`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
