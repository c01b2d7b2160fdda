"""The teams of the settings and of the tokens file, and which of them a model belongs to.

Must not know requests or credentials.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gateway.access.tokens import InvalidTokens, TokensFile
from gateway.patterns import Patterns
from gateway.settings import SettingsError

if TYPE_CHECKING:
    from gateway.settings import Settings


def team_patterns(settings: Settings) -> dict[str, tuple[Patterns, Patterns]]:
    """By team: the models that it may use, and control."""
    alias = settings.default_alias
    return {
        name: (Patterns(team.predict, alias), Patterns(team.control, alias))
        for name, team in settings.access.teams.items()
    }


def tokens_file(settings: Settings) -> TokensFile | None:
    """The tokens file, read; None without one. Raises SettingsError."""
    file = settings.access.tokens_file
    if file is None:
        return None
    found = TokensFile(file, settings.default_alias)
    try:
        found.read()
    except InvalidTokens as error:
        raise SettingsError([(f"{file}{where}", what) for where, what in error.problems]) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError([("access.tokens_file", f"{file}: {reason}")]) from None
    return found


def teams_of(
    model: str, held: TokensFile | None, allowed: Mapping[str, tuple[Patterns, Patterns]]
) -> frozenset[str]:
    """The teams whose patterns name a model. A team that may use all models does not count. `held`: the
    tokens, `allowed`: `team_patterns`."""
    holders = () if held is None else held.teams
    named = [(name, predict) for name, (predict, _) in allowed.items() if name != "*"]
    return frozenset(
        team for team, predict in (*holders, *named) if not predict.everything and predict.touches(model)
    )
