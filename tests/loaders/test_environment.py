"""The needs of a model: captured, and compared with this environment."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from loaders import environment, package
from loaders.environment import Environment, Mismatch

HERE = platform.python_version()
NUMPY = metadata.version("numpy")


def packaged(
    directory: Path, requirements: str | None = None, loader: str = "mlflow.sklearn", **entry: Any
) -> Any:
    entry = {"loader_module": loader, "python_version": HERE, **entry}
    (directory / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": entry}}))
    if requirements is not None:
        (directory / "requirements.txt").write_text(requirements)
    return package.read(directory)


def test_bare_names_are_pinned_and_lines_that_say_more_are_kept() -> None:
    wanted = [
        "numpy",
        "numpy",
        "pandas>=2",
        "not-installed-anywhere",
        "x @ file:///x.whl",
        "numpy; python_version<'3'",
    ]
    assert environment.capture(wanted) == Environment(
        HERE,
        (
            f"numpy=={NUMPY}",
            "pandas>=2",
            "not-installed-anywhere",
            "x @ file:///x.whl",
            "numpy; python_version<'3'",
        ),
    )


def test_the_files_are_mlflow_s_and_read_back(tmp_path: Path) -> None:
    written = Environment(HERE, (f"numpy=={NUMPY}", "pandas>=2"))
    env = environment.write(tmp_path, written)
    assert env == {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}
    assert yaml.safe_load((tmp_path / "python_env.yaml").read_text())["python"] == HERE
    conda = yaml.safe_load((tmp_path / "conda.yaml").read_text())
    assert conda["dependencies"][0] == f"python={HERE}"
    assert conda["dependencies"][-1] == {"pip": [f"numpy=={NUMPY}", "pandas>=2"]}
    assert environment.read(packaged(tmp_path)) == written
    (tmp_path / "requirements.txt").unlink()
    assert environment.read(packaged(tmp_path)) == written, "MLflow 1 wrote conda.yaml alone"


def test_options_comments_hashes_and_continued_lines_are_understood(tmp_path: Path) -> None:
    text = f"""
# a comment
-c constraints.txt
--extra-index-url https://example.invalid/simple
numpy=={NUMPY}  # pinned
pandas>=1 \\
    --hash=sha256:00
"""
    found = environment.read(packaged(tmp_path, text))
    assert found.requirements == (f"numpy=={NUMPY}", "pandas>=1")


def test_an_equal_environment_has_no_findings(tmp_path: Path) -> None:
    assert environment.check(packaged(tmp_path, f"numpy=={NUMPY}\nPyYAML\n")) == []


PIN = "1" * 5_000


@pytest.mark.parametrize(
    "line", [f"acme; {'(' * 2_000}os_name == 'x'{')' * 2_000}", f"numpy=={PIN}", f"numpy<{PIN}"]
)
def test_a_requirement_that_cannot_be_compared_is_a_difference(line: str, tmp_path: Path) -> None:
    [found] = environment.check(packaged(tmp_path, f"{line}\n"))
    assert len(str(found)) < 500


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("numpy==1.0", Mismatch("numpy", "==1.0", NUMPY)),
        ("numpy<1", Mismatch("numpy", "<1", NUMPY)),
        ("not-installed-anywhere==2", Mismatch("not-installed-anywhere", "==2", None)),
        ("not-installed-anywhere", Mismatch("not-installed-anywhere", "any version", None)),
        ("not-installed-anywhere; python_version < '3'", None),
        ("numpy[extra]>=1", None),
        ("===", Mismatch("===", "a requirement that cannot be compared", None)),
        ("./local.whl", Mismatch("./local.whl", "a requirement that cannot be compared", None)),
    ],
)
def test_each_difference_is_a_mismatch(tmp_path: Path, line: str, expected: Mismatch | None) -> None:
    assert environment.check(packaged(tmp_path, line)) == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("version", "differs"), [("2.7.18", True), ("", True), (HERE, False), (HERE + "rc1", False)]
)
def test_python_counts_by_major_and_minor(tmp_path: Path, version: str, differs: bool) -> None:
    mismatches = environment.check(packaged(tmp_path, "", python_version=version))
    assert [mismatch.subject for mismatch in mismatches] == (["Python"] if differs else [])


def test_a_pin_is_met_by_a_build_with_a_local_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site" / "labelled-2.1.0+cpu.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: labelled\nVersion: 2.1.0+cpu\n")
    monkeypatch.syspath_prepend(str(site.parent))
    assert environment.capture(["labelled"]).requirements == ("labelled==2.1.0",)
    assert environment.check(packaged(tmp_path, "labelled==2.1.0")) == []


def test_the_mlflow_line_counts_only_where_the_package_s_code_imports_it(tmp_path: Path) -> None:
    line = "mlflow==0.0.1\nmlflow-skinny==0.0.1\n"
    assert environment.check(packaged(tmp_path, line)) == []
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text("import numpy  # not mlflow\n")
    assert environment.check(packaged(tmp_path, line, "mine", code="code")) == []
    (tmp_path / "code" / "mine.py").write_text("def f():\n    from mlflow.pyfunc import x\n")
    mismatches = environment.check(packaged(tmp_path, line, "mine", code="code"))
    assert [mismatch.subject for mismatch in mismatches] == ["mlflow", "mlflow-skinny"]


def test_checking_never_raises(tmp_path: Path) -> None:
    (tmp_path / "conda.yaml").write_text("a: [")
    found = packaged(tmp_path)
    assert "cannot be read" in str(environment.check(found)[0])
    (tmp_path / "conda.yaml").write_text("dependencies: 5")
    assert environment.check(found) == []
    (tmp_path / "requirements.txt").write_bytes(b"\xff\xfe\x00 numpy")
    assert environment.check(found)


def test_a_finding_reads_as_a_sentence() -> None:
    assert str(Mismatch("numpy", "==1.0", "2.0")) == "numpy: the model was saved with ==1.0, here is 2.0"
    assert str(Mismatch("skops", "==1.0", None)).endswith("here is none")
