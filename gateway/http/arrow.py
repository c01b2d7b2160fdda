"""Arrow streams as bodies and as answers (`application/vnd.apache.arrow.stream`), with the extra `arrow`.

Knows batches and pyarrow, which is imported when the first such request comes. Without it, requests of
this type are 415 and answers are JSON.
"""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gateway.errors import Problem
from loaders.batch import Batch, Columns, Tensors
from loaders.enforcement.enforce import RawInput

if TYPE_CHECKING:
    from collections.abc import Mapping

MEDIA: Final = "application/vnd.apache.arrow.stream"


@cache
def available() -> bool:
    """Whether pyarrow is installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


def wanted(accept: bytes) -> bool:
    """Whether the caller asks for an Arrow stream (an Accept header that names it)."""
    return MEDIA.encode() in accept.lower() and available()


def cost(body: bytes) -> int:
    """The memory that the stream takes as a table and as columns, in bytes. Raises MALFORMED_BODY."""
    return 2 * len(body)


def read(body: bytes) -> RawInput:
    """The stream's record batches as one table. Raises MALFORMED_BODY."""
    import pyarrow as pa

    try:
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        kind = type(error).__name__
        raise Problem("MALFORMED_BODY", f"the body is not a valid Arrow stream ({kind})") from None
    return RawInput("arrow", table)


async def encode(batch: Batch, about: Mapping[str, Any]) -> bytes:
    """An answer as a stream; `about` (the model, warnings) stands as JSON in the schema's metadata under
    `gateway`. One array without a name is the column `predictions`. Raises PREDICTION_FAILED for an
    answer that is no table."""
    return await asyncio.to_thread(_encode, batch, about)


def _encode(batch: Batch, about: Mapping[str, Any]) -> bytes:
    import pyarrow as pa

    columns: dict[str, Any] = {}
    if isinstance(batch, Columns):
        columns = {str(name): _column(array) for name, array in batch.arrays.items()}
    elif isinstance(batch, Tensors):
        columns = {name or "predictions": _column(array) for name, array in batch.arrays.items()}
    elif isinstance(batch.value, list):
        columns = {"predictions": batch.value}
    try:
        if not columns:
            raise ValueError("it is no table")
        table = pa.table({name: pa.array(values, from_pandas=False) for name, values in columns.items()})
    except (pa.ArrowException, ValueError, TypeError) as error:
        message = f"the model's answer cannot be written as Arrow: {error}"
        raise Problem("PREDICTION_FAILED", message, hint="ask for application/json") from None
    table = table.replace_schema_metadata({"gateway": json.dumps(about)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _column(array: Any) -> Any:
    if isinstance(array, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(array)
        return [None if missing else value for value, missing in zip(array.data.tolist(), mask, strict=True)]
    if array.ndim == 0:
        return array.reshape(1)
    return array if array.ndim == 1 else list(array) if array.ndim == 2 else array.tolist()
