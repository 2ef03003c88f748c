"""A small share of the cases of `python -m tests.fuzz`, the same ones each time."""

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("accelerate")
pytest.importorskip("ir_measures")

from tests.fuzz.target import run_target
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_any_input(target):
    outcome = run_target(target, target.test_cases)
    if outcome.failure is not None:
        raise outcome.failure
    assert outcome.cases >= min(target.test_cases, 5)
