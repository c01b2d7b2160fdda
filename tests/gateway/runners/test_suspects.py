"""Which inputs may run again after their process ended."""

from __future__ import annotations

import numpy as np

from gateway.runners.suspects import FORGOTTEN, KEPT, REFUSED, REFUSED_AFTER_SIGKILL, Suspects, digest
from loaders.batch import Tensors, Value


def test_an_input_that_ended_two_processes_is_poison_for_a_while() -> None:
    suspects = Suspects()
    assert not suspects
    suspects.ended([b"a", b"b"], 0.0, outside=False)
    assert not suspects.is_poison(b"a", 0.0)
    suspects.answered([b"b"])
    suspects.ended([b"a"], 1.0, outside=False)
    assert suspects.is_poison(b"a", 1.0 + REFUSED - 0.1)
    assert not suspects.is_poison(b"b", 1.0)
    assert not suspects.is_poison(b"a", 1.0 + REFUSED), "it gets another trial"
    assert not suspects, "calls need no digests any more"


def test_an_answer_in_between_acquits() -> None:
    """Somebody kills the process again and again, and every caller sends the same body."""
    suspects = Suspects()
    for second in range(10):
        suspects.ended([b"a"], float(second), outside=True)
        assert not suspects.is_poison(b"a", float(second))
        suspects.answered([b"a"])


def test_members_with_equal_inputs_count_once() -> None:
    suspects = Suspects()
    suspects.ended([b"a", b"a", b"a"], 0.0, outside=False)
    assert not suspects.is_poison(b"a", 0.0)


def test_what_may_have_been_killed_from_outside_is_refused_for_a_short_time() -> None:
    suspects = Suspects()
    for _ in range(2):
        suspects.ended([b"a"], 0.0, outside=True)
        assert not suspects.is_poison(b"a", 0.1), "a process and its spare may be killed in one stroke"
    suspects.ended([b"a"], 0.0, outside=True)
    assert suspects.is_poison(b"a", 0.1)
    assert suspects.was_killed(b"a")
    assert not suspects.is_poison(b"a", REFUSED_AFTER_SIGKILL)


def test_it_forgets_and_is_bounded() -> None:
    suspects = Suspects()
    suspects.ended([b"a"], 0.0, outside=False)
    assert not suspects.is_poison(b"a", FORGOTTEN)
    assert not suspects
    for n in range(KEPT + 50):
        suspects.ended([str(n).encode()], 0.0, outside=False)
    assert len(suspects._ends) == KEPT


def test_a_digest_tells_inputs_apart() -> None:
    one, other = (Tensors({"": np.array([x])}, 1) for x in (1.0, 2.0))
    assert digest(one, {}) == digest(Tensors({"": np.array([1.0])}, 1), {})
    assert len({digest(one, {}), digest(other, {}), digest(one, {"p": 1}), digest(Value(["a"], 1), {})}) == 4
    assert digest(Value(object()), {}) == b""
