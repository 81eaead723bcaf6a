"""The manifests are what Kubernetes takes, and say what the programs read."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Of Kubernetes, whose schemas the validator brings.
VERSIONS = ("1.33", "1.37")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((HERE / name).read_text()))


def by_name(kind: str, name: str) -> dict[str, Any]:
    found = [each for each in documents("thalweg.yaml") if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, f"{kind} {name}: {len(found)} of them"
    return found[0]


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["template"]["spec"]


def test_kubernetes_takes_them() -> None:
    for version in VERSIONS:
        for document in documents("thalweg.yaml"):
            kubernetes_validate.validate(document, version, strict=True)


def test_they_set_what_can_be_set() -> None:
    with (ROOT / "docs" / "thalweg.toml").open("rb") as file:
        settings = tomllib.load(file)
    for variable in by_name("ConfigMap", "thalweg")["data"]:
        if variable == "THALWEG_URL":
            continue
        prefix, *keys = variable.split("__")
        assert prefix == "THALWEG", variable
        value: Any = settings
        for key in keys:
            assert key.lower() in value, f"{variable}: there is no such setting"
            value = value[key.lower()]


def test_selectors_find_their_pods() -> None:
    run = [each for each in documents("thalweg.yaml") if "template" in each.get("spec", {})]
    pods = [each["spec"]["template"]["metadata"]["labels"] for each in run]
    for document in documents("thalweg.yaml"):
        match document["kind"]:
            case "Deployment" | "StatefulSet":
                selector = document["spec"]["selector"]["matchLabels"]
                assert selector.items() <= document["spec"]["template"]["metadata"]["labels"].items()
            case "Service":
                selector = document["spec"]["selector"]
                assert sum(selector.items() <= labels.items() for labels in pods) == 1, document["metadata"]["name"]


def test_the_autoscaler_may_scale_the_invokers_and_nothing_else() -> None:
    rules = by_name("Role", "thalweg-autoscaler")["rules"]
    assert rules == [
        {
            "apiGroups": ["apps"],
            "resources": ["deployments/scale"],
            "resourceNames": ["thalweg-invoker"],
            "verbs": ["get", "patch"],
        }
    ]
    assert pod(by_name("Deployment", "thalweg-autoscaler"))["serviceAccountName"] == "thalweg-autoscaler"


def test_invokers_have_the_time_to_drain() -> None:
    with (ROOT / "docs" / "thalweg.toml").open("rb") as file:
        drain_ms = tomllib.load(file)["invoker"]["drain_ms"]
    invoker = by_name("Deployment", "thalweg-invoker")
    assert pod(invoker)["terminationGracePeriodSeconds"] * 1000 >= 2 * drain_ms
    assert "replicas" not in invoker["spec"], "they are the autoscaler's to set"


def test_keda_scales_the_same_by_a_metric_that_there_is() -> None:
    (scaled,) = documents("keda.yaml")
    assert (scaled["apiVersion"], scaled["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    by_name("Deployment", scaled["spec"]["scaleTargetRef"]["name"])
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["type"] == "metrics-api" and trigger["metadata"]["format"] == "prometheus"
    # All values of a trigger are strings.
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    metrics = (ROOT / "autoscaler" / "src" / "metrics.rs").read_text()
    assert f'"{trigger["metadata"]["valueLocation"]}"' in metrics
    by_name("Service", "thalweg-autoscaler")
    most = by_name("ConfigMap", "thalweg")["data"]["THALWEG__AUTOSCALER__POLICY__MAX_INVOKERS"]
    assert scaled["spec"]["maxReplicaCount"] == int(most)
