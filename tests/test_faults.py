"""The table of faults names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = [
    line
    for line in (HERE / "FAULTS.md").read_text().splitlines()
    if line.startswith("| ") and "| tests |" not in line
]


def test_each_row_names_tests_that_exist() -> None:
    assert len(ROWS) > 30
    for row in ROWS:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert any(name.startswith("test_") for _, name in named), row
        for file, name in named:
            tree = ast.parse((HERE / file).read_text())
            functions = ast.FunctionDef | ast.AsyncFunctionDef
            assert name in {node.name for node in tree.body if isinstance(node, functions)}, row
