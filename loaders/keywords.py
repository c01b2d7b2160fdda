"""The keywords of `save_model` and `log_model`: MLflow's names for them, and the errors for unknown ones.

Knows names only; `save_model` and the flavors define what each keyword means.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loaders.spelling import near

if TYPE_CHECKING:
    from loaders.signature import Signature

SYNONYMS: Final = {
    "pip_requirements": "requirements",
    "code_path": "code_paths",
    "pyfunc_predict_fn": "predict_fn",
    "onnx_execution_providers": "providers",
    "onnx_session_options": "session_options",
}
"""MLflow's name → ours."""

MODELS: Final = (
    "sk_model",
    "python_model",
    "onnx_model",
    "xgb_model",
    "lgb_model",
    "cb_model",
    "pytorch_model",
    "statsmodels_model",
)
"""MLflow's names for the model itself."""

FULFILLED: Final = frozenset({"await_registration_for"})
"""MLflow's keywords for what is so in any case: a version is registered when `log_model` returns."""

IGNORED: Final = frozenset(
    {
        "step",
        "model_id",
        "model_type",
        "run_id",
        "prompts",
        "resources",
        "auth_policy",
    }
)
"""MLflow's keywords that have a meaning only for its tracking server."""

OWN: Final = (
    "signature",
    "input_example",
    "metadata",
    "requirements",
    "code_paths",
    "params",
    "flavor",
    "verify",
    "extra_pip_requirements",
    "conda_env",
)

LOGGED: Final = ("name", "registry", "alias", "tags", "registered_model_name")
"""Those that only `log_model` has."""


def the_model(model: Any, options: dict[str, Any], absent: object) -> Any:
    """The model by any of MLflow's names for it, which is taken out of `options`. `absent` stands for none.
    Raises TypeError."""
    given = [name for name in MODELS if name in options]
    if (model is not absent) + len(given) != 1:
        raise TypeError(
            f"give the model once: as the first argument, or as {' or '.join(given or MODELS[:2])}"
        )
    return model if model is not absent else options.pop(given[0])


def ours(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`options` under our names, without those that have no meaning here, for which it warns. `given`: the
    keywords that the caller has already read; None counts as not given. Raises TypeError for one that is
    given under both names."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in FULFILLED:
            continue
        if name in IGNORED:
            if value is not None:
                warnings.warn(f"{name} has no meaning here and is ignored", stacklevel=4)
            continue
        own = SYNONYMS.get(name, name)
        if own in found or given.get(own) is not None:
            raise TypeError(f"{name} is another name of {own}: give one of them")
        found[own] = value
    return found


def check(options: Mapping[str, Any], flavor: str, taken: Iterable[str]) -> None:
    """Raises TypeError for an option that a flavor does not accept; it names the most similar one."""
    known = tuple(taken)
    for name in options:
        if name in known:
            continue
        takes = f"{flavor} models accept {', '.join(known)}" if known else f"{flavor} models accept no others"
        likely = near(name, [*known, *OWN, *SYNONYMS, *LOGGED])
        meant = f"did you mean {likely}? " if likely else ""
        if likely in LOGGED:
            only = f"only log_model takes {name}. "
            meant = only if likely == name else f"did you mean {likely}, a keyword of log_model? "
        raise TypeError(f"unknown keyword {name}: {meant}In addition to the common keywords, {takes}")


def signature(value: Any) -> Signature | None:
    """A signature of ours, or one of MLflow's, which says the same in its `to_dict()`. Raises TypeError."""
    from loaders.signature import Signature

    if value is None or isinstance(value, Signature):
        return value
    if hasattr(value, "to_dict") and hasattr(value, "inputs"):
        return Signature.from_json(value.to_dict())
    raise TypeError(
        f"signature is {type(value).__name__}: give a loaders.Signature or MLflow's ModelSignature, or none "
        "to have it inferred from the input_example"
    )


def requirements(value: str | Path | Iterable[str] | None) -> list[str] | None:
    """A list of pip requirements, or the path of a requirements file, which is read. Raises OSError."""
    from loaders.environment import requirement_lines

    if value is None:
        return None
    return (
        requirement_lines(Path(value).read_text(encoding="utf-8"))
        if isinstance(value, (str, Path))
        else list(value)
    )


def of_conda(value: str | Path | Mapping[str, Any]) -> list[str]:
    """The pip requirements of a conda environment: a mapping, or the path of its YAML file. Raises OSError,
    PackageError, and ValueError if it has no pip part: conda packages are not pip requirements."""
    from loaders.environment import pip_part
    from loaders.yamltext import parse_yaml

    content: Any = (
        parse_yaml(Path(value).read_bytes(), "conda_env") if isinstance(value, (str, Path)) else value
    )
    found = pip_part(content)
    if found is None:
        raise ValueError("conda_env has no pip part: give its packages as pip requirements in requirements")
    return found
