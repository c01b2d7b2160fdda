"""Decides which requests may enter one model's queue, and when the others should try again. Pure: takes
counts and seconds, returns a decision.

In a queue that is too long, requests are answered after their callers have left. So a request is refused at
once if the queue is full, or if at the speed of the last calls its turn would come after its deadline. The
same speed gives the time to try again.
"""

from __future__ import annotations

#: How much the newest call counts in the pace (an exponential moving average).
WEIGHT = 0.2
#: Why a request is refused.
FULL = "its queue is full (max_queue)"
LOADING_FULL = "it is loading, and its queue is full (max_queue)"
#: What `Retry-After` may say, in seconds.
SHORTEST_WAIT, LONGEST_WAIT = 1.0, 60.0


class NotAdmitted(Exception):
    """The request is refused; try again in `retry_after` seconds. `late`: its deadline is the reason."""

    def __init__(self, retry_after: float, *, late: bool = False) -> None:
        super().__init__(f"try again in {retry_after:.1f} s")
        self.retry_after = retry_after
        self.late = late


class Admission:
    """The admission control of one model. `slots` calls run at once; at most `max_queue` requests wait."""

    def __init__(self, max_queue: int, slots: int = 1) -> None:
        self.max_queue = max_queue
        self._slots = slots
        self._seconds_per_request = 0.0

    def __repr__(self) -> str:
        return f"<Admission at most {self.max_queue} waiting, {self._seconds_per_request * 1e3:.2f} ms each>"

    def expected_wait(self, queued: int) -> float:
        """Seconds until a request behind `queued` others gets its turn."""
        return queued * self._seconds_per_request / self._slots

    def check(self, queued: int, now: float, deadline: float | None) -> None:
        """Raises NotAdmitted, or returns. `now` and `deadline` are of one clock, in seconds."""
        wait = self.expected_wait(queued)
        if queued >= self.max_queue:
            raise NotAdmitted(min(LONGEST_WAIT, max(SHORTEST_WAIT, wait)))
        if deadline is not None and now + wait > deadline:
            raise NotAdmitted(min(LONGEST_WAIT, max(SHORTEST_WAIT, wait)), late=True)

    def finished(self, requests: int, seconds: float) -> None:
        """Records a call: the number of its requests and its duration."""
        each = seconds / requests
        if self._seconds_per_request == 0.0:
            self._seconds_per_request = each
        else:
            self._seconds_per_request += WEIGHT * (each - self._seconds_per_request)
