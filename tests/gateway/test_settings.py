from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import settings
from gateway.cgroup import memory_total
from gateway.configuration import load
from gateway.rollout_settings import Capture, RolloutPolicy
from gateway.settings import ModelSettings, Settings, SettingsError

GIB = 1024**3


def of(
    text: str = "", environ: dict[str, str] | None = None, tmp: Path | None = None, **flags: Any
) -> Settings:
    file = None
    if tmp is not None:
        file = tmp / "gateway.yaml"
        file.write_text(text)
    return load(flags, environ or {}, file, directory=Path("/nowhere"))


def problems(text: str, environ: dict[str, str], tmp: Path, **flags: Any) -> dict[str, str]:
    with pytest.raises(SettingsError) as error:
        of(text, environ, tmp, **flags)
    return {place.removeprefix(f"{tmp}/"): problem for place, problem in error.value.problems}


def test_the_defaults_are_the_contracts() -> None:
    chosen = of()
    expected = {
        "host": "127.0.0.1", "port": 8080, "registry": None, "poll_interval": None,
        "default_alias": ["champion"], "default_model": None, "preload": [], "enforcement": None,
        "unsafe_formats": "allow",
        "require_signature": False, "require_digest": False, "isolation": "auto", "disk_limit": 20 * 10**9,
        "max_concurrent_loads": 2, "cold_wait": 30, "max_body_bytes": 32 * 1024**2,
        "max_inflight_bytes": 256 * 1024**2, "max_queue": 1000, "drain_delay": 0, "drain_timeout": 30,
        "keep_alive": 75, "send_timeout": 60, "max_connection_age": None,
        "admin_key_file": None, "webhook_secret_file": None, "log_format": "auto", "log_level": "info",
        "models": {},
    }  # fmt: skip
    assert {name: getattr(chosen, name) for name in expected} == expected
    assert chosen.rollout.gate == "compatible"
    assert chosen.memory_limit == int(memory_total() * 0.7)
    assert set(chosen.sources().values()) == {"default"}
    assert Settings().memory_limit == chosen.memory_limit


def test_caches_and_state_lie_where_the_user_keeps_such_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere/state")
    assert of().cache_dir == Path("/somewhere/cache/model-gateway")
    assert of().state_dir == Path("/somewhere/state/model-gateway")


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    text = "port: 1\nhost: a\ncold_wait: 1m\nmodels: {iris: {timeout: 5s, processes: 2}}"
    environ = {"GATEWAY_PORT": "2", "GATEWAY_HOST": "b", "GATEWAY_MODELS__iris__TIMEOUT": "6s"}
    chosen = of(text, environ, tmp_path, port=3, registry=None)
    assert (chosen.port, chosen.host, chosen.cold_wait, chosen.max_queue) == (3, "b", 60, 1000)
    assert chosen.models["iris"].timeout == 6
    assert chosen.models["iris"].processes == 2
    sources = chosen.sources()
    file = str(tmp_path / "gateway.yaml")
    assert sources["port"] == "flag --port"
    assert sources["host"] == "GATEWAY_HOST"
    assert sources["cold_wait"] == file
    assert sources["models.iris.timeout"] == "GATEWAY_MODELS__iris__TIMEOUT"
    assert sources["models.iris.processes"] == file
    assert sources["max_queue"] == "default"


def test_the_file_is_found_where_one_is_named_or_here(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("port: 1")
    (tmp_path / "other.yaml").write_text("port: 2")
    assert load({}, {}, directory=tmp_path).port == 1
    environ = {"GATEWAY_CONFIG": str(tmp_path / "other.yaml")}
    assert load({}, environ, directory=tmp_path).port == 2
    assert load({}, environ, tmp_path / "gateway.yaml", directory=tmp_path).port == 1
    with pytest.raises(SettingsError, match=r"absent\.yaml: cannot be read: No such file"):
        load({}, {}, tmp_path / "absent.yaml")


def test_what_kubernetes_puts_in_for_a_service_is_ignored() -> None:
    injected = {
        "GATEWAY_SERVICE_HOST": "10.0.0.1", "GATEWAY_SERVICE_PORT": "80", "GATEWAY_SERVICE_PORT_HTTP": "80",
        "GATEWAY_PORT": "tcp://10.0.0.1:80", "GATEWAY_PORT_80_TCP": "tcp://10.0.0.1:80",
        "GATEWAY_PORT_80_TCP_PROTO": "tcp", "GATEWAY_PORT_80_TCP_PORT": "80",
        "GATEWAY_PORT_80_TCP_ADDR": "10.0.0.1",
        "GATEWAY_CANARY_SERVICE_HOST": "10.0.0.2", "GATEWAY_CANARY_PORT": "tcp://10.0.0.2:80",
        "GATEWAY_CANARY_PORT_80_TCP": "tcp://10.0.0.2:80", "GATEWAY_PORT_53_UDP_ADDR": "10.0.0.1",
    }  # fmt: skip
    assert of(environ=injected).port == 8080
    assert of(environ={**injected, "GATEWAY_PORT": "9000"}).port == 9000


def test_a_variable_that_is_not_a_setting_of_the_server_is_ignored() -> None:
    assert (
        of(environ={"GATEWAY_URL": "x", "GATEWAY_ADMIN_KEY": "k", "PATH": "p", "GATEWAY_HOST": ""}).host
        == "127.0.0.1"
    )


def test_every_problem_is_told_with_its_place(tmp_path: Path) -> None:
    text = """
prot: 1
zzqqxx: 1
cold_wait: 5x
drain_timeout: -1
max_queue: many
models:
  a: {tiemout: 1, isolation: somewhere, batch: {maxrows: 1}}
  a: {}
"""
    environ = {
        "GATEWAY_POLL_INTERVL": "1",
        "GATEWAY_MODELS__a__PROCESES": "2",
        "GATEWAY_DEFAULT_ALIAS": "latest",
        "GATEWAY_MAX_BODY_BYTES": "5%",
        "GATEWAY_PRELOAD": "[1",
        "GATEWAY_ROLLOUT__GATES": "none",
        "GATEWAY_CAPTURE": '{"shar": 1, "keep": "x"}',
        "GATEWAY_LIMITS": '{"a": {"concurency": 1}}',
    }
    found = problems(text, environ, tmp_path, port=99999)
    expected = {
        "gateway.yaml: prot": "did you mean port?",
        "gateway.yaml: zzqqxx": "gateway config --schema",
        "gateway.yaml: cold_wait": "x is not a unit of time",
        "gateway.yaml: drain_timeout": "must be at least 0",
        "gateway.yaml: max_queue": "not a whole number",
        "gateway.yaml: models.a": "is given twice",
        "gateway.yaml: models.a.tiemout": "did you mean timeout?",
        "gateway.yaml: models.a.isolation": "'auto', 'process' or 'inline'",
        "gateway.yaml: models.a.batch.maxrows": "did you mean max_rows?",
        "GATEWAY_POLL_INTERVL": "did you mean GATEWAY_POLL_INTERVAL?",
        "GATEWAY_MODELS__a__PROCESES": "did you mean GATEWAY_MODELS__a__PROCESSES?",
        "GATEWAY_DEFAULT_ALIAS": "reserved",
        "GATEWAY_MAX_BODY_BYTES": "a percentage is not possible here",
        "GATEWAY_PRELOAD": "not JSON",
        "GATEWAY_ROLLOUT__GATES": "did you mean GATEWAY_ROLLOUT__GATE?",
        "GATEWAY_CAPTURE: shar": "did you mean share?",
        "GATEWAY_CAPTURE: keep": "write seconds",
        "GATEWAY_LIMITS: a.concurency": "did you mean concurrency?",
        "flag --port": "must be at most 65535",
    }
    assert set(found) == set(expected)
    for place, problem in expected.items():
        assert problem in found[place], (place, found[place])


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("environment: fooenv", "environment", "'fooenv' is not an environment; known: auto, same, own"),
        (
            "models: {iris: {environment: fooenv}}",
            "models.iris.environment",
            "'fooenv' is not an environment; known: auto, same, own",
        ),
        ("port: abc", "port", "not a whole number"),
        ("access_log: [1]", "access_log", "write true or false"),
        ("models: 5", "models", "write a mapping"),
        ("preload: {a: 1}", "preload", "write a list"),
        ("enforcement: foo", "enforcement", "write 'strict', 'warn' or 'mlflow'"),
        ("environments: {named: {foo: {}}}", "environments.named.foo.python", "missing"),
    ],
)
def test_a_problem_has_its_place_and_our_words(text: str, place: str, problem: str, tmp_path: Path) -> None:
    assert problems(text, {}, tmp_path) == {f"gateway.yaml: {place}": problem}


@pytest.mark.parametrize(
    ("text", "problem"), [("[]", "must be a mapping"), ("a: [", "expected"), ("\xff", "mapping")]
)
def test_a_file_that_is_none(text: str, problem: str, tmp_path: Path) -> None:
    assert any(problem in what for what in problems(text, {}, tmp_path).values())


@pytest.mark.parametrize("text", ["", "# nothing\n", "~\n", "x-note: {a: 1}\n"])
def test_an_empty_file_says_nothing(text: str, tmp_path: Path) -> None:
    assert of(text, {}, tmp_path) == of()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("5s", 5), ("2m", 120), ("250ms", 0.25), ("1.5h", 5400), ("1d", 86400), ("7", 7), (0.5, 0.5)],
)
def test_durations(value: Any, seconds: float) -> None:
    assert of(cold_wait=value).cold_wait == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value", ["", "s", "5 5", "-1s", "1e3", "five", None, [], True, "nan", float("inf"), -1]
)
def test_no_durations(value: Any) -> None:
    with pytest.raises(ValueError, match="cold_wait"):
        Settings.model_validate({"cold_wait": value})


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("20GB", 20 * 10**9),
        ("16Gi", 16 * GIB),
        ("16GiB", 16 * GIB),
        ("1.5k", 1500),
        ("10 mb", 10**7),
        ("7", 7),
        (8, 8),
    ],
)
def test_sizes(value: Any, size: int) -> None:
    assert of(max_body_bytes=value).max_body_bytes == size


@pytest.mark.parametrize("value", ["", "GB", "0", "-1", "1PB", "10X", "0%", "101%", "x%", True, 1.5])
def test_no_sizes(value: Any) -> None:
    with pytest.raises(ValueError, match="memory_limit"):
        Settings.model_validate({"memory_limit": value})


def refused(flags: dict[str, Any], environ: dict[str, str]) -> list[tuple[str, str]] | None:
    """None for settings that are right."""
    try:
        load(flags, environ, directory=Path("/nowhere"))
    except SettingsError as error:
        return error.problems
    return None


@given(st.text(max_size=12))
def test_no_text_raises_anything_else(text: str) -> None:
    flags = {"cold_wait": text, "memory_limit": text, "default_alias": text}
    assert refused(flags, {"GATEWAY_MODELS__a__MEMORY": text}) != []


def test_shares_are_of_what_the_process_may_use(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(str(64 * 1024**2))
    flags = {
        "memory_limit": "50%",
        "models": {"a": {"memory": "25%"}},
        "cache_dir": tmp_path,
        "disk_limit": "10%",
    }
    chosen = load(flags, {}, cgroup_root=tmp_path)
    assert chosen.memory_limit == 32 * 1024**2
    assert chosen.models["a"].memory == 16 * 1024**2
    assert 0 < chosen.disk_limit < 10**15
    assert load({}, {}, cgroup_root=tmp_path).memory_limit == int(64 * 1024**2 * 0.7)


def test_lists_with_commas_or_as_json() -> None:
    assert of(environ={"GATEWAY_DEFAULT_ALIAS": "champion, staging"}).default_alias == ["champion", "staging"]
    assert of(environ={"GATEWAY_PRELOAD": '["models:/a@b"]'}).preload == ["models:/a@b"]
    with pytest.raises(SettingsError, match="GATEWAY_PRELOAD: 'models://a'"):
        of(environ={"GATEWAY_PRELOAD": "models://a"})


def test_words_of_yaml_are_read_as_meant(tmp_path: Path) -> None:
    chosen = of("default_alias: no\nrequire_digest: yes\nmodels: {no: {pin: on}}", {}, tmp_path)
    assert chosen.default_alias == ["no"]
    assert chosen.require_digest is True
    assert chosen.models["no"].pin is True


def test_a_models_own_config_keeps_its_case_and_types(tmp_path: Path) -> None:
    chosen = of("models: {iris: {model_config: {Threshold: 0.4, n: 1}}}", {}, tmp_path)
    assert chosen.models["iris"].config == {"Threshold": 0.4, "n": 1}
    environ = {
        "GATEWAY_MODELS__Iris__MODEL_CONFIG__Threshold": "0.4",
        "GATEWAY_MODELS__b__MODEL_CONFIG": '{"N": 1}',
    }
    chosen = of(environ=environ)
    assert chosen.models["Iris"].config == {"Threshold": "0.4"}
    assert chosen.models["b"].config == {"N": 1}


def test_for_a_model_patterns_are_merged_and_its_own_name_wins(tmp_path: Path) -> None:
    text = """
enforcement: warn
models:
  iris: {timeout: 1, model_config: {b: 2}, rollout: {gate: none}}
  "*": {timeout: 2, processes: 2, pin: true, model_config: {a: 1, b: 1}}
  "ir*": {processes: 3, batch: false}
"""
    chosen = of(text, {}, tmp_path)
    iris = chosen.for_model("iris")
    assert (iris.timeout, iris.processes, iris.pin, iris.config) == (1, 3, True, {"a": 1, "b": 2})
    assert (iris.isolation, iris.enforcement) == ("auto", "warn")
    assert iris.rollout is not None
    assert iris.rollout.gate == "none"
    assert not iris.batch.enabled
    other = chosen.for_model("other")
    assert (other.timeout, other.processes, other.config) == (2, 2, {"a": 1, "b": 1})
    assert other.rollout == chosen.rollout
    assert of().for_model("x").model_dump() == {
        **ModelSettings().model_dump(),
        "isolation": "auto", "environment": "auto", "capture": Capture().model_dump(),
        "rollout": RolloutPolicy().model_dump(),
    }  # fmt: skip


def test_a_name_with_brackets_is_itself() -> None:
    assert of(models={"a[1]": {"processes": 4}}).for_model("a[1]").processes == 4


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        of().port = 1  # type: ignore[misc]


def test_the_schema_names_every_setting() -> None:
    schema = settings.schema()
    assert set(schema["properties"]) == set(Settings.model_fields)
    assert "model_config" in schema["$defs"]["ModelSettings"]["properties"]
    assert {"type": "number", "minimum": 0} in schema["properties"]["cold_wait"]["anyOf"]
    json.dumps(schema)


@pytest.mark.parametrize(
    "name", ["GATEWAY_PROT", "GATEWAY_REQUIRE_DIGETS", "GATEWAY_REQUIREDIGEST", "GATEWAY_PRELOAD_"]
)
def test_a_variable_within_two_letters_of_a_setting_is_an_error(name: str) -> None:
    with pytest.raises(SettingsError) as error:
        load({}, {name: "1"}, directory=Path("/nowhere"))
    assert [place for place, _ in error.value.problems] == [name]


def test_a_variable_of_other_software_is_passed_over_and_can_be_told() -> None:
    environ = {"GATEWAY_TOKEN": "x", "GATEWAY_INTERFACE__MODE": "{", "GATEWAY_PORT": "81"}
    chosen = load({}, environ, directory=Path("/nowhere"))
    assert chosen.port == 81
    assert chosen.foreign_variables() == ["GATEWAY_INTERFACE__MODE", "GATEWAY_TOKEN"]


def test_the_schema_describes_every_key() -> None:
    document = settings.schema()
    for part in (document, *document["$defs"].values()):
        for name, entry in part.get("properties", {}).items():
            assert entry.get("description"), name
