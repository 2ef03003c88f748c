"""Checks early that a checkpoint exists, as a folder or on the Hub, and names it in errors."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from ..files_llama_bidir import check_checkpoint_path

logger = logging.getLogger(__name__)

CONFIG_FILES = ("config.json", "adapter_config.json")


def check_source(name_or_path: str | os.PathLike[str], source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    Checks that a name is a folder or a Hub repository. The Hub is asked once. If it cannot be reached, transformers
    alone would ask again for each file, for minutes.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        source: arguments for the Hub, such as `revision`. Those that are None are left out.

    Returns:
        the arguments for the Hub to load with. If the Hub does not answer and the repository is cached, they include
        `local_files_only`, and a warning says so.

    Raises:
        OSError: there is neither, or the Hub does not answer and the repository is not cached. The message names the
            checkpoint and the Hub.
    """
    check_checkpoint_path(name_or_path)
    name, source = os.fspath(name_or_path), {key: value for key, value in (source or {}).items() if value is not None}
    if os.path.exists(name):
        return source
    missing = f"{name!r} is not a checkpoint: there is no such folder, and "
    cache, revision = source.get("cache_dir") or constants.HF_HUB_CACHE, source.get("revision")
    try:
        url = hf_hub_url(name, CONFIG_FILES[0], subfolder=source.get("subfolder"), revision=revision)
        cached = [try_to_load_from_cache(name, file, cache, revision) for file in CONFIG_FILES]
    except HFValidationError as error:
        raise FileNotFoundError(f"{missing}it cannot be the id of a Hub repository: {error}") from None
    if is_offline_mode() or source.get("local_files_only"):
        if not Path(cache, repo_folder_name(repo_id=name, repo_type="model")).is_dir():
            raise FileNotFoundError(
                f"{missing}the cache holds no such repository, and local_files_only or offline mode forbids a download"
            )
        return source
    try:
        get_hf_file_metadata(url, token=source.get("token"))
    except EntryNotFoundError:
        return source  # the repository exists, but has no configuration
    except Exception as error:  # the HTTP client raises many classes for a network failure
        if source.get("force_download") or not any(isinstance(file, str) for file in cached):
            raise _explain(error, name, missing, revision) from None
        if not isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
            logger.warning(f"{name}: {constants.ENDPOINT} cannot be reached, so the cached files are used: {error}")
            return {**source, "local_files_only": True}
    return source


def _explain(error: Exception, name: str, missing: str, revision: str | None) -> OSError:
    """Returns the error for a repository that is not cached, given what asking the Hub for it raised."""
    hub = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return OSError(
            f"{name!r} is a gated repository: ask for access at {hub}/{name}, then log in with `hf auth login` or pass "
            "a token"
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{missing}{hub} has no such repository, or none that this token may read: check the name, and log in with "
            "`hf auth login` if the repository is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"the repository {name!r} has no revision {revision!r}")
    if isinstance(error, HfHubHTTPError):
        return OSError(f"{missing}{hub} cannot serve a repository now, try again later: {str(error).splitlines()[0]}")
    return OSError(
        f"{missing}{hub} cannot be reached: {type(error).__name__}: {error}. Pass a folder, or check the network"
    )


@contextmanager
def naming_the_repository(name_or_path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a network error during a download into an OSError that names the repository."""
    try:
        yield
    except Exception as error:
        is_network = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "huggingface_hub")
        if not is_network or os.path.exists(name_or_path) or os.fspath(name_or_path) in str(error):
            raise
        raise OSError(
            f"{os.fspath(name_or_path)!r} could not be fetched from {constants.ENDPOINT}, try again later: "
            f"{type(error).__name__}: {error}"
        ) from error
