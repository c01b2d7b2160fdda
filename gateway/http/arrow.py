"""Arrow streams as bodies and as answers (`application/vnd.apache.arrow.stream`), and Parquet files as bodies
(`application/vnd.apache.parquet`), with the extra `arrow`.

Knows batches and pyarrow, which it imports at the first such request. Without pyarrow, requests of this type
are 415 and answers are JSON. Must not know models or routes.
"""

from __future__ import annotations

import asyncio
import json
import struct
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gateway.errors import Problem
from gateway.http import answers
from gateway.pools import in_large_thread
from loaders.batch import Batch, Columns, Tensors
from loaders.enforcement import RawInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MEDIA: Final = "application/vnd.apache.arrow.stream"
_MEDIA: Final = MEDIA.encode()
PARQUET: Final = "application/vnd.apache.parquet"

#: A Parquet file is expected to become so many times its size; what it becomes is known once it was read.
_USUAL: Final = 8
#: Rows that are read at once, and the most rows and columns of a file.
_ROWS: Final = 16_384
_MOST_ROWS: Final = 50_000_000
_MOST_COLUMNS: Final = 100_000

#: The bytes that an item takes: as a number in an array, or as a Python object with its place in a column.
_PLAIN_BYTES, _OBJECT_BYTES = 8, 80
_PLAIN: Final = frozenset(
    {"bool", "halffloat", "float", "double"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
#: Types whose items may share one long value: here each item would become an object of its own. (What an
#: extension type's items become is its own affair.)
_UNREAD: Final = (
    "run_end_encoded",
    "list_view",
    "large_list_view",
    "string_view",
    "binary_view",
    "dense_union",
    "sparse_union",
    "extension",
)
#: The types of a dictionary's values that may be long, and the bytes of their offsets.
_LONG: Final = {"string": 4, "binary": 4, "large_string": 8, "large_binary": 8}
_CODECS: Final = ("lz4", "zstd")
#: The most bytes of a dictionary's offsets that are read to find its longest value.
_OFFSETS_READ: Final = 64 << 20


@cache
def available() -> bool:
    """Returns whether pyarrow is installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


def wanted(accept: bytes) -> bool:
    """Whether the client accepts an Arrow stream (an Accept header that names it)."""
    return _MEDIA in accept.lower() and available()


def cost(body: bytes) -> int:
    """The memory that the stream takes as a table and as columns, in bytes. It is computed from the heads of
    its messages: compressed data counts unpacked, and rows without a value count too. Each item that refers
    to a dictionary counts as that dictionary's longest value: the model gets a copy for each row. Raises
    MALFORMED_BODY.
    """
    import pyarrow as pa

    total = len(body)
    weights: list[int] = []
    values: dict[int, Any] = {}
    uses: list[tuple[int, int]] = []  # the dictionary of a column, by the column's place in a record batch
    longest: dict[int, int] = {}
    batches = []
    try:
        with pa.ipc.open_stream(body) as stream:
            kinds = [kind for field in stream.schema for kind in _kinds(field)]
        for message in pa.MessageReader.open_stream(body):
            if message.type == "schema":
                ids = _dictionary_ids(memoryview(message.metadata))
                for place, (kind, identity) in enumerate(zip(kinds, ids, strict=True)):
                    weights.append(_weight(kind))
                    if identity is not None:
                        values[identity] = kind.value_type
                        uses.append((place, identity))
            elif message.type == "dictionary":
                total += _message_bytes(message, [])
                identity, size = _longest_value(message, values)
                longest[identity] = max(longest.get(identity, 0), size)
            elif message.type == "record batch":
                batches.append(message)
        for place, identity in uses:
            weights[place] += longest.get(identity, 0)
        total += sum(_message_bytes(message, weights) for message in batches)
    except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError, struct.error) as error:
        raise _malformed(error) from None
    return total


def _kinds(field: Any) -> list[Any]:
    """The type of a column, then those of its inner columns, in the order in which a record batch lists
    them. Raises MALFORMED_BODY for a type that is not supported, ValueError for a name that is not UTF-8."""
    kind = field.type
    name = str(kind)
    is_dictionary = name.startswith("dictionary")
    if name.startswith(_UNREAD) or (is_dictionary and kind.value_type.num_fields):
        message = f"columns of the Arrow type {name[:40]} are not supported"
        raise Problem("MALFORMED_BODY", message, hint="send strings, lists or plain numbers")
    str(field.name)  # pyarrow decodes it here
    inner = [] if is_dictionary else [kind.field(i) for i in range(kind.num_fields)]
    return [kind, *(deeper for one in inner for deeper in _kinds(one))]


def _weight(kind: Any) -> int:
    """The bytes that each item of a column takes here."""
    name = str(kind)
    return _PLAIN_BYTES if name in _PLAIN or name.startswith("timestamp") else _OBJECT_BYTES


def _dictionary_ids(head: memoryview) -> list[int | None]:
    """For each column and inner column the number of its dictionary, None where it has none, from the head of
    the schema (Schema.fbs of the Arrow format), which pyarrow has verified."""
    found: list[int | None] = []

    def walk(table: int, number: int) -> None:
        at = _field(head, table, number)
        if not at:
            return
        at += struct.unpack_from("<I", head, at)[0]
        (count,) = struct.unpack_from("<I", head, at)
        for place in range(at + 4, at + 4 + 4 * count, 4):
            field = place + struct.unpack_from("<I", head, place)[0]
            encoding = _field(head, field, 4)
            if encoding:
                encoding += struct.unpack_from("<I", head, encoding)[0]
                stated = _field(head, encoding, 0)
                found.append(struct.unpack_from("<q", head, stated)[0] if stated else 0)
            else:
                found.append(None)
                walk(field, 5)

    walk(_table_at(head, 0, 2), 1)
    return found


def _longest_value(message: Any, values: Mapping[int, Any]) -> tuple[int, int]:
    """The number of a dictionary, and the bytes of its longest value. `values`: the type by number."""
    import pyarrow as pa

    head = memoryview(message.metadata)
    table = _table_at(head, 0, 2)
    stated = _field(head, table, 0)
    identity: int = struct.unpack_from("<q", head, stated)[0] if stated else 0
    kind = values[identity]
    width = _LONG.get(str(kind))
    if width is None:
        return identity, kind.byte_width if str(kind).startswith("fixed_size_binary") else 0
    batch = _table_at(head, table, 1, root=False)
    stated = _field(head, batch, 0)
    size = width * (1 + (struct.unpack_from("<q", head, stated)[0] if stated else 0))
    _, offsets, characters = ([*_pairs(head, batch, 2)] + [(0, 0)] * 3)[:3]
    packed = _field(head, batch, 3)
    if size > _OFFSETS_READ:  # then as if one value had all bytes
        return identity, _unpacked(message, characters) if packed else characters[1]
    content = memoryview(message.body)[offsets[0] : offsets[0] + offsets[1]]
    if packed and len(content) >= 8:
        length = _unpacked(message, offsets)
        packed += struct.unpack_from("<I", head, packed)[0]
        stated = _field(head, packed, 0)
        codec = _CODECS[head[stated] if stated else 0]
        content = (
            content[8:]
            if length < 0
            else memoryview(pa.decompress(content[8:], min(length, 2 * size), codec))
        )
    if len(content) < size or size <= width:
        return identity, 0
    ends = np.frombuffer(content[:size], f"<i{width}")
    return identity, max(0, int(np.diff(ends).max()))


def _unpacked(message: Any, place: tuple[int, int]) -> int:
    """The bytes that a compressed buffer is said to take unpacked; -1: it is not compressed."""
    return int(struct.unpack_from("<q", message.body, place[0])[0]) if place[1] >= 8 else place[1]


def _message_bytes(message: Any, weights: list[int]) -> int:
    """The bytes that one record batch takes. Its head is a flatbuffer (Message.fbs of the Arrow format),
    which pyarrow has verified."""
    head = memoryview(message.metadata)
    batch = _table_at(head, 0, 2)
    if message.type == "dictionary":
        batch, weights = _table_at(head, batch, 1, root=False), []
    length = _field(head, batch, 0)
    total = _PLAIN_BYTES * _size(struct.unpack_from("<q", head, length)[0] if length else 0)
    for place, (items, _) in enumerate(_pairs(head, batch, 1)):
        total += _size(items) * (weights[place] if place < len(weights) else _OBJECT_BYTES)
    packed = _field(head, batch, 3) != 0
    for offset, size in _pairs(head, batch, 2):
        if packed and size >= 8:
            size = max(size, struct.unpack_from("<q", message.body, offset)[0])
        total += 2 * _size(size)
    return total


def _size(stated: int) -> int:
    """A size that a message states. Raises ValueError for a negative one: it would hide what others take."""
    if stated < 0:
        raise ValueError("a negative size")
    return stated


def _field(head: memoryview, table: int, number: int) -> int:
    """The offset of a field of a flatbuffer's table; 0 if the field is left out."""
    vtable = table - struct.unpack_from("<i", head, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", head, vtable)[0]:
        return 0
    offset: int = struct.unpack_from("<H", head, vtable + 4 + 2 * number)[0]
    return table + offset if offset else 0


def _table_at(head: memoryview, table: int, number: int, *, root: bool = True) -> int:
    """The table that a field of another one refers to."""
    if root:
        table = struct.unpack_from("<I", head, 0)[0]
    at = _field(head, table, number)
    if not at:
        raise ValueError("a message without a head")
    return at + int(struct.unpack_from("<I", head, at)[0])


def _pairs(head: memoryview, table: int, number: int) -> Iterator[tuple[int, int]]:
    """The pairs of 64-bit numbers in a field that is a vector of such structs."""
    at = _field(head, table, number)
    if at:
        at += struct.unpack_from("<I", head, at)[0]
        (count,) = struct.unpack_from("<I", head, at)
        yield from struct.iter_unpack("<qq", head[at + 4 : at + 4 + 16 * count])


def _malformed(error: Exception) -> Problem:
    message = f"the body is not a valid Arrow stream ({type(error).__name__})"
    hint = (
        "send Arrow's stream format, as pyarrow.ipc.new_stream writes it, not a file in Arrow's file format"
    )
    return Problem("MALFORMED_BODY", message, hint=hint)


def read(body: bytes) -> RawInput:
    """The stream's record batches as one table. Raises MALFORMED_BODY."""
    import pyarrow as pa

    try:
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _malformed(error) from None
    return RawInput("arrow", table)


def parquet_cost(body: bytes) -> int:
    """The memory that a Parquet file usually takes, in bytes. Nothing in it is read here: what it says of
    itself may be wrong, so it is read in the process for large bodies, whose memory is limited."""
    return _USUAL * len(body)


def read_parquet(body: bytes) -> RawInput:
    """The file's rows as one table. Raises MALFORMED_BODY, and MemoryError if it becomes more than this
    process may have."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pa.BufferReader(body), pre_buffer=False, page_checksum_verification=False)
        said = file.metadata
        if said.num_rows > _MOST_ROWS or said.num_columns > _MOST_COLUMNS:
            raise MemoryError
        # In parts, so that values which a file holds once and uses often are not all made at once.
        parts = [*file.iter_batches(_ROWS, use_threads=False)]
        table = pa.Table.from_batches(parts, file.schema_arrow)
        table.validate(full=True)
    except MemoryError:  # pyarrow's own is one
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        message = f"the body is not a valid Parquet file ({type(error).__name__})"
        hint = "send a whole Parquet file, as pyarrow.parquet.write_table or DataFrame.to_parquet writes it"
        raise Problem("MALFORMED_BODY", message, hint=hint) from None
    return RawInput("arrow", table)


async def encode(batch: Batch, about: Mapping[str, Any]) -> bytes:
    """An answer as a stream. `about` (the model, warnings) is JSON in the schema's metadata, under `gateway`.
    One array without a name becomes the column `predictions`. Raises PREDICTION_FAILED for an answer that is
    not a table."""
    apart = in_large_thread if answers.weight(batch) > answers.OFF_LOOP_BYTES else asyncio.to_thread
    return await apart(_encode, batch, about)


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
            raise ValueError("it is not a table")
        table = pa.table({name: pa.array(values, from_pandas=False) for name, values in columns.items()})
    except (pa.ArrowException, ValueError, TypeError) as error:
        message = f"the model's answer cannot be written as Arrow: {error}"
        raise Problem("PREDICTION_FAILED", message, hint="send Accept: application/json") from None
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
