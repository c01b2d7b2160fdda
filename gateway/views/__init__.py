"""Typed, frozen views of a gateway for users: models, versions, rollouts and readiness.

`shapes`: the views and their JSON. `contents`: facts from a version's files. `reader`: `Views`, which makes
the views from the live parts.
"""

from gateway.views.contents import Described
from gateway.views.reader import Views
from gateway.views.shapes import DryRunView, ModelView, ReadinessView, RolloutView, VersionView, View

__all__ = [
    "Described",
    "DryRunView",
    "ModelView",
    "ReadinessView",
    "RolloutView",
    "VersionView",
    "View",
    "Views",
]
