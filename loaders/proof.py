"""The verification of a saved package: does it answer as the object from which it was saved?

The original answers the input example twice: if these answers differ, they cannot be compared with others.
The package answers in a new process, from the JSON form of the example. If both agree, the answer is recorded
in the package. Knows originals, trials and recorded answers; must not know how they work.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loaders import batch as batches
from loaders import original, recorded, trial
from loaders.plain import NotPlain
from loaders.spelling import counted

if TYPE_CHECKING:
    from loaders.enforcement import Enforced
    from loaders.package import Package


class AnswersDiffer(ValueError):
    """The saved package answers its example differently from the original. `fields` are the places."""

    def __init__(self, message: str, fields: list[str]) -> None:
        super().__init__(message)
        self.fields = fields


@dataclass(frozen=True)
class Originals:
    """The original's answer to its example. `answer`: in the form of `recorded`, None if there is nothing to
    compare. `steady`: its two answers are equal, so that an answer may be recorded."""

    answer: Any = None
    steady: bool = True


def ask(model: Any, flavor: str, options: Mapping[str, Any], data: Any, enforced: Enforced) -> Originals:
    """Calls the object itself twice with the example `data`, or with the model's input if that has another
    kind. Warns if its answers differ from each other, or if it does not accept the example."""
    ask_once = original.asker(model, flavor, options)
    if ask_once is None:
        return Originals()
    given = batches.native(enforced.batch)
    tries = [data, given] if original.same_kind(data, given) else [given]
    failed = None
    for example in tries:
        try:
            first, second = (
                batches.from_result(ask_once(copy.deepcopy(example), enforced.params), enforced.batch.rows)
                for _ in range(2)
            )
        except Exception as error:  # noqa: BLE001 - whatever the model raises: it may take the other form
            failed = error
            continue
        try:
            answer = recorded.form(first)
        except NotPlain as error:
            _warn(f"the model's answer cannot be sent as JSON: {error}")
            return Originals(steady=False)
        if changed := recorded.differences(answer, second):
            _warn(
                "the model's two answers to its input_example differ, "
                f"at {changed[0]}: the saved package was not compared with it, and no answer is recorded"
            )
            return Originals(steady=False)
        return Originals(answer)
    _warn(
        "the model object itself does not accept the input_example "
        f"({type(failed).__name__}: {failed}): the saved package was not compared with it"
    )
    return Originals()


def verify(package: Package, originals: Originals) -> None:
    """Loads the package in a new process, compares its answer, and records it in the package's directory.
    Raises AnswersDiffer and TrialFailed."""
    compared = originals.answer is not None
    try:
        answers = trial.answers(package, 1 if compared or not originals.steady else 2)
    except trial.TrialFailed as error:
        if error.kind == "InvalidInput":
            _warn(f"the input example, once it is JSON, does not fit the model's signature: {error}")
            return
        raise trial.TrialFailed(
            f"the saved package does not work in a new process: {error}", error.kind, error.trace
        ) from None
    if not answers or not originals.steady:
        return
    try:
        answer = recorded.form(answers[-1])
    except NotPlain as error:
        _warn(f"the model's answer cannot be sent as JSON: {error}")
        return
    differing = recorded.differences(originals.answer if compared else answer, answers[0])
    if differing and compared:
        raise AnswersDiffer(_told(differing), [difference.place for difference in differing])
    if differing:
        _warn(f"the saved package's two answers to the input_example differ, at {differing[0]}")
    elif not recorded.write(package.path, answer):
        _warn(f"the answer to the input_example is larger than {recorded.MAX_BYTES >> 20} MiB: not recorded")


def changed(package: Package) -> list[str]:
    """The warnings for a package that records its answer: the places where the answer on this machine
    differs, or why it cannot be compared. Empty if the answer is equal or nothing is recorded. Loads the
    package in a new process only if there is a recorded answer."""
    try:
        known = recorded.read(package)
    except recorded.Unreadable as error:
        return [str(error)]
    if known is None or package.example is None:
        return []
    try:
        answers = trial.answers(package)
    except trial.TrialFailed as error:
        return [f"its recorded answer could not be compared here: {error}"]
    return [recorded.told(differing)] if (differing := recorded.differences(known, answers[0])) else []


def _told(differing: list[recorded.Difference]) -> str:
    rest = f", and at {counted(len(differing) - 1, 'more field')}" if len(differing) > 1 else ""
    return (
        f"the saved package and the model itself answer the input_example differently, at "
        f"{differing[0].place}: the model answers {differing[0].shown_recorded}, the package "
        f"{differing[0].shown_answered}{rest}. Nothing was saved. Either the example loses information as "
        "JSON, or the model depends on something outside the package"
    )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
