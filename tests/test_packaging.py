"""pyproject.toml, CITATION.cff and the code agree on what the package is and needs."""

import ast
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
