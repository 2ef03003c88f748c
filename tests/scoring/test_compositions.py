"""A pair's score does not depend on its batch. `python -m tests.scoring.compositions` compares many more."""

from compositions import BOUND, LAYOUTS, compare


def test_a_pair_scores_as_it_does_alone():
    found = compare(72, seed=1)
    assert {name: difference <= BOUND for name, (_, difference) in found.items()} == dict.fromkeys(LAYOUTS, True), found
    assert {count for count, _ in found.values()} == {found["by the engine"][0]}
    assert found["by the engine"][0] > 500
