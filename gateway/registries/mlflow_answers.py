"""Reads the answers of an MLflow server, without trust in their form.

Pure: turns parsed JSON into the registry's own values. Must not know a server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from gateway import yamltext
from gateway.names import InvalidReference, check_version
from gateway.registries.base import UNREADABLE, Alias, Verdict, before, since

ROLLOUT_TAG: Final = "gateway.rollout"
#: The digits of the largest whole number of 64 bits.
_LONGEST_NUMBER: Final = 19
#: The end of the year 9999, the last that a date can have, in milliseconds since 1970.
_LAST_MOMENT: Final = 253_402_300_799_000


def with_past(version: str, tag: str | None) -> Alias:
    """An alias with the content of its tag that the gateway wrote, as far as that still applies: MLflow's own
    clients move aliases without changing the tag."""
    past = _past(tag)
    try:
        stood = check_version(str(past["version"]))
        previous = tuple(check_version(str(number)) for number in past.get("previous", ()))
        last_good = None if past.get("last_good") is None else check_version(str(past["last_good"]))
    except (TypeError, KeyError, InvalidReference):
        return Alias(version)
    verdict = Verdict.from_json(past.get("verdict"))
    stands = Alias(stood, previous, last_good, past.get("forced") is True, back=past.get("back") is True)
    if stood == version:
        return stands
    if version in previous:
        return Alias(version, since(previous, version), last_good, back=True)
    served = replace(stands, verdict=verdict).served
    return Alias(version, before(previous, served, version), last_good)


def with_verdict(alias: Alias, tag: str | None, told: str | None) -> Alias:
    """The alias with the verdict on its version. The alias's tag, which is read at every poll, decides if it
    is about that version. Otherwise `told` decides, the version's own tag, which is read once."""
    past = _past(tag)
    if str(past.get("version")) == alias.version and "verdict" in past:
        return replace(alias, verdict=Verdict.from_json(past["verdict"]))
    return replace(alias, verdict=Verdict.from_json(_past(told)))


def _past(tag: str | None) -> dict[str, Any]:
    try:
        past = json.loads(tag or "{}")
    except (ValueError, RecursionError):  # any user of MLflow can write a tag
        return {}
    return past if isinstance(past, dict) else {}


def rollout(tags: Mapping[str, str]) -> Mapping[str, Any]:
    """The rollout policy in a registered model's tag: YAML or JSON."""
    if ROLLOUT_TAG not in tags:
        return {}
    try:
        value = yamltext.data(yamltext.parse(tags[ROLLOUT_TAG]), typed=True)
    except yamltext.InvalidText as error:
        return {UNREADABLE: f"the tag {ROLLOUT_TAG} is neither YAML nor JSON: {error}"}
    if not isinstance(value, dict):
        return {UNREADABLE: f"the tag {ROLLOUT_TAG} must hold a mapping"}
    return value


def listed_versions(registered: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The newest version of each stage, by number. The newest of all versions is among them."""
    items = objects(registered.get("latest_versions"))
    return {str(i.get("version")): i for i in items if re.fullmatch(r"[1-9]\d{0,17}", str(i.get("version")))}


def objects(value: object) -> Sequence[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def info(value: object) -> dict[str, Any]:
    """The `info` of a run or logged model. An answer without it is not MLflow's."""
    found = value.get("info") if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def tags(item: Mapping[str, Any]) -> dict[str, str]:
    return {str(tag.get("key")): str(tag.get("value", "")) for tag in objects(item.get("tags"))}


def whole(value: object) -> int | None:
    text = str(value) if isinstance(value, int | str) else ""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER else None


def moment(value: object) -> str | None:
    milliseconds = whole(value)
    if milliseconds is None or milliseconds > _LAST_MOMENT:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
