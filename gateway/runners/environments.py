"""An environment: the Python a model runs in, what its zygote imports beforehand, what it may know.

Data alone; knows no process. Nothing of the gateway's own environment variables reaches a model but what
is listed here or what the operator allows for that model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal

Start = Literal["fork", "spawn"]

_PASSED: Final = (
    "PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LD_PRELOAD", "LANG", "LANGUAGE", "LC_*", "TZ",
    "USER", "SSL_CERT_FILE", "SSL_CERT_DIR", "CUDA_*", "NVIDIA_*", "ROCR_*", "HIP_*",
    "COVERAGE_PROCESS_START", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE",
)  # fmt: skip
"""What programs need to run at all. No credential has one of these names."""

_NOT_ELSEWHERE: Final = frozenset(
    {"PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LD_PRELOAD", "COVERAGE_PROCESS_START"}
)
"""What belongs to this interpreter alone: another one would find the wrong libraries."""

_ALWAYS: Final = {
    # Pools started before a fork do not live in the child; raised there to the model's share.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    # The allocator of pyarrow starts a thread on import, which would rule out every fork.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    # By default pyarrow takes memory by 2 MB, for each text column of a few bytes, and keeps it.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "PYTHONUNBUFFERED": "",
    "PYTHONFAULTHANDLER": "1",
}

_SKLEARN: Final = (
    "numpy", "pandas", "scipy.sparse", "sklearn.pipeline", "sklearn.linear_model", "sklearn.ensemble",
    "sklearn.preprocessing", "sklearn.compose", "sklearn.svm", "sklearn.neighbors", "sklearn.tree",
    # A first prediction imports these.
    "narwhals.stable.v2._namespace", "narwhals._pandas_like.namespace", "narwhals._pandas_like.group_by",
    "narwhals._interchange.dataframe",
)  # fmt: skip
_PRELOAD: Final[dict[str, tuple[str, ...]]] = {
    "mlflow.sklearn": _SKLEARN,
    "mlflow.pyfunc": ("numpy", "pandas"),
    "mlflow.pytorch": ("numpy", "pandas", "torch"),
    "mlflow.xgboost": ("numpy", "pandas", "xgboost"),
    "mlflow.lightgbm": ("numpy", "pandas", "lightgbm"),
    "mlflow.catboost": ("numpy", "pandas", "catboost"),
    "mlflow.statsmodels": ("numpy", "pandas", "statsmodels.api"),
    "mlflow.onnx": ("numpy",),  # onnxruntime starts threads on import: only after the fork
}
_OF_DISTRIBUTION: Final[dict[str, tuple[str, ...]]] = {
    "numpy": ("numpy",),
    "pandas": ("pandas",),
    "scikit-learn": _SKLEARN,
    "xgboost": ("xgboost",),
    "lightgbm": ("lightgbm",),
    "catboost": ("catboost",),
    "statsmodels": ("statsmodels.api",),
    "torch": ("torch",),
}


@dataclass(frozen=True, slots=True)
class Environment:
    """Each environment has one zygote. `python`: the interpreter's path. `preload`: the modules that its
    zygote imports; modules that are missing there, or that start threads, are left out."""

    python: str = sys.executable
    preload: tuple[str, ...] = ("numpy",)
    start: Start = "fork"

    def variables(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The environment variables of every process of this environment. Another interpreter does not get
        this interpreter's own variables (its path, its libraries), nor the user's own packages."""
        passed = allowed(environ, _PASSED)
        if self.python != sys.executable:
            passed = {name: value for name, value in passed.items() if name not in _NOT_ELSEWHERE}
            passed["PYTHONNOUSERSITE"] = "1"
        return {**passed, **_ALWAYS}


def elsewhere(python: str, distributions: Iterable[str], start: Start) -> Environment:
    """The environment of another interpreter, shared by all models that run in it, so that it has one
    zygote."""
    modules: dict[str, None] = {}
    for name in sorted(set(distributions) & _OF_DISTRIBUTION.keys(), key=list(_OF_DISTRIBUTION).index):
        modules.update(dict.fromkeys(_OF_DISTRIBUTION[name]))
    return Environment(python, tuple(modules) or ("numpy",), start)


def preload_for(loader_module: str) -> tuple[str, ...]:
    """The modules to import in advance for packages with this loader. Few different results, so few
    zygotes."""
    for prefix, modules in _PRELOAD.items():
        if loader_module == prefix or loader_module.startswith(prefix + "."):
            return modules
    return _PRELOAD["mlflow.pyfunc"]


def allowed(environ: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The variables whose name matches one of `names`, which may be patterns (`HF_*`)."""
    patterns = tuple(names)
    if not patterns:
        return {}
    return {
        name: value
        for name, value in environ.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
