"""Does a saved package answer as the object it was saved from? Asked when a model is logged.

The original answers the input example twice: one that differs from itself cannot be compared. The package
answers once, in a fresh process and through the JSON form of the example. Where both agree, the answer is
recorded in the package. Knows originals, trials and recorded answers; must not know how they come about.
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

if TYPE_CHECKING:
    from loaders.enforcement import Enforced
    from loaders.package import Package


class AnswersDiffer(ValueError):
    """The saved package does not answer its example as the original does. `fields` are the places."""

    def __init__(self, message: str, fields: list[str]) -> None:
        super().__init__(message)
        self.fields = fields


@dataclass(frozen=True)
class Originals:
    """What the original answered to its example. `answer`: in the form of `recorded`, None where there is
    none to compare with. `steady`: it does not differ from itself, so that an answer may be recorded."""

    answer: Any = None
    steady: bool = True


def ask(model: Any, flavor: str, options: Mapping[str, Any], data: Any, enforced: Enforced) -> Originals:
    """Asks the object itself twice about the example `data`, or about what the model is given where that is
    of another kind. Warns where it differs from itself, and where it does not take the example."""
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
                "the model answers its input_example differently the second time, "
                f"at {changed[0]}: the saved package was not compared with it, and no answer is recorded"
            )
            return Originals(steady=False)
        return Originals(answer)
    _warn(
        "the model object itself does not take the input_example "
        f"({type(failed).__name__}: {failed}): the saved package was not compared with it"
    )
    return Originals()


def verify(package: Package, originals: Originals) -> None:
    """Loads the package in a fresh process, compares its answer and records it in the package's directory.
    Raises AnswersDiffer and TrialFailed."""
    compared = originals.answer is not None
    try:
        answers = trial.answers(package, 1 if compared or not originals.steady else 2)
    except trial.TrialFailed as error:
        if error.kind == "InvalidInput":
            _warn(f"the input example, once it is JSON, does not fit the model's signature: {error}")
            return
        raise trial.TrialFailed(
            f"the saved package does not work in a fresh process: {error}", error.kind, error.trace
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
        _warn(f"the saved package answers differently the second time, at {differing[0]}")
    elif not recorded.write(package.path, answer):
        _warn(f"the answer to the input_example is longer than {recorded.MAX_BYTES >> 20} MiB: not recorded")


def changed(package: Package) -> list[str]:
    """What to warn of a package that records its answer: the places where this machine answers differently,
    or why that cannot be told. Empty: it answers as recorded, or records nothing. Loads the package in a
    fresh process only where there is an answer to compare with."""
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
    rest = f", and at {len(differing) - 1} more fields" if len(differing) > 1 else ""
    return (
        f"the saved package does not answer the input_example as the model itself does, at "
        f"{differing[0].place}: the model answers {differing[0].shown_recorded}, the package "
        f"{differing[0].shown_answered}{rest}. Nothing was saved. Either the example loses something on its "
        "way through JSON, or the model depends on something that is not in the package"
    )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
