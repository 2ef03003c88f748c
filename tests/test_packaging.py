"""pyproject.toml, CITATION.cff and the code agree on what the package is and needs."""

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llama_bidir

ROOT = Path(__file__).parents[1]


def optional_imports():
    """(module, extra) of every `require(module, extra)` in the package whose arguments are literals."""
    for path in (ROOT / "llama_bidir").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(ast.Name("require"), [ast.Constant(module), ast.Constant(extra)]):
                    yield module, extra


def test_the_extra_that_an_import_error_names_brings_the_module():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    brought = {
        extra: {canonicalize_name(Requirement(line).name) for line in requirements}
        for extra, requirements in extras.items()
    }
    found = set(optional_imports())
    assert len(found) >= 8
    for module, extra in found:
        assert canonicalize_name(module.split(".")[0]) in brought[extra], (module, extra)


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == llama_bidir.__version__


def test_links_of_a_released_readme_are_absolute(monkeypatch):
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    monkeypatch.setenv("REPOSITORY", "https://example.org/repository/")
    metadata = {}
    hook.RepositoryLinks(str(ROOT), {}).update(metadata)
    assert metadata["urls"]["Repository"] == "https://example.org/repository"
    text = metadata["readme"]["text"]
    links = re.findall(r"(!?)\[[^\]]*\]\(https://example\.org/repository/(blob|raw)/HEAD/([^)#]+)", text)
    assert len(links) > 15
    for mark, kind, path in links:
        assert (kind == "raw") is bool(mark)
        assert (ROOT / path).exists(), path
    assert not re.findall(r"\]\((?!https://)[^)]*\)", text)
