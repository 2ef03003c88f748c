"""Points the links of the README at the repository, because a package index shows no other file of it."""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE_LINK = re.compile(r"(!?\[[^\]]*\])\((?!https?:|#)([^)]+)\)")


class RepositoryLinks(MetadataHookInterface):
    """Reads the address of the repository from the environment variable REPOSITORY, which `make release` sets."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the README, and the address if it is given."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        if repository := os.environ.get("REPOSITORY", "").rstrip("/"):
            metadata["urls"] = {"Repository": repository, "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md"}
            text = RELATIVE_LINK.sub(lambda match: _absolute(*match.groups(), repository), text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def _absolute(label: str, path: str, repository: str) -> str:
    kind = "raw" if label.startswith("!") else "blob"
    return f"{label}({repository}/{kind}/HEAD/{path})"
