"""PyTorch modules beyond one array in and out: several inputs, several outputs, whole numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loaders
from loaders import original
from loaders.batch import Columns, Tensors
from loaders.enforcement import RawInput, enforce
from loaders.flavors.failures import Unsuitable
from tests.conftest import needs

pytestmark = pytest.mark.all


@pytest.fixture(scope="module")
def torch() -> Any:
    return needs("torch")


def answered(model: Any, path: Path, form: Any, data: Any) -> Any:
    served = loaders.open_model(loaders.save_model(model, path, verify=False), {})
    return served.run(enforce(None, RawInput(form, data)).batch, {})


def test_whole_numbers_and_doubles_become_what_the_module_takes(torch: Any, tmp_path: Path) -> None:
    linear = torch.nn.Linear(2, 1)
    with torch.no_grad():
        wanted = linear(torch.tensor([[1.0, 2.0]])).numpy()
    for place, data in enumerate(([[1, 2]], [[1.0, 2.0]])):
        answer = answered(linear, tmp_path / str(place), "inputs", data)
        np.testing.assert_allclose(answer.arrays[""], wanted)
    words = torch.nn.Embedding(10, 2)
    answer = answered(words, tmp_path / "words", "inputs", [[1, 2]])
    np.testing.assert_allclose(answer.arrays[""], words.weight.detach().numpy()[None, 1:3])


def test_several_inputs_and_outputs(torch: Any, tmp_path: Path) -> None:
    class Two(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, form: str) -> None:
            super().__init__()
            self.form = form

        def forward(self, a: Any, b: Any) -> Any:
            return {"sum": a + b, "wide": torch.stack([a, b], 1)} if self.form == "dict" else (a + b, a - b)

    answer = answered(Two("dict"), tmp_path / "d", "inputs", {"b": [10.0, 20.0], "a": [1.0, 2.0]})
    assert isinstance(answer, Tensors)
    assert answer.arrays["sum"].tolist() == [11, 22]
    assert answer.arrays["wide"].tolist() == [[1, 10], [2, 20]]
    answer = answered(Two("tuple"), tmp_path / "t", "inputs", {"b": [10.0], "a": [1.0]})
    assert {name: array.tolist() for name, array in answer.arrays.items()} == {
        "output_0": [11],
        "output_1": [-9],
    }
    with pytest.raises(Unsuitable, match="accepts a, b"):
        answered(Two("dict"), tmp_path / "n", "inputs", {"c": [10.0], "a": [1.0]})


def test_a_table_is_answered_with_a_record_a_row(torch: Any, tmp_path: Path) -> None:
    class Both(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return {"first": x[:, 0], "all": x}

    rows = [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}]
    answer = answered(Both(), tmp_path / "m", "dataframe_records", rows)
    assert isinstance(answer, Columns)
    assert answer.arrays["first"].tolist() == [1, 3]
    assert answer.arrays["all"].tolist() == [[1, 2], [3, 4]]


def test_the_module_itself_is_compared_whatever_it_takes_and_answers(torch: Any) -> None:
    """Several inputs, tuples and mappings: without a comparison a wrong package would pass."""

    class Two(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, a: Any, b: Any) -> Any:
            return {"sum": a + b, "pair": a.bfloat16()}

    class One(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, a: Any) -> Any:
            return a + 1, a - 1

    two, one = (original.asker(module(), "pytorch", {}) for module in (Two, One))
    assert two is not None
    assert one is not None
    answer = two({"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, {})
    assert {name: array.tolist() for name, array in answer.items()} == {"sum": [2, 2], "pair": [1, 1]}
    answer = one(np.ones(2, np.float32), {})
    assert {name: array.tolist() for name, array in answer.items()} == {
        "output_0": [2, 2],
        "output_1": [0, 0],
    }
