"""The Ray cluster that a driver works on."""

from __future__ import annotations

import atexit
import logging
import os
import random
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_ray import control_groups
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.files import without_keys

from .progress import say

START_LIMITS = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_gcs_server_request_timeout_seconds": "25",
}
"""What Ray allows its own processes to start: more than its 30 and 60 seconds, which can be too few on a busy machine,
but less for one request, which is made again."""
KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms": "30000", "RAY_grpc_client_keepalive_timeout_ms": "20000"}
"""When a process gives up a call to a machine that vanished without a word: after 50 seconds. Ray's default is seven
minutes, in which all else waits. Nodes need these variables, too (`cluster/Dockerfile`)."""
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
"""As `RayParams` and the files in a session's folder name them."""

RETRIES = 10
"""How often a task or an actor is begun again that lost its process or its node. Ray's 3 are too few for a long stage
on machines that come and go; without a bound, work that ends its own process would be begun for ever."""

LONGEST_DIRECTORY = 40
"""Characters of the path of Ray's directory: it adds about 65, and the path of a socket has 107 at most."""
SHARES = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "NCPUS", "NSLOTS", "LSB_DJOB_NUMPROC")
"""CPUs that a scheduler has given to a job: at most these are to be used on its node."""
PROCESS_BYTES = 2**29
"""Memory of a worker that has loaded torch and holds nothing yet."""


def connect() -> None:
    """Joins the cluster of `RAY_ADDRESS` (a submitted job has one), else starts one on this machine.

    Does nothing where Ray is initialised already.
    """
    # Ray Train polls its workers; at the default of two seconds short runs spend most of their time waiting.
    _set_defaults({"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"})
    _set_defaults({"RAY_BACKEND_LOG_LEVEL": "fatal"})  # its warnings are not about anything a user can change
    _set_defaults({"RAY_task_oom_retries": str(RETRIES)})  # by default for ever, which `max_retries` does not bound
    _set_defaults(KEEPALIVE)
    allow_slow_starts()
    import ray

    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it reports its default at every start
    _show_messages_of_ray_on_stderr()
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        with _held_back_stderr():
            ray.init(logging_level=logging.WARNING)
    else:
        # Without one, Ray would write a token to ~/.ray, and every later `ray start` of this user would ask for it.
        _set_defaults({"RAY_AUTH_TOKEN": secrets.token_hex(32)})
        _start_less()
        # Logical CPUs: readers and actors that mostly wait need more than two of them to run at once.
        cpus = max(4, usable_cpus())
        # Ray ends idle processes beyond one per CPU, though the next stage needs what they have loaded.
        _set_defaults({"RAY_num_workers_soft_limit": str(3 * cpus)})
        with _held_back_stderr():
            memory = memory_for_ray()
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                _temp_dir=directory_for_ray(),
                logging_level=logging.WARNING,
                log_to_driver=False,
                **memory,
            )
        atexit.register(ray.shutdown)  # before Ray's own, which first waits for half a second


def _set_defaults(variables: Mapping[str, str]) -> None:
    """In the environment of this process, and so of Ray's."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def usable_cpus() -> int:
    """CPUs that this process may use: not those outside its affinity, its control groups' quotas (containers, systemd)
    or its share in a scheduler (Slurm, PBS, Grid Engine, LSF)."""
    import joblib

    limits = [joblib.cpu_count()]
    limits += [int(given) for name in SHARES if (given := os.environ.get(name, "")).isdigit() and int(given)]
    if quota := control_groups.cpu_quota():
        limits.append(quota)
    return min(limits)


def memory_for_ray() -> dict[str, Any]:
    """What to tell Ray of this machine's memory. Of the control groups it only sees the outermost; where those within
    leave less, it would give tasks more than there is."""
    from ray._private.utils import estimate_available_memory, resolve_object_store_memory  # as of Ray 2.60

    left = control_groups.memory().left
    if left >= estimate_available_memory():
        return {}
    store = resolve_object_store_memory(left)
    return {"object_store_memory": store, "_memory": left - store}


def directory_for_ray() -> str:
    """Ray's usual directory for files and sockets; where it belongs to somebody else, another one beside it.

    Raises:
        SaeRayError: there is no place for one.
    """
    from ray._common.utils import get_default_ray_temp_dir  # private, as of Ray 2.60

    usual = get_default_ray_temp_dir()
    own = f"ray-{os.getuid()}"
    for place in (Path(usual), Path(usual).with_name(own), Path("/tmp", own)):
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        if len(str(place)) <= LONGEST_DIRECTORY and os.access(there, os.W_OK | os.X_OK):
            return str(place)
    raise SaeRayError(
        f"Ray can write neither to {usual} nor to /tmp/{own}; set the environment variable RAY_TMPDIR "
        f"to a directory of yours whose path has at most {LONGEST_DIRECTORY - len('/' + own)} characters"
    )


def allow_slow_starts() -> None:
    """Gives the processes of Ray clusters that this process starts more time: a busy machine needs it.

    A raylet gives up for good if its agents have not written the ports that they chose to files after 15 seconds, which
    cannot be changed (Ray 2.60, `NodeManager::WaitForDashboardAgentPorts`). So ports are chosen, and written, before.
    """
    _set_defaults(START_LIMITS)
    from ray._private.node import Node
    from ray._raylet import persist_port  # pyright: ignore[reportAttributeAccessIssue]

    start = Node.start_ray_processes
    if start.__name__ == "start_with_ports":
        return

    def start_with_ports(node: Node) -> None:
        for name in AGENT_PORTS:
            port = free_port()
            setattr(node._ray_params, name, port)
            persist_port(node._session_dir, node._node_id, name, port)
        start(node)

    Node.start_ray_processes = start_with_ports  # pyright: ignore[reportAttributeAccessIssue]


def _start_less() -> None:
    """Keeps this process from starting what serves Ray's dashboard, shows the output of workers in the driver's, and
    adds nodes.

    Ray 2.60 starts, and waits for, the dashboard's process also where there is to be none. What adds nodes also takes
    more than a second to end.
    """
    from ray._private import ray_constants
    from ray._private.node import Node

    def start_none(node: Node, **options: Any) -> None:
        # Where there is no address, agents look for one every second and complain in their logs.
        of_none = b"127.0.0.1:9"
        kv = ray_constants.KV_NAMESPACE_DASHBOARD
        gcs: Any = node.get_gcs_client()
        gcs.internal_kv_put(ray_constants.DASHBOARD_ADDRESS.encode(), of_none, True, kv)

    Node.start_api_server = start_none  # pyright: ignore[reportAttributeAccessIssue]
    Node.start_log_monitor = Node.start_monitor = lambda node: None  # pyright: ignore[reportAttributeAccessIssue]


def free_port() -> int:
    """One that nobody listens on, below those that Linux and above those that Ray give to whoever asks for any."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise SaeRayError("none of 100 ports between 20,000 and 32,000 is free on this machine; stop what holds them")


def _show_messages_of_ray_on_stderr() -> None:
    """Ray 2.60 prints what its raylets and controller report to standard output, where it would spoil `--json`."""
    from ray._private import worker

    def show(data: dict, ignore_prefix: bool) -> None:
        for message in data["lines"]:
            if "worker processes have been started" not in message:  # usual where processes are slow to start
                say(f"Ray: {message}")

    worker.print_to_stdstream = show


@contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Shows what is written to standard error only if the block raises: Ray's core prints its log level there."""
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def is_taken_away() -> bool:
    """Whether the node of this worker is about to be taken away, as a spot instance is, after a notice. Private in Ray
    2.60."""
    import ray
    from ray._private.state import state

    return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()


def take_threads() -> None:
    """Has torch use as many threads as this task has CPUs: Ray says how many in the environment, which torch reads only
    once in a process, and the process may have served others."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def beside_driver() -> Any:
    """The scheduling strategy for what must not be lost with another node: it runs on the node of this driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def n_gpus() -> int:
    """GPUs of the cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def n_cpus() -> int:
    """Logical CPUs of the cluster."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def store_bytes() -> float:
    """Memory of the cluster's object stores."""
    import ray

    return ray.cluster_resources().get("object_store_memory", 0.0)


def slots(cpus: float, gpus: float) -> float:
    """How many workers of these resources run at once by default: one per GPU, or one per two CPUs, since logical CPUs
    may outnumber the cores."""
    return n_gpus() / gpus if gpus else n_cpus() / (2 * max(cpus, 1))


def gpus_or_default(gpus: float | None) -> float:
    """GPUs of a worker: as many as are asked for, else 1 where the cluster has any."""
    return float(n_gpus() > 0) if gpus is None else gpus


def room(cpus: float, gpus: float, memory: float = 0) -> int:
    """How many workers of these resources the cluster's nodes hold. `memory`: bytes of each."""
    return sum(_places(node, cpus, gpus, memory) for node in nodes_alive())


def at_most_a_node(memory: float, cpus: float, gpus: float) -> int:
    """Bytes to ask Ray for, for a worker: more than the nodes have that can run it would never be given. All, where
    there is no such node yet."""
    return min(int(memory), most_memory(nodes_alive(), cpus, gpus) or int(memory))


def most_memory(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float, workers: int = 1) -> int:
    """Bytes that each of the workers can have at most. As if there were nodes for all, where only some find a place;
    0 where none does.

    Args:
        nodes: the resources of each, as Ray names them.
    """
    shares = {
        node.get("memory", 0.0) / number
        for node in nodes
        for number in range(1, min(workers, _places(node, cpus, gpus)) + 1)
    }
    for each in sorted(shares, reverse=True):
        if sum(_places(node, cpus, gpus, each) for node in nodes) >= workers:
            return int(each)
    return int(min(shares, default=0))


def nodes_alive() -> list[dict[str, float]]:
    """The resources of each."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _places(node: Mapping[str, float], cpus: float, gpus: float, memory: float = 0) -> int:
    wanted = {"CPU": cpus, "GPU": gpus, "memory": memory}
    found = (int(node.get(kind, 0) / each + 1e-6) for kind, each in wanted.items() if each)
    return min(found, default=sys.maxsize)


def share(field: str, resources: Any) -> tuple[float, int]:
    """GPUs of a task, and how many tasks run at once.

    Args:
        field: the table of the study, such as `resources.score`.
        resources: its `workers`, `cpus` and `gpus`.

    Raises:
        UsageError: this driver's own cluster has no room for one.
    """
    gpus = gpus_or_default(resources.gpus)
    require(field, 1, resources.cpus, gpus)
    if resources.workers or gpus:
        return gpus, resources.workers or max(1, room(resources.cpus, gpus))
    cpus = max(resources.cpus, 1)
    # More processes than cores would only take longer to start.
    most = room(cpus, 0) if os.environ.get("RAY_ADDRESS") else min(room(cpus, 0), int(usable_cpus() / cpus))
    return gpus, max(1, most)


def require(field: str, workers: int, cpus: float, gpus: float, beside: float = 0) -> None:
    """Refuses workers that the cluster has no room for; on a cluster that may grow (`RAY_ADDRESS`) it only warns.

    Args:
        field: the table of the study that asks for them, such as `resources.steering`.
        workers: number that must run at once.
        cpus: per worker.
        gpus: per worker.
        beside: CPUs needed for other tasks at the same time.

    Raises:
        UsageError: this driver's own cluster has no room for them.
    """
    if room(cpus, gpus) >= workers and n_cpus() >= workers * cpus + beside:
        return
    problem = (
        f"{field}: {workers} at once with cpus = {cpus:g} and gpus = {gpus:g} each"
        + (f", and {beside:g} CPU beside them," if beside else "")
        + f" do not fit in the cluster of {n_cpus()} CPUs and {n_gpus()} GPUs"
    )
    if os.environ.get("RAY_ADDRESS"):
        say(f"{problem}; they wait until it grows")
    else:
        raise UsageError(f"{problem}; lower their number, cpus or gpus there")


def user_error(error: BaseException | None) -> SaeRayError | None:
    """The error that a user can fix, if there is one among the causes of what Ray raised."""
    return next((cause for cause in _causes(error) if isinstance(cause, SaeRayError)), None)


def loss(error: BaseException) -> str | None:
    """What the machines did to the work, in one line, if that caused it: a lost process or node, a failing disk or
    object store. None for an error of the program."""
    from ray.exceptions import RayError, RayTaskError
    from ray.train import TrainingFailedError

    for cause in _causes(error):
        if isinstance(cause, OSError) and not isinstance(cause, RayError):
            return f"a file could not be read or written ({_first_line(cause)})"
        if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
            return f"Ray lost a part of it ({type(cause).__name__}: {_first_line(cause)})"
    return f"Ray gave it up ({_first_line(error)})" if isinstance(error, TrainingFailedError) else None


def reason(error: BaseException) -> str:
    """Why work ended, in one line without keys."""
    *_, innermost = _causes(error)
    text = loss(error) or f"{type(innermost).__name__}: {_first_line(innermost)}"
    known = user_error(error)
    return without_keys(_first_line(known) if known else text.removesuffix(": "))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """From the outermost to the innermost."""
    while error is not None:
        # Ray raises a subclass of the task's own error whose text includes a remote traceback; its cause has the plain
        # message. Ray Train wraps what its workers raised, or its controller.
        cause = getattr(error, "cause", None)
        if not (isinstance(cause, BaseException) and isinstance(error, type(cause))):
            yield error
        failed_workers = getattr(error, "worker_failures", {})
        inner = cause, next(iter(failed_workers.values()), None), getattr(error, "controller_failure", None)
        error = next((one for one in inner if isinstance(one, BaseException)), error.__cause__)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "").strip().rstrip(":.")
