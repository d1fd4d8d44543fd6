"""The manifests for KubeRay hold what docs/cluster.md and docs/security.md promise of them.

KubeRay's own definitions are not shipped; `make cluster-lint CRDS=DIR` checks the manifests against them.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from sae_ray.jobs.cli import main
from sae_ray.serve.config import API_KEY, ServeConfig

from cluster.lint import problems, read_schemas

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "cluster" / "kuberay"
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
KUBERNETES = "1.34"
DASHBOARD, CLIENT, GCS, METRICS, HTTP = 8265, 10001, 6379, 8080, 8000
CLUSTERS = {
    "cluster.yaml": ("spec",),
    "study.yaml": ("spec", "rayClusterSpec"),
    "serve.yaml": ("spec", "rayClusterConfig"),
}
"""Manifest -> where the cluster is in it."""


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def cluster(name: str) -> dict[str, Any]:
    found = manifest(name)
    for key in CLUSTERS[name]:
        found = found[key]
    return found


def groups(name: str) -> list[dict[str, Any]]:
    """The head's group, then the workers'."""
    return [cluster(name)["headGroupSpec"], *cluster(name)["workerGroupSpecs"]]


def pods(name: str) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in groups(name)]


def containers(name: str) -> list[dict[str, Any]]:
    return [container for pod in pods(name) for container in pod["containers"]]


def values(found: Any, key: str) -> Iterator[Any]:
    """All values of a key, however deep."""
    for name, value in (
        found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    ):
        if name == key:
            yield value
        yield from values(value, key)


each_cluster = pytest.mark.parametrize("name", CLUSTERS)


def test_every_manifest_is_looked_at():
    kinds = {file.name: manifest(file.name)["kind"] for file in FOLDER.iterdir()}
    assert kinds == {
        "cluster.yaml": "RayCluster",
        "study.yaml": "RayJob",
        "serve.yaml": "RayService",
        "network.yaml": "NetworkPolicy",
        "models.yaml": "PersistentVolumeClaim",
    }
    assert {manifest(name)["apiVersion"] for name in CLUSTERS} == {"ray.io/v1"}


@pytest.mark.parametrize("name", ["network.yaml", "models.yaml"])
def test_what_is_kubernetes_own_is_valid(name):
    kubernetes_validate.validate(manifest(name), KUBERNETES, strict=True)


@each_cluster
def test_pods_are_valid(name):
    for pod in pods(name):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounts = [mount for container in pod["containers"] for mount in container["volumeMounts"]]
        assert {mount["name"] for mount in mounts} == volumes
        assert {"/dev/shm", "/home/ray/.cache/huggingface"} <= {mount["mountPath"] for mount in mounts}


@each_cluster
def test_a_token_is_asked_for(name):
    assert cluster(name)["authOptions"] == {"mode": "token"}
    set_here = {variable["name"] for container in containers(name) for variable in container["env"]}
    assert not {variable for variable in set_here if variable.startswith("RAY_AUTH")}, "it would replace KubeRay's"


@each_cluster
def test_nothing_is_exposed_outside_kubernetes(name):
    """KubeRay's services are of type ClusterIP where nothing else is said."""
    found = manifest(name)
    for key in ("serviceType", "headService", "serveService", "ingressOptions", "hostPort", "hostNetwork"):
        assert not list(values(found, key)), key
    assert not any(values(found, "enableIngress"))


def test_the_network_is_closed_but_for_http_and_the_operator():
    policy = manifest("network.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}, "KubeRay labels all of Ray's pods so"
    assert policy["policyTypes"] == ["Ingress"]
    opened: dict[str, set[int]] = {}
    for rule in policy["ingress"]:
        for peer in rule["from"]:
            if "namespaceSelector" in peer:
                namespace = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
                opened[namespace] = {port["port"] for port in rule["ports"]}
            else:
                assert peer == {"podSelector": {}}, "the pods of this namespace"
    assert opened == {"ingress-nginx": {HTTP}, "kuberay": {DASHBOARD, HTTP}, "monitoring": {METRICS, HTTP}}


@each_cluster
def test_secrets_are_only_referred_to(name):
    for container in containers(name):
        assert "envFrom" not in container
        for variable in container["env"]:
            assert set(variable) == {"name", "valueFrom"}, variable["name"]
            assert variable["valueFrom"]["secretKeyRef"]["name"] == "sae-ray-keys"
    names = {variable["name"] for container in containers(name) for variable in container["env"]}
    assert names == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} | (
        {API_KEY} if name == "serve.yaml" else set()
    )


@each_cluster
def test_pods_have_few_rights(name):
    head, *workers = pods(name)
    for pod in (head, *workers):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000, "the user of the image"
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    assert [pod.get("automountServiceAccountToken") for pod in workers] == [False, False], (
        "only the autoscaler needs one"
    )


@each_cluster
def test_images_and_ray_are_pinned(name):
    assert cluster(name)["rayVersion"] == ray.__version__
    image = f"registry.example.com/sae-ray:{VERSION}"
    for group in groups(name):
        [container] = group["template"]["spec"]["containers"]
        has_gpu = "nvidia.com/gpu" in container["resources"]["requests"]
        assert container["image"] == (f"{image}-gpu" if has_gpu else image)
    assert f"{image}-gpu" in (text := (REPOSITORY / "cluster" / "Dockerfile").read_text())
    assert f"{image} " in text


@each_cluster
def test_groups_scale(name):
    assert cluster(name)["enableInTreeAutoscaling"] is True
    head, *workers = groups(name)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert [group["groupName"] for group in workers] == ["cpu", "gpu"]
    for group in workers:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert [group["minReplicas"] > 0 for group in workers] == [False, True], "stages use GPUs if there are any"
    assert all(group["maxReplicas"] > group["minReplicas"] for group in workers)
    for container in containers(name):
        asked, limit = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(asked)
        assert asked["memory"] == limit["memory"]
        assert asked.get("nvidia.com/gpu") == limit.get("nvidia.com/gpu"), "Kubernetes refuses a difference"


@each_cluster
def test_ports_are_rays(name):
    ports = {port["name"]: port["containerPort"] for port in containers(name)[0]["ports"]}
    expected = {"gcs-server": GCS, "dashboard": DASHBOARD, "client": CLIENT, "metrics": METRICS}
    assert ports == expected | ({"serve": HTTP} if name == "serve.yaml" else {})


def test_the_study_is_a_command_of_ours():
    job = manifest("study.yaml")["spec"]
    program, command, *arguments = shlex.split(job["entrypoint"])
    assert program == "sae-ray"
    given = main.commands[command].make_context(command, arguments).params
    assert (command, given["root"]) == ("run", root_that_is_served())
    [mount] = [
        one for one in containers("study.yaml")[0]["volumeMounts"] if given["study"].startswith(one["mountPath"])
    ]
    assert mount["name"] == "studies"
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] > 0, "a lost head ends the driver; a new one resumes"


def root_that_is_served() -> str:
    [application] = yaml.safe_load(manifest("serve.yaml")["spec"]["serveConfigV2"])["applications"]
    return application["args"]["root"]


def test_the_service_is_the_cluster_configuration():
    """`tests/serve/test_config.py` reads that one as Ray Serve and the application do."""
    served = yaml.safe_load(manifest("serve.yaml")["spec"]["serveConfigV2"])
    assert served == yaml.safe_load((REPOSITORY / "cluster" / "serve" / "cluster.yaml").read_text())
    assert served["http_options"]["port"] == HTTP


def test_the_service_finds_its_gpus():
    [application] = yaml.safe_load(manifest("serve.yaml")["spec"]["serveConfigV2"])["applications"]
    config = ServeConfig.model_validate(application["args"])
    needed = sum(one.replicas * one.gpus for one in (config.tower, config.language))
    [group] = [one for one in cluster("serve.yaml")["workerGroupSpecs"] if one["groupName"] == "gpu"]
    resources = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert needed <= group["minReplicas"] * int(resources["nvidia.com/gpu"])
    assert config.language.cpus + 2 * config.tower.cpus <= int(resources["cpu"])


DEFINITION = """
spec:
  group: ray.io
  names: {kind: RayCluster}
  versions:
    - {name: v1alpha1, served: false, schema: {openAPIV3Schema: {}}}
    - name: v1
      served: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            apiVersion: {type: string}
            kind: {type: string}
            spec:
              type: object
              required: [mode]
              properties:
                mode: {type: string, enum: [token]}
                cpus: {x-kubernetes-int-or-string: true}
                labels: {type: object, additionalProperties: {type: string}}
                free: {type: object, x-kubernetes-preserve-unknown-fields: true, properties: {}}
"""


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ({"mode": "token", "cpus": "4", "labels": {"any": "text"}, "free": {"any": [1]}}, []),
        ({"mode": "token", "cpus": 4}, []),
        ({"mode": "token", "cpuz": 4}, ["spec: .*'cpuz' was unexpected"]),
        ({"mode": "token", "cpus": [4]}, ["spec.cpus: .*is not of type"]),
        (
            {"mode": "none", "labels": {"any": 1}},
            ["spec.labels.any: 1 is not of type", "spec.mode: 'none' is not one of"],
        ),
        ({}, ["spec: 'mode' is a required property"]),
    ],
)
def test_what_a_definition_does_not_allow_is_found(spec, found):
    told = problems({"apiVersion": "ray.io/v1", "kind": "RayCluster", "spec": spec}, read_schemas(DEFINITION))
    assert len(told) == len(found)
    assert all(re.match(pattern, line) for line, pattern in zip(told, found, strict=True)), told


def test_a_kind_without_a_definition_is_found():
    told = problems({"apiVersion": "ray.io/v1alpha1", "kind": "RayCluster"}, read_schemas(DEFINITION))
    assert told == ["ray.io/v1alpha1 RayCluster is not defined there"]
