import re

import pytest
import ray
from sae_ray.jobs import progress

from tests.machine import until


def test_what_workers_tell_is_shown_and_may_be_lost(
    ray_cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.05)
    said = ""

    def shown(amount: int) -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return f"work: {amount} of 10 images" in said

    with progress.Progress("work", 10, "images") as shows:
        board = shows.board()
        for piece, amount in (("a", 2), ("b", 1), ("a", 3)):
            board.set(piece, amount)
        until(lambda: shown(4))
        board.set("a", 0)  # lost with its worker: it is done again
        board.set("a", 4)
        until(lambda: shown(5))
        board.set("a", 0)
        shows.advance(5)
        until(lambda: shown(6))
        ray.kill(board.actor)
        shows.advance(3)
        until(lambda: shown(9))
    amounts = [int(amount) for amount in re.findall(r"work: (\d+) of 10", said)]
    assert amounts == sorted(amounts), "it never turns back"

    later, last = (progress.Progress("work", 10, "images").board() for _ in range(2))
    assert later.actor == last.actor != board.actor, "stages share one, and the lost one is replaced"
    later.set("a", 7, {"cell": {"of": "cell"}})
    assert ray.get(last.actor.told.remote()) == (0, {}), "what is told late of the stage before is not counted"
    last.set("a", 7)
    again = progress.Progress("work", 10, "images").board()
    assert ray.get(again.actor.told.remote()) == (0, {}), "nothing is left of the stage before"
