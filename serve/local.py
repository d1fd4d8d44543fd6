"""`sae-ray serve`: the application on this machine alone; `serve deploy` is for clusters."""

from __future__ import annotations

import io
import ipaddress
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.files import address_shown

from .config import API_KEY, ServeConfig, with_llava

HTTP_GRACE_S = 10.0
NAME = "sae-ray"


def read_config(file: str | None, engine: str | None, options: Mapping[str, Any]) -> ServeConfig:
    """The configuration in a YAML file, overridden by the options that are given.

    Raises UsageError when the file cannot be read, or a field is invalid.
    """
    values = {} if file is None else _read_yaml(file)
    values |= {name: value for name, value in options.items() if value}
    if engine is not None:
        language = values.get("language") or {}
        values["language"] = language | {"engine": engine} if isinstance(language, dict) else language
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field, value = ".".join(map(str, first["loc"])), first["input"]
        problem = "is missing" if first["type"] == "missing" else f"is {value!r}: {first['msg']}"
        raise UsageError(f"{field} {problem}; see --help for the options, serve/config.py for all fields") from error


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {file} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(
            f"--config {file} is not a table of fields; known fields: {', '.join(ServeConfig.model_fields)}"
        )
    return values


def run(config: ServeConfig, host: str, port: int, connect: Callable[[], None], say: Callable[[str], None]) -> None:
    """Serves until it is interrupted, on the Ray that `connect` starts.

    Raises UsageError when the study or its LLaVA is missing, other machines could reach the server without a key, or
    RAY_ADDRESS names a cluster.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        raise UsageError(
            f"RAY_ADDRESS is {address}, but sae-ray serve starts a Ray of its own on this machine; unset it, or deploy "
            "to that cluster with serve deploy (cluster/serve has configurations)"
        )
    has_key = bool(os.environ.get(API_KEY))
    if not has_key and not _is_loopback(host):
        raise UsageError(
            f"--host {host} can be reached from other machines; set {API_KEY} to a secret that clients must send, or "
            "serve on 127.0.0.1"
        )
    _check_port(host, port)
    config = with_llava(config).model_copy(update={"without_key": not has_key})
    started = time.monotonic()
    connect()
    from ray import serve

    from .app import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what starts is said below
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.start(
            http_options={
                "host": host,
                "port": port,
                "request_timeout_s": config.limits.timeout_s + HTTP_GRACE_S,
            }
        )
        try:
            serve.run(build(config), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise SaeRayError(f"the application did not start: {_why_not_deployed()}") from error
        key = f", API key from {API_KEY}" if has_key else ""
        served = f"{address_shown(config.model)} steered by {address_shown(config.root)}"
        say(f"Serving {served} after {time.monotonic() - started:.0f} s{key}")
        say(f"  memory      {serve.get_deployment_handle('Language', NAME).memory.remote().result()}")
        say(f"  playground  http://{host}:{port}/")
        say(f"  API         http://{host}:{port}/v1   (documentation: /docs)")
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        say("Stopping after the requests that are being answered.")
    finally:
        _stop()


def _stop() -> None:
    import ray
    from ray import serve

    with redirect_stderr(io.StringIO()):  # Ray reports that Serve's controller ended, as it does whenever Serve stops
        serve.shutdown()
        ray.shutdown()


def _why_not_deployed() -> str:
    """The last error of the replicas that failed, and where to find more, which Ray 2.60 says only in private."""
    import ray
    from ray import serve

    told = [one.message for one in serve.status().applications[NAME].deployments.values()]
    errors = [line for message in told for line in message.splitlines() if re.match(r"[\w.]*(Error|Exception): ", line)]
    folder = ray._private.worker._global_node.get_session_dir_path()  # type: ignore[attr-defined]
    return f"{errors[-1] if errors else 'a replica failed'} (more in {folder}/logs)"


def _check_port(host: str, port: int) -> None:
    """Raises UsageError for a port in use, which Ray would share with the other server."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"--host {host} --port {port} is not free ({error.strerror}); choose another") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
