"""Strategies of hypothesis: any type, any signature."""

from __future__ import annotations

import datetime

import numpy as np
from hypothesis import strategies as st

from loaders.signature import (
    AnyType,
    Array,
    ColSpec,
    Map,
    Object,
    ParamSpec,
    Property,
    Scalar,
    Signature,
    TensorSpec,
)

names = st.text(min_size=1, max_size=8)
types = st.recursive(
    st.sampled_from(list(Scalar)) | st.just(AnyType()),
    lambda inner: (
        inner.map(Array)
        | inner.map(Map)
        | st.dictionaries(names, st.tuples(inner, st.booleans()), min_size=1, max_size=3).map(
            lambda fields: Object(tuple(Property(n, t, r) for n, (t, r) in fields.items()))
        )
    ),
    max_leaves=6,
)
columns = st.lists(
    st.tuples(names, types, st.booleans()), min_size=1, max_size=4, unique_by=lambda c: c[0]
).map(lambda specs: tuple(ColSpec(kind, name, required) for name, kind, required in specs))
unnamed = st.lists(types, min_size=1, max_size=3).map(lambda kinds: tuple(ColSpec(kind) for kind in kinds))
dtypes = st.sampled_from(
    ["float32", "float64", "int8", "uint8", "int64", "bool", "str", "bytes", "object", "float16"]
)
shapes = st.lists(st.integers(-1, 5), max_size=3).map(tuple)
tensors = st.lists(st.tuples(names, dtypes, shapes), min_size=1, max_size=3, unique_by=lambda t: t[0]).map(
    lambda specs: tuple(TensorSpec(np.dtype(dtype), shape, name) for name, dtype, shape in specs)
)
params = st.lists(
    st.sampled_from(
        [
            ParamSpec("a", Scalar.long, 1),
            ParamSpec("b", Scalar.double, [1.5], (-1,)),
            ParamSpec("c", Scalar.datetime, datetime.datetime(2024, 1, 2, 3)),
            ParamSpec("d", Scalar.datetime, datetime.date(2024, 1, 2)),
            ParamSpec("e", Object((Property("x", Scalar.long),)), {"x": 1}),
            ParamSpec("f", Scalar.string, None),
            ParamSpec("g", Scalar.boolean, True),
        ]
    ),
    unique_by=lambda p: p.name,
    min_size=1,
).map(tuple)
schemas = columns | unnamed | tensors
signatures = st.builds(Signature, schemas, st.none() | schemas, st.none() | params)
