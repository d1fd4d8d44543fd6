"""An object store that fails for a while costs time, and nothing else."""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sae_ray.jobs.cluster import free_port

from sae_ray.store.files import Folder
from tests.object_store import bucket, served


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[str]:
    """The address of a server with the bucket `study`."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tests.faulty_store", str(port)]
    with served(command, address, tmp_path_factory.mktemp("store") / "log"):
        yield address


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        ("503", 8),  # longer than pyarrow itself is patient
        *(pytest.param(fault, 30, marks=pytest.mark.slow) for fault in ("500", "503", "slow")),
    ],
)
def test_requests_outlast_a_fault(store: str, fault: str, seconds: float, record_fault):
    folder = Folder(bucket(store).format(fault))
    large = bytes(20_000_000)  # in several requests
    folder.write_bytes("small", b"1")
    folder.write_bytes("old", b"2")
    httpx.put(f"{store}/-/fault/{fault}/{seconds}")
    begun = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        read = threads.submit(folder.read_bytes, "small")
        listed = threads.submit(folder.files)
        written = threads.submit(folder.write_bytes, "large", large)
        deleted = threads.submit(folder.delete, "old")
        assert read.result() == b"1"
        assert "small" in listed.result()
        written.result()
        deleted.result()
    assert time.monotonic() - begun >= seconds, "they did not meet the fault"
    assert int(httpx.get(f"{store}/-/refused").text) >= 4
    assert folder.read_bytes("large") == large
    assert list(folder.files()) == ["large", "small"]
    how = "does not answer" if fault == "slow" else f"answers {fault}"
    record_fault(f"the object store {how} for {seconds} s", "any", "requests are made again until it does")


def test_a_store_that_is_not_there_is_noticed_within_seconds():
    folder = Folder("s3://testing:testing@study/x?endpoint_override=http%3A%2F%2F127.0.0.1%3A1&region=us-east-1")
    begun = time.monotonic()
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        folder.check_reachable()
    assert time.monotonic() - begun < 25, "it asked as often as for work that has begun"
