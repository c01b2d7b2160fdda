"""The environments of models: the check against an interpreter, the lock of a package, the built environment.

The entry point is `store`: the environments of a gateway, made from its settings. Must not know registries,
aliases or running models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gateway.environments.build import Store
from gateway.environments.interpreters import Interpreters
from gateway.environments.resolve import Resolver
from gateway.environments.uv import Uv

if TYPE_CHECKING:
    from gateway.settings import Settings


def store(settings: Settings, environ: Mapping[str, str] = os.environ) -> Store:
    """The environments under `cache_dir`, which several gateways may share."""
    root = settings.cache_dir / "environments"
    uv = Uv(root / "uv", root / "scratch", environ)
    interpreters = Interpreters(settings.environments.python, environ)
    resolver = Resolver(uv, interpreters, wheels_only=settings.environments.wheels_only)
    return Store(root, uv, resolver, interpreters)
