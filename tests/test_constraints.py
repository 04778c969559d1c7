import numpy as np
import pytest

from moeplace.constraints import Constraint, Forbid, Pin
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from tests.strategies import plan, problem

TWO_LAYERS = plan([[0, 1, 2, 0], [1, 2, 0, 2]], [2, 2])


def test_a_pin_is_broken_in_every_layer_where_the_rank_lacks_the_expert() -> None:
    assert Pin(0, 0).violations(TWO_LAYERS) == [
        "layer 1: expert 0 is pinned to rank 0 but not there"
    ]
    assert Pin(0, 1).violations(TWO_LAYERS) == []


def test_a_forbid_is_broken_in_every_layer_where_the_rank_holds_the_expert() -> None:
    assert Forbid(2, 1).violations(TWO_LAYERS) == [
        "layer 0: expert 2 is forbidden on rank 1 but there",
        "layer 1: expert 2 is forbidden on rank 1 but there",
    ]
    assert Forbid(1, 1).violations(TWO_LAYERS) == []


def test_a_rule_for_one_layer_says_nothing_about_the_others() -> None:
    assert Pin(0, 0, layer=0).violations(TWO_LAYERS) == []
    assert len(Pin(0, 0, layer=1).violations(TWO_LAYERS)) == 1
    assert Forbid(0, 0, layer=1).violations(TWO_LAYERS) == []


@pytest.mark.parametrize("kind", [Pin, Forbid])
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((3, 0), "names expert 3: experts are whole numbers from 0 to 2"),
        ((-1, 0), "names expert -1"),
        ((0, 2), "names rank 2: ranks are whole numbers from 0 to 1"),
        ((0, 0, 2), "names layer 2: layers are whole numbers from 0 to 1"),
        ((0.5, 0), "names expert 0.5"),
        ((True, 0), "names expert True"),
        (("0", 0), "names expert '0'"),
    ],
)
def test_rules_about_what_does_not_exist_are_refused(
    kind: type[Pin] | type[Forbid], rule: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ProblemError, match=message):
        problem([[1, 2, 3], [1, 2, 3]], [1, 1], 2, constraints=[kind(*rule)])


def test_rules_become_masks_that_planners_read() -> None:
    rules: list[Constraint] = [Pin(0, 1), Forbid(1, 0, layer=1)]
    one = problem([[1, 2], [1, 2]], [1, 1, 1], [2, 2, 0], constraints=rules)
    pinned = np.zeros((2, 2, 3), dtype=bool)
    pinned[:, 0, 1] = True
    allowed = np.ones((2, 2, 3), dtype=bool)
    allowed[1, 1, 0] = False
    allowed[:, :, 2] = False  # no slots there
    assert (one.pinned == pinned).all()
    assert (one.allowed == allowed).all()


def test_evaluate_lists_every_broken_rule() -> None:
    rules = [Pin(2, 0), Forbid(0, 0)]
    one = problem([1, 2, 3], [1, 1], 2, constraints=rules)
    priced = evaluate(one, plan([0, 1, 2, 0], [2, 2]))
    assert not priced.legal
    assert priced.violations == (
        "layer 0: expert 2 is pinned to rank 0 but not there",
        "layer 0: expert 0 is forbidden on rank 0 but there",
    )
