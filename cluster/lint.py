"""Checks the manifests of cluster/kuberay against KubeRay's own definitions: `python cluster/lint.py DIR`.

DIR holds the definitions, ray.io_*.yaml, as in `ray-operator/config/crd/bases` of a checkout of KubeRay. Like the API
server, and unlike a plain JSON schema, this refuses fields that a definition does not have.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

MANIFESTS = Path(__file__).parent / "kuberay"
GROUP = "ray.io/"


def main(folder: str) -> int:
    schemas = {}
    for file in sorted(Path(folder).rglob("ray.io_*.yaml")):
        schemas |= read_schemas(file.read_text(encoding="utf-8"))
    checked, found = 0, []
    for file in sorted(MANIFESTS.glob("*.yaml")):
        manifest = yaml.safe_load(file.read_text(encoding="utf-8"))
        if manifest["apiVersion"].startswith(GROUP):
            checked += 1
            found += [f"{file.name}: {problem}" for problem in problems(manifest, schemas)]
    print("\n".join([*found, f"{checked} manifests, {len(found)} problems"]))
    return 1 if found or not checked else 0


def read_schemas(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The strict schema of each (apiVersion, kind) that a CustomResourceDefinition serves."""
    spec = yaml.load(text, yaml.CSafeLoader)["spec"]
    return {
        (f"{spec['group']}/{version['name']}", spec["names"]["kind"]): strict(version["schema"]["openAPIV3Schema"])
        for version in spec["versions"]
        if version["served"]
    }


def strict(schema: Any) -> Any:
    """The schema as JSON Schema, which takes no field that is not listed and knows Kubernetes' extensions."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        out["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string") is True:
        out["type"] = ["integer", "string"]
    return out


def problems(manifest: dict[str, Any], schemas: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """`path: what is wrong` of each problem of a manifest."""
    kind = manifest["apiVersion"], manifest["kind"]
    if kind not in schemas:
        return [f"{kind[0]} {kind[1]} is not defined there"]
    errors = Draft202012Validator(schemas[kind]).iter_errors(manifest)
    return sorted(f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
