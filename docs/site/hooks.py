"""Hooks of mkdocs: pages from outside docs/, and links from docs/ to other files of the repository."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/folder_of_texts.ipynb": "folder-of-texts.md",
}
LINK = re.compile(r"\]\(((?:\.\./)?)([\w./-]+)((?:#[\w-]+)?)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside docs/, and the files that pages link to."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source.endswith(".ipynb"):
            text = _notebook(json.loads(text))
        files.append(File.generated(config, page, content=_rewrite(text, (ROOT / source).parent)))
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


def _notebook(content: dict[str, Any]) -> str:
    """Returns a notebook as Markdown: each code cell with the text that it prints."""
    blocks = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        blocks.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join("".join(output.get("text", [])) for output in cell.get("outputs", []))
        if printed:
            blocks.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(blocks) + "\n"


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
