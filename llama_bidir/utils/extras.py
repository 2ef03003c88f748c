"""Optional dependencies: an ImportError that says what to install."""

from importlib import import_module
from typing import Any


def require(module: str, extra: str) -> Any:
    """Imports and returns `module`. When it is missing, the ImportError names the extra of this package to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ImportError(f'{module} is not installed: pip install "llama-bidir[{extra}]"') from error
