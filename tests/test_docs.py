"""The code of docs/scoring.md, run from top to bottom as one script."""

import re
from pathlib import Path

import pytest
from test_hub import run

PAGE = (Path(__file__).parents[1] / "docs" / "scoring.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.slow
def test_the_page_prints_what_it_says(quickstart_output, tmp_path):
    pytest.importorskip("torchao")
    assert len(CODE) == PAGE.count("```python") == 3
    (tmp_path / "quickstart-output").symlink_to(quickstart_output.folder)
    printed = run("\n".join(code for code, _ in CODE), tmp_path)
    assert printed == "".join(expected for _, expected in CODE)
