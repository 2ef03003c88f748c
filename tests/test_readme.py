"""What the README says about the repository holds. tests/cli/test_quickstart.py runs its code blocks."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_paths_of_the_annotated_tree_exist():
    tree = README.split("llama_bidir/\n├──")[1].split("```")[0]
    names = re.findall(r"(?:^|├──|└──) ([\w/]+(?:\.py)?)", tree)
    assert len(names) >= 12
    for name in names:
        assert (Path(__file__).parents[1] / "llama_bidir" / name).exists(), name
