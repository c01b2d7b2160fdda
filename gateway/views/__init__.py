"""What people see of a gateway: models, versions, rollouts and readiness, as typed and frozen views.

`shapes`: the views, with their JSON. `contents`: what a version's files say. `reader`: `Views`, which reads
them from the live parts.
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
