"""Why a request has no answer: what became of it in the queue or in the model, as a problem for its caller.

Knows versions and the errors of their processes; must not know a protocol or an alias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.errors import Detail, Problem, overloaded
from gateway.events import InputRefused, PredictionFailed, RequestRefused
from gateway.runners.base import ModelError, NoProcess, RunnerTimeout
from gateway.runners.suspects import Poisoned
from gateway.serving.admission import FULL, NotAdmitted
from loaders.batch import incomplete
from loaders.enforcement.violations import shown
from loaders.output import AnswerTooLarge
from loaders.spelling import few

if TYPE_CHECKING:
    from gateway.events import Emit
    from gateway.record import RequestRecord
    from gateway.serving.servable import Servable

_UNSUITABLE: Final = "does not suit the model"
#: Where a table is larger, its missing values are not looked for; and so many columns are named.
MOST_CELLS: Final = 20_000
MOST_NAMED: Final = 5


def unanswered(
    servable: Servable, record: RequestRecord, error: Exception, emit: Emit, batch: object = None
) -> Problem:
    """The problem for a full queue (429), a deadline (504), an ended process (502, 503) or a failed model
    (500). Failures of the model count in its statistics. `batch`: the input that the model got."""
    version, recent = servable.version, servable.recent
    match error:
        case NotAdmitted():
            why = "its turn would come after its deadline" if error.late else FULL
            emit(RequestRefused(version.name, version.version, why, record.shown_id))
            return overloaded(version.name, why, error.retry_after)
        case RunnerTimeout():
            recent.failed("no answer within the operator's timeout")
            return Problem("DEADLINE_EXCEEDED", str(error))
        case TimeoutError():
            return Problem("DEADLINE_EXCEEDED", "the caller's deadline passed before the answer came")
        case NoProcess():
            recent.failed(str(error))
            message = f"{version} cannot answer now: {error}"
            return Problem("MODEL_UNAVAILABLE", message, retry_after=error.retry_after)
        case Poisoned():
            recent.failed(str(error))
            emit(PredictionFailed(version.name, version.version, str(error), "", record.shown_id))
            message = f"{version} cannot process this input: it ended the model's process each time it ran"
            hint = "do not send it again; the model answers other inputs"
            return Problem("PREDICTION_FAILED", message, hint=hint)
        case ModelError():
            return _model_failed(servable, record, error, emit, batch)
    recent.failed(f"its process ended in the call: {error}")
    message = f"the process of {version} ended while it worked on the request"
    return Problem("WORKER_CRASHED", message, retry_after=1)


def _model_failed(
    servable: Servable, record: RequestRecord, error: ModelError, emit: Emit, batch: object
) -> Problem:
    """The model raised an exception: 500, or 422 if the exception says that the input is wrong."""
    version = servable.version
    if error.unsuitable:
        identity = record.shown_id
        emit(InputRefused(version.name, version.version, (_UNSUITABLE,), identity))
        message = f"the input does not suit {version}: {error.shown}"
        return Problem("INVALID_INPUT", message, details=[Detail("body", _UNSUITABLE)])
    kind = str(error).partition(":")[0]
    servable.recent.failed(kind)
    emit(PredictionFailed(version.name, version.version, str(error), error.trace, record.shown_id))
    if kind == AnswerTooLarge.__name__:
        message = f"the answer of {version} is larger than an answer may be"
        hint = "send fewer rows in one request; the operator's limit is the setting max_answer_bytes"
    else:
        message = f"{version} raised {kind}" + (f": {error.shown}" if error.shown else "")
        hint = "the gateway's log has the text and the traceback, under this request's id"
        if getattr(batch, "rows", None) == 0:
            hint = f"the request has no rows, which not every model takes; {hint}"
        elif gaps := incomplete(batch, MOST_CELLS):
            named = few([shown(name) for name in gaps], MOST_NAMED)
            hint = f"the request has missing values in {named}, which not every model takes; {hint}"
    return Problem("PREDICTION_FAILED", message, hint=hint)
