"""Makes the wheel, and shows that it can be released: `make wheel` and `make release-check`.

python -m tools.release wheel FOLDER   # writes it there
python -m tools.release check FOLDER   # writes it there, if it is as it should be
python -m tools.release try BIN        # has an environment, in which it is installed, run and serve the demo
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

LARGEST = 12_000_000
"""Bytes of a wheel. Most of them are the models of the embedded world."""
PATIENCE_S = 300
WHITE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4//8/AAX+Av4zEpUUAAAAAElFTkSuQmCC"
)


def wheel(into: Path) -> Path:
    """Builds it of the last commit: the same commit gives the same bytes, whenever, wherever and whoever builds it."""
    with tempfile.TemporaryDirectory() as source:
        archive = subprocess.run(["git", "archive", "HEAD"], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(source, filter="data")
        seconds = subprocess.run(
            ["git", "log", "-1", "--format=%ct"], check=True, capture_output=True, text=True
        ).stdout
        build(Path(source), into, int(seconds))
    return next(into.glob("*.whl"))


def build(source: Path, into: Path, seconds: int) -> None:
    """Builds the wheel of a source tree, with the setuptools that is installed.

    Args:
        seconds: since 1970, the time that its files get.
    """
    for file in source.rglob("*"):  # a checkout's rights depend on who made it
        file.chmod(0o755 if file.is_dir() else 0o644)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(seconds)}
    subprocess.run([*command, "--wheel-dir", into, source], check=True, env=environment, umask=0o022)


def check(into: Path) -> None:
    """Builds it twice, and has others look at it. Exits with a message if something is wrong."""
    if into.exists():
        shutil.rmtree(into)
    first = wheel(into)
    with tempfile.TemporaryDirectory() as again:
        if wheel(Path(again)).read_bytes() != first.read_bytes():
            sys.exit(f"{first}: built again, it has other bytes")
    if first.stat().st_size > LARGEST:
        sys.exit(f"{first}: {first.stat().st_size:,} bytes, more than {LARGEST:,}")
    scripts = Path(sys.executable).parent
    subprocess.run([scripts / "twine", "check", "--strict", first], check=True)
    # Two models of the world have the same tokenizer, and each is a directory by itself.
    subprocess.run([scripts / "check-wheel-contents", "--ignore", "W002", first], check=True)
    print(f"{first}: {first.stat().st_size:,} bytes, the same when built again")


def try_out(scripts: Path) -> None:
    """Runs what docs/install.md says a new user runs, in a home of its own beside the commands. Exits with a message if
    it fails."""
    command, home = str(scripts.absolute() / "sae-ray"), scripts.absolute().parent / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON", "SAE_RAY"))}
    place = {"cwd": home, "env": kept | {"HOME": str(home)}}
    for words in (["--help"], ["studies"], ["doctor"], ["demo"], ["demo"]):
        began = time.monotonic()
        done = subprocess.run([command, *words], **place, check=False, stdout=subprocess.PIPE, text=True)
        print(f"sae-ray {' '.join(words)}: {time.monotonic() - began:.1f} s", flush=True)
        if done.returncode:
            sys.exit(f"sae-ray {' '.join(words)} exited with {done.returncode}:\n{done.stdout}")
    report = re.search(r"^ *report +(.*)$", done.stdout, re.MULTILINE)
    if report is None or not Path(home, report[1]).is_file():
        sys.exit(f"sae-ray demo names no report:\n{done.stdout}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    with subprocess.Popen([command, "serve", "--demo", "--port", str(port)], **place) as server:
        try:
            answer = ask(f"http://127.0.0.1:{port}/v1", server)
            print(f"sae-ray serve --demo: {answer} after {time.monotonic() - began:.1f} s", flush=True)
        finally:
            server.terminate()  # an interrupt is ignored by what a script starts in the background


def ask(api: str, server: subprocess.Popen) -> str:
    """What the LLaVA says of a white image, once the server answers, with the latent of stars set."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            [sae] = call(f"{api}/saes")["data"]
            break
        except (URLError, ConnectionError):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("sae-ray serve --demo does not answer")
            time.sleep(0.5)
    star = call(f"{api}/saes/{sae['id']}/features?search=star")["data"][0]["index"]
    question = {"image": WHITE, "prompt": "What is shown in this image? Use exactly one word!", "sae": sae["id"]}
    steering = {"features": [{"index": star, "strength": 4, "unit": "max"}], "types": ["STEERED"]}
    return json.dumps(call(f"{api}/steer", question | steering))


def call(address: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(address, data, {"Content-Type": "application/json"}), timeout=60) as answer:
        return json.load(answer)


if __name__ == "__main__":
    what, where = sys.argv[1:]
    {"wheel": wheel, "check": check, "try": try_out}[what](Path(where))
