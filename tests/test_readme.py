"""Runs the code blocks of the README as a reader would, after `make quickstart`."""

import re
from pathlib import Path

import pytest
from helpers import run_python
from hub_server import run_hub

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, flags=re.DOTALL)


@pytest.mark.slow
def test_every_block_runs_and_prints_what_it_says(quickstart_output, tmp_path):
    (tmp_path / "quickstart-output").symlink_to(quickstart_output.folder)
    assert len(CODE) == 4
    with run_hub() as hub:
        for code, expected in CODE:
            printed = run_python(code, tmp_path, HF_ENDPOINT=hub.endpoint)
            if expected:
                # Scores differ slightly between machines, and the ranking does not.
                numbers = r"-?\d+\.\d+"
                assert re.sub(numbers, "#", printed) == re.sub(numbers, "#", expected)
        assert "model.safetensors" in hub.repos["you/my-reranker"]


def test_paths_of_the_annotated_tree_exist():
    tree = README.split("llama_bidir/\n├──")[1].split("```")[0]
    names = re.findall(r"(?:^|├──|└──) ([\w/]+(?:\.py)?)", tree)
    assert len(names) >= 12
    for name in names:
        assert (Path(__file__).parents[1] / "llama_bidir" / name).exists(), name
