"""Hooks of mkdocs: pages at the root of the repository, and links from docs/ to other files of it."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"\]\(((?:\.\./)?)([\w./-]+)((?:#[\w-]+)?)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages at the root, and the files that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_rewrite((ROOT / source).read_text(encoding="utf-8"), ROOT)))
    linked: set[str] = set()
    for path in sorted((ROOT / "docs").glob("*.md")):
        for up, target, _ in LINK.findall(path.read_text(encoding="utf-8")):
            if up and target not in PAGES:
                linked.add(target)
    for target in sorted(linked):
        files.append(File.generated(config, f"files/{_name(target)}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Points links of a page in docs/ at the pages and files that [`on_files`] has added."""
    return markdown if page.file.src_uri in PAGES.values() else _rewrite(markdown, ROOT / "docs")


def _rewrite(markdown: str, folder: Path) -> str:
    def replace(match: re.Match[str]) -> str:
        up, target, anchor = match.groups()
        path = (folder / up / target).resolve()
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else target
        if name in PAGES:
            return f"]({PAGES[name]}{anchor})"
        if name.startswith("docs/"):
            return f"]({name.removeprefix('docs/')}{anchor})"
        return f"](files/{_name(name)}{anchor})" if path.is_file() else match[0]

    return LINK.sub(replace, markdown)


def _name(target: str) -> str:
    """Browsers show a text file, and would download a script or a recipe. Markdown would become a page."""
    return target if target.endswith((".json", ".png")) else f"{target}.txt"
