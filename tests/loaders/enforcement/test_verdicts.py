"""The verdict table is what the code gives, and every difference from MLflow has its reason."""

from __future__ import annotations

import logging

import pytest

from tests.conftest import needs
from tests.support import verdicts


def test_the_committed_verdicts_are_ours() -> None:
    committed = verdicts.committed()
    found = verdicts.our_verdicts()
    assert {key: committed.get(key) for key in found} == found
    # Without pyarrow there is one form less.
    assert {key[:2] for key in committed} == {key[:2] for key in found}


def test_the_same_data_gets_the_same_verdict_in_every_json_form() -> None:
    found: dict[tuple[str, str], set[str]] = {}
    for (kind, case, form), verdict in verdicts.our_verdicts().items():
        if form not in ("csv", "arrow", "python"):
            found.setdefault((kind, case), set()).add(verdict)
    assert {key: said for key, said in found.items() if len(said) > 1} == {}


@pytest.mark.all
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_the_whole_table_is_what_ours_and_the_real_mlflow_give() -> None:
    needs("mlflow.pyfunc.scoring_server")
    needs("pyarrow")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    cells = verdicts.cells()
    unexplained = [cell for cell in cells if cell.ours != cell.mlflow and not cell.reason]
    assert unexplained == []
    assert verdicts.TABLE.read_text() == verdicts.render(cells)


@pytest.mark.all
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_the_lenient_modes_give_what_the_real_mlflow_gives() -> None:
    needs("mlflow.pyfunc.scoring_server")
    needs("pyarrow")
    differences = []
    for label, signature, case, form, raw in verdicts.subjects():
        if raw is None:
            continue
        theirs = verdicts.mlflows(signature, raw)
        strict = verdicts.ours(signature, raw)
        found = verdicts.ours(signature, raw, "mlflow")
        warned = verdicts.ours(signature, raw, "warn")
        if found != theirs or warned != (theirs if strict == verdicts.REFUSED else strict):
            differences.append((label, case.name, form, found, warned, theirs))
    assert differences == []
