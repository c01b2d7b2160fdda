"""Pauses between retries: exponential, with jitter so that many gateways do not retry at the same time, and
never shorter than the server's Retry-After.

Computes numbers; must not wait.
"""

from __future__ import annotations

import email.utils
import random
import time

#: The default first pause and longest pause, in seconds.
FIRST = 1.0
LONGEST = 60.0
#: A pause is at most this share shorter than its nominal length.
JITTER = 0.2


def pause(
    failures: int,
    *,
    first: float = FIRST,
    longest: float = LONGEST,
    asked: float | None = None,
    chance: random.Random | None = None,
) -> float:
    """Returns the seconds to wait after `failures` failures in a row (at least 1). `asked`: the seconds that
    the server requests; the pause is that or a little longer, up to ten times `longest`."""
    share = (chance or _CHANCE).random()
    nominal = min(longest, first * 2.0 ** min(max(failures, 1) - 1, 30))
    found = nominal * (1 - JITTER * share)
    if asked is not None and asked > found:
        found = min(asked, 10 * longest) * (1 + JITTER * share)
    return found


def retry_after(header: str | None, now: float | None = None) -> float | None:
    """The seconds in a Retry-After header (RFC 9110 10.2.3: seconds or a date); None if it is missing or
    invalid. `now`: unix seconds."""
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        at = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, at - (time.time() if now is None else now))


_CHANCE = random.Random()
