"""What a package may have installed: one form of line, every other refused by name."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.artifacts.packages import Prepared
from gateway.environments import facts, lock
from gateway.environments.choose import Runtime, own
from gateway.environments.interpreters import Interpreters
from gateway.environments.lock import Lock, LockError, Wanted
from gateway.environments.resolve import Resolver
from gateway.environments.uv import Uv
from gateway.registries.base import Version
from gateway.serving.preparation import Preparation
from loaders import environment
from tests.support.packages import described

PYLOCK = """
lock-version = "1.0"
[[packages]]
name = "NumPy"
version = "1.23.4"
wheels = [{ url = "https://index/numpy.whl", hashes = { sha256 = "aa" }, upload-time = 2022-10-12T14:47:50Z }]
"""


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("-i https://index.example/simple", "an index option"),
        ("--index-url https://index.example/simple", "an index option"),
        ("--extra-index-url=https://index.example/simple", "an index option"),
        ("--find-links /wheels", "an index option"),
        ("--trusted-host index.example", "an index option"),
        ("--no-index", "an index option"),
        ("--pre", "an index option"),
        ("--no-binary :all:", "an index option"),
        ("-e .", "an editable install"),
        ("--editable ./model", "an editable install"),
        ("-r more.txt", "another file of requirements"),
        ("-c elsewhere.txt", "an option"),
        ("https://files.example/acme-1.0-py3-none-any.whl", "a URL"),
        ("acme @ https://files.example/acme-1.0.tar.gz", "a URL"),
        ("file:///srv/acme.whl", "a URL"),
        ("git+https://git.example/acme.git", "a version control reference"),
        ("acme @ git+ssh://git@git.example/acme.git@main", "a version control reference"),
        ("hg+https://hg.example/acme", "a version control reference"),
        ("./acme", "a path"),
        ("../acme", "a path"),
        ("/srv/acme-1.0.tar.gz", "a path"),
        ("~/acme", "a path"),
        ("C:\\wheels\\acme.whl", "a path"),
        ("acme-1.0-py3-none-any.whl", "a path"),
        ("acme==1.0 --hash=sha256:aa", "a requirement with an option"),
        ("acme==1.0 --config-settings x=y", "a requirement with an option"),
        ("acme==", "not a requirement"),
        (f"acme; {'(' * 900}os_name == 'x'{')' * 900}", "not a requirement"),
        ("$(touch /tmp/x)", "not a requirement"),
    ],
)
def test_a_line_of_any_other_form_is_refused_by_name(line: str, what: str) -> None:
    with pytest.raises(LockError) as refused:
        lock.lines(f"numpy==1.0\n{line}\n", "requirements.txt")
    shown = line if len(line) <= 120 else line[:117]
    shown = shown if "@git.example" not in line else "acme @ git+ssh://…@git.example/acme.git@main"
    assert shown in str(refused.value).replace("\\\\", "\\")
    assert f"is {what};" in str(refused.value)


def test_requirements_have_a_bound(tmp_path: Path) -> None:
    package = described(tmp_path, requirements="acme\n" * 100_000)
    with pytest.raises(LockError, match="more than 5,000 requirements"):
        lock.required(package)
    assert len(environment.read(package).requirements) == 5_000


@pytest.mark.parametrize("text", [f"a{'.a' * 500_000} = 1", "a = " + "[" * 100_000, f"a = {'1' * 100_000}"])
def test_a_shipped_lock_that_is_made_to_be_slow_is_refused(text: str, tmp_path: Path) -> None:
    """The first of these took hours, the others ended the load."""
    package = described(tmp_path, files={"uv.lock": text})
    with pytest.raises(LockError, match=r"its uv\.lock"):
        lock.shipped_lock(package)


def test_a_password_in_a_refused_line_is_not_shown() -> None:
    with pytest.raises(LockError) as refused:
        lock.lines("--index-url https://joe:hunter2@index.example/simple", "requirements.txt")
    assert "hunter2" not in str(refused.value)


def test_requirements_comments_and_continued_lines_are_read() -> None:
    text = "# made by hand\nnumpy [x] >=1.2,\\\n <2 ; python_version < '3.12'  # why\n\npandas\n"
    found, constrained = lock.lines(text, "requirements.txt")
    assert found == ['numpy[x]<2,>=1.2; python_version < "3.12"', "pandas"]
    assert not constrained


def test_the_constraints_that_mlflow_writes_are_read_by_the_same_rules(tmp_path: Path) -> None:
    fine = described(
        tmp_path / "a", requirements="acme\n-c constraints.txt\n", files={"constraints.txt": "numpy<2"}
    )
    assert lock.required(fine) == (["acme"], ["numpy<2"])
    wrong = described(
        tmp_path / "b", requirements="acme\n-c constraints.txt\n", files={"constraints.txt": "-i http://x"}
    )
    with pytest.raises(LockError, match=r"constraints\.txt is an index option"):
        lock.required(wrong)


def test_the_pip_part_of_conda_is_held_to_the_same_form(tmp_path: Path) -> None:
    conda = "dependencies:\n- python=3.8\n- pip:\n  - numpy==1.2\n  - git+https://x/y\n"
    package = described(tmp_path, requirements=None, files={"conda.yaml": conda})
    with pytest.raises(LockError, match=r"conda\.yaml \(pip\) is a version control reference"):
        lock.required(package)


def test_a_shipped_lock_gives_versions_and_hashes(tmp_path: Path) -> None:
    content = """
[[package]]
name = "model"
version = "0"
source = { virtual = "." }
[[package]]
name = "numpy"
version = "1.23.4"
source = { registry = "https://elsewhere.example/simple" }
wheels = [{ url = "https://elsewhere.example/numpy.whl", hash = "sha256:aa" }]
"""
    package = described(tmp_path, files={"uv.lock": content})
    assert lock.shipped_lock(package) == (["numpy==1.23.4"], {"numpy==1.23.4": frozenset({"aa"})})


@pytest.mark.anyio
async def test_what_a_shipped_lock_cannot_vouch_for_is_said(tmp_path: Path) -> None:
    content = "".join(
        f'[[package]]\nname = "{name}"\nversion = "1.23.4"\nsource = {{ registry = "https://e.example" }}\n'
        f'wheels = [{{ url = "https://e.example/a.whl"{hashed} }}]\n'
        for name, hashed in {"numpy": "", "scipy": ', hash = "sha256:aa"'}.items()
    )
    found = facts.read(described(tmp_path, files={"uv.lock": content}))
    resolved = lock.parsed(PYLOCK, (3, 11), "linux", dated=True)
    built: Any = SimpleNamespace(lock=resolved, python="/p", key="k")
    runtime = own(found, resolved, built)
    assert runtime.to_json()["without_hash"] == ["numpy"]

    async def chosen(*args: object, **options: object) -> Runtime:
        return runtime

    nothing: Any = None
    chooser: Any = SimpleNamespace(runtime=chosen)
    needs: Any = SimpleNamespace(facts=found)
    prepared = Prepared(
        Version("m", "1", source="/m"), nothing, nothing, "python", "sha256:0", 1, 1, None, needs=needs
    )
    (warning,) = (await Preparation(chooser).with_runtime(prepared)).warnings
    assert "uv.lock has no hash of numpy: " in warning


@pytest.mark.parametrize("source", ['git = "https://x/y"', 'url = "https://x/y.whl"', 'path = "../y"'])
def test_a_shipped_lock_with_a_source_of_its_own_is_refused(source: str, tmp_path: Path) -> None:
    content = f'[[package]]\nname = "acme"\nversion = "1"\nsource = {{ {source} }}\n'
    package = described(tmp_path, files={"uv.lock": content})
    with pytest.raises(LockError, match=r"takes acme from .*versions and hashes only"):
        lock.shipped_lock(package)


@pytest.mark.parametrize("form", ["{0}", "1.5.0\n{0}", "1.5.0\r{0}", "1.5.0\u2028{0}", "1.5.0 {0}",
                                  "1.5.0; os_name == '\n{0}\n'", "1.5.0 @ http://x"])  # fmt: skip
@pytest.mark.parametrize("place", ["the flavor", "the version", "the name"])
def test_a_version_that_names_an_index_is_refused(form: str, place: str, tmp_path: Path) -> None:
    """The texts from which the gateway itself makes lines are held to the same form."""
    text = form.format("--extra-index-url http://elsewhere.example/")
    entry = {"version": text, "name": "acme"} if place == "the version" else {"version": "1", "name": text}
    shipped = "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items())
    files: dict[str, bytes | str] = {
        "uv.lock": f'[[package]]\n{shipped}source = {{ registry = "https://x" }}\n'
    }
    package = described(
        tmp_path,
        requirements="acme\n",
        flavors={"sklearn": {"sklearn_version": text if place == "the flavor" else "1.5.0"}},
        files={} if place == "the flavor" else files,
    )
    with pytest.raises(LockError, match="installs only lines of the form"):
        facts.wanted(facts.read(package), as_of=None)


@pytest.mark.parametrize("line", ["acme\n--extra-index-url http://x/", "--pre", "-i http://x/", "./acme", ""])
@pytest.mark.parametrize("where", ["requirements", "constraints"])
def test_no_other_line_reaches_a_file_for_uv(line: str, where: str, tmp_path: Path) -> None:
    class Unused(Uv):
        def run(self, *arguments: str, indexed: bool = True) -> str:
            raise AssertionError("uv was started")

    resolver = Resolver(Unused(tmp_path, tmp_path, {}), Interpreters(), gpu=False)
    given = {"requirements": ("acme",), where: (line,)}
    with pytest.raises(LockError, match="not a requirement"):
        resolver.resolve(Wanted(**given))  # type: ignore[arg-type]


def test_a_wheel_that_the_shipped_lock_does_not_know_is_found() -> None:
    resolved = lock.parsed(PYLOCK, (3, 8), "linux-x86_64", dated=True)
    assert lock.restricted(resolved, {"numpy==1.23.4": frozenset({"aa", "bb"})}) is resolved
    assert lock.restricted(resolved, {"numpy==1.23.4": frozenset()}) is resolved
    assert lock.restricted(resolved, {}) is resolved
    with pytest.raises(LockError, match=r"numpy==1\.23\.4: the files of the index differ"):
        lock.restricted(resolved, {"numpy==1.23.4": frozenset({"bb"})})


def test_all_lines_about_a_library_count() -> None:
    assert str(lock.pins(["acme==1.0", "Acme"])["acme"]) == "==1.0"
    wishes = [Wanted((f"acme=={version}.0", "acme")) for version in (1, 2)]
    assert lock.union(wishes, (3, 8)) is None


def test_hashes_are_part_of_what_is_wanted() -> None:
    wanted = [Wanted(("acme==1.0",), hashes={"acme==1.0": frozenset(files)}) for files in ("a", "b", "ab")]
    assert len({one.key for one in wanted}) == 3
    assert lock.union(wanted[:2], (3, 8)) is None
    both = lock.union(wanted[1:], (3, 8))
    assert both is not None
    assert both.hashes == {"acme==1.0": frozenset("b")}


def test_the_key_of_a_lock_is_its_content() -> None:
    one = lock.parsed(PYLOCK, (3, 8), "linux-x86_64", dated=True)
    same = lock.parsed(f"# made elsewhere\n{PYLOCK}", (3, 8), "linux-x86_64", dated=True)
    assert one.key == same.key
    assert one.key != lock.parsed(PYLOCK, (3, 9), "linux-x86_64", dated=True).key
    assert one.key != lock.parsed(PYLOCK.replace('"aa"', '"bb"'), (3, 8), "linux-x86_64", dated=True).key


def made(python: tuple[int, int] = (3, 8), **packages: str) -> Lock:
    entries = "".join(
        f'[[packages]]\nname = "{name}"\nversion = "{version}"\n'
        f'wheels = [{{ url = "u", hashes = {{ sha256 = "{name}{version}" }} }}]\n'
        for name, version in packages.items()
    )
    return lock.parsed(f'lock-version = "1.0"\n{entries}', python, "linux-x86_64", dated=True)


def test_a_lock_satisfies_those_that_it_holds() -> None:
    whole = made(numpy="1", pandas="2")
    assert whole.satisfies(made(numpy="1"))
    assert not made(numpy="1").satisfies(whole)
    assert not whole.satisfies(made(numpy="2"))
    assert not whole.satisfies(made((3, 9), numpy="1"))


def test_a_lock_with_more_files_of_a_package_does_not_satisfy_one_with_fewer() -> None:
    few = made(numpy="1")
    wheels = 'wheels = [{ url = "v", hashes = { sha256 = "more" } }, {'
    more = lock.parsed(few.text.replace("wheels = [{", wheels), few.python, few.platform, dated=True)
    assert few.satisfies(more)
    assert not more.satisfies(few)
    assert lock.merged([more, few]).satisfies(few)
    assert lock.merged([more, few]).satisfies(more)


def test_locks_that_agree_are_merged_into_one_that_satisfies_both() -> None:
    one, other = made(numpy="1", pandas="2"), made(numpy="1", xgboost="3")
    union = lock.merged([one, other])
    assert union.satisfies(one)
    assert union.satisfies(other)
    assert dict(union.packages) == {"numpy": "1", "pandas": "2", "xgboost": "3"}


def test_the_day_of_a_package_is_utc(tmp_path: Path) -> None:
    assert lock.created(described(tmp_path)) == datetime(2022, 11, 1, 12, tzinfo=UTC)
    assert lock.created(described(tmp_path, created="yesterday")) is None
