"""The Helm chart, rendered by Helm itself, and the kustomize files that are written from it.

The chart is the source. After a change of the chart, `python -m tests.support.charts` writes the files of
`deploy/kubernetes`; `test_chart.py` fails if they differ.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import needs
from tests.support.containers import ROOT, tool

CHART = ROOT / "deploy" / "helm"
KUSTOMIZE = ROOT / "deploy" / "kubernetes"
HEADER = (
    "# Written from deploy/helm by `python -m tests.support.charts`: change it in an overlay, or there.\n"
)
#: What each component adds: the values of the chart, and the templates that become its files.
COMPONENTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "admin": ({"admin": True}, ("admin",)),
    "keda": ({"keda": {"enabled": True}}, ("scaledobject",)),
    "model-users": ({"modelUsers": True}, ()),
    "monitoring": ({"monitoring": {"enabled": True}}, ("servicemonitor", "prometheusrule", "dashboard")),
    "routing": ({"routing": True}, ("routing",)),
    "peers": ({"peers": {"secret": "gateway-peers"}}, ("peers",)),
    "network-policy": ({"networkPolicy": {"enabled": True}}, ("networkpolicy",)),
}
UPLOAD = {"upload": True}
#: A kustomization cannot compute it: there, pods restart by `kubectl rollout restart`.
_CHECKSUM = re.compile(r" *annotations:\n *checksum/settings: \w+\n")


def rendered(
    values: Mapping[str, Any] | None = None, name: str = "gateway", namespace: str = "default"
) -> dict[str, str]:
    """The text of each template, by its name. Raises HelmError for values that the schema refuses."""
    helm = needs("helm_python")
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(dict(values or {}), name=name, namespace=namespace)
    found = {Path(path).stem: text.strip() + "\n" for path, text in texts.items() if text.strip()}
    return {stem: text for stem, text in found.items() if not stem.startswith("_")}


def objects(texts: Iterable[str]) -> dict[tuple[str, str], Any]:
    """The objects of some YAML, by kind and name, without what only Helm writes."""
    found = {}
    for text in texts:
        for one in yaml.safe_load_all(_CHECKSUM.sub("", text)):
            found[one["kind"], one["metadata"]["name"]] = one
    return found


def built(directory: Path) -> dict[tuple[str, str], Any]:
    """The objects of a kustomization, as `kubectl kustomize` builds it."""
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(directory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return objects([done.stdout])


def files() -> dict[str, str]:
    """Returns the contents of the generated files of `deploy/kubernetes`, by path."""
    made = {f"{stem}.yaml": text for stem, text in rendered().items()}
    for component, (values, templates) in COMPONENTS.items():
        texts = rendered(values) if templates else {}
        made |= {f"{component}/{template}.yaml": texts[template] for template in templates}
    made["upload/pod.yaml"] = rendered(UPLOAD)["upload"]
    return {path: HEADER + _CHECKSUM.sub("", text) for path, text in made.items()}


def write() -> None:
    for path, text in files().items():
        file = KUSTOMIZE / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
