"""The benchmark of real sizes runs, at tiny ones."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest
import torch

from bench import real_llava, real_sizes

ENCODERS = ("CLIP ViT-L/14-336", "DINOv2-B/14", "SigLIP so400m/14-384")
ENCODER_ROWS = 4 + 6 + 3 + 2 + 3
"""Of extraction, training twice, evaluation and scoring."""


@pytest.mark.parametrize(
    ("main", "arguments", "titles", "n_rows"),
    [
        (
            real_sizes.main,
            ["--images", "2"],
            ("CLIP ViT-L/14-336", "DINOv2-B/14", "SigLIP so400m/14-384"),
            ENCODER_ROWS,
        ),
        (real_llava.main, [], ("LLaVA-1.5-7B",), 4),
    ],
)
def test_every_piece_of_work_is_measured(
    main: Callable[[list[str]], None], arguments: list[str], titles: tuple[str, ...], n_rows: int, tmp_path, capsys
):
    threads = torch.get_num_threads()
    try:
        main(["--small", "--scratch", str(tmp_path), *arguments])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    rows = [ast.literal_eval(line) for line in lines if line.startswith("[")]
    named = [line for line in lines if not line.startswith("[")]
    assert [line.partition(":")[0] for line in named] == list(titles)
    assert len(rows) == n_rows * len(titles)
    assert all(seconds >= 0 and 0 < own <= peak < 24 for _, seconds, own, peak in rows)
    assert not list(tmp_path.iterdir()), "what was written is deleted"
