"""`sae-ray humans`: asks people which neurons are monosemantic, and compares scores with their answers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sae_ray.concepts.agreeing import AGREEMENT, Agreement, Pairs, agreement, wilson
from sae_ray.concepts.benchmark import read_benchmark
from sae_ray.concepts.judging import choose_pairs
from sae_ray.concepts.raters import krippendorff_alpha, merged, read_answers, same_answers, votes_of
from sae_ray.errors import SaeRayError, UsageError, check
from sae_ray.report.rating import PAGE, PAIRS, SIDE, STAGE, ratable, rating_step, write_rating
from sae_ray.report.wording import share
from sae_ray.scores.tables import ScoreTables
from sae_ray.store.files import Folder, parent_and_name
from sae_ray.store.steps import Step, digest, hold, read_record
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ScorePlan
from sae_ray.text_table import number, table_lines

from .options import chosen_sae
from .progress import Progress, say

MOST_PAIRS = 5000


def make_page(plan: StudyPlan, sae: str | None = None, n_pairs: int = 200) -> Folder:
    """The folder of the page on which people compare neurons of an SAE; makes it unless it is there.

    Raises:
        UsageError: there is no such SAE, the number of pairs is out of range, or the study keeps too few top images.
        SaeRayError: the SAE is not scored, or too few of its neurons have enough top images.
    """
    plan.check_has_images("humans make")
    check(1 <= n_pairs <= MOST_PAIRS, "--pairs", n_pairs, f"choose a number from 1 to {MOST_PAIRS:,}")
    score, _ = plan.passes(chosen_sae(plan, sae))
    kept = plan.study.scoring.top_images
    check(
        kept >= SIDE**2, "scoring.top_images", kept, f"people compare {SIDE**2} images per neuron; keep at least these"
    )
    score.check_scored()

    step = rating_step(plan, score, n_pairs)
    if not step.finished:
        with hold([step]):
            _make(plan, score, step, n_pairs)
    return step.folder / PAGE


def _make(plan: StudyPlan, score: ScorePlan, step: Step, n_pairs: int) -> None:
    started = time.monotonic()
    tables = ScoreTables(score.step.folder)
    eligible = ratable(tables)
    if eligible.sum() < 2:
        raise SaeRayError(
            f"{score.name} has {eligible.sum()} neurons with an MS and {SIDE**2} top images among the held-out images, "
            "and a pair needs two; choose another --sae, or score more images"
        )
    pairs = choose_pairs(tables.scores.ms, eligible, n_pairs, step.config["seed"])
    if len(pairs) < n_pairs:
        say(f"{eligible.sum()} neurons make no more than {len(pairs)} pairs")
    neurons = len(set(pairs.ravel().tolist()))
    with Progress(step.label, neurons, "neurons", steps=[step]) as progress:
        n_missing = write_rating(plan, score, step, pairs, progress.advance)
    if n_missing:
        say(f"{n_missing:,} images can no longer be read; they are grey on the page")
    step.finish(time.monotonic() - started, {"pairs": len(pairs), "neurons": neurons, "missing": n_missing})


class Judged(NamedTuple):
    """Pairs of neurons that people have judged, with a score of these neurons."""

    of: str
    """What the neurons are from: the cell, or `benchmark`."""
    pairs: Pairs
    score: Any
    """As `agreement` takes it."""
    is_ms: bool
    raters: dict[str, Any]
    """What is known about the raters."""


def compare(files: Sequence[str], root: str | None, score: str | None) -> dict[str, Any]:
    """How often a score and people agree. With a root, also writes it there, as a step of its own.

    Args:
        files: the CSV files that raters of one page downloaded, or the folder of the released benchmark.
        root: of the study whose page was rated; the benchmark needs none.
        score: a column of `scores.parquet`, by default `ms`; for the benchmark a judge, by default `dino`; or
            `FILE:COLUMN` of a parquet table with one row per neuron.

    Raises:
        UsageError: a folder is given beside other files, the root is missing, or there is no such score.
        SaeRayError: a file cannot be read, is about another study, or does not fit the others.
    """
    started = time.monotonic()
    if any(Path(file).is_dir() for file in files):
        check(len(files) == 1, "FILES", " ".join(files), "give the folder of the benchmark alone")
        name = score or "dino"
        judged = _benchmark(files[0], name)
    else:
        check(root is not None, "--root", root, "give the root of the study whose page was rated")
        name = score or "ms"
        judged = _rated(files, Folder(str(root)), name)

    found = agreement(judged.pairs, judged.score, bins="paper" if judged.is_ms else "quantiles")
    n_pairs = found.n_pairs.sum()
    low, high = (one.item() for one in wilson(np.array([found.pooled]), np.array([n_pairs])))
    counts = {
        "headline": found.headline,
        "pooled": found.pooled,
        "low": low,
        "high": high,
        "pairs": int(n_pairs),
        "divided": int((judged.pairs.choice == 0.5).sum()),
        "unscored": found.n_unscored,
        **judged.raters,
    }
    result = {"of": judged.of, "score": name, **_json(counts), "bins": _rows(found), "file": None}
    if root is not None:
        inputs = digest([*(column.tolist() for column in judged.pairs), found.table().to_pylist(), judged.raters])
        config = {"of": judged.of, "score": name, "inputs": inputs}
        step = Step(Folder(root), "agreement", f"agreement-{judged.of}", config)
        if not step.finished:
            step.folder.write_parquet(AGREEMENT, found.table())
            step.finish(time.monotonic() - started, counts)
        result["file"] = str(step.folder / AGREEMENT)
    return result


def _benchmark(folder: str, score: str) -> Judged:
    benchmark = read_benchmark(folder)
    is_ms = score in benchmark.ms
    known = f"{', '.join(benchmark.ms)} or FILE:COLUMN"
    values = benchmark.ms[score] if is_ms else _column(score, known)
    return Judged("benchmark", benchmark.pairs, values, is_ms, {"chosen_named_by": benchmark.code})


def _rated(files: Sequence[str], root: Folder, score: str) -> Judged:
    answers = read_answers(files)
    page = answers[0].page
    if not page.startswith(f"{STAGE}-") or page not in root.folders():
        raise SaeRayError(
            f"{answers[0].where} is about the page {page!r}, which {root} does not have; "
            "give the --root of the study whose page was rated"
        )
    step = root / page
    scores = ScoreTables(root / read_record(step)["config"]["scores"]).scores
    table = step.read_parquet(PAIRS)
    first, second = (table[name].to_numpy() for name in ("first", "second"))
    raters, votes = votes_of(answers, first, second)
    choice = merged(votes)
    answered = ~np.isnan(choice)
    same, n_same = same_answers(votes)

    columns = [name for name in scores._fields if name != "neuron"]
    values = getattr(scores, score) if score in columns else _column(score, f"{', '.join(columns)} or FILE:COLUMN")
    facts = {
        "raters": raters,
        "unanswered": int((~answered).sum()),
        "same_answers": same,
        "answers_compared": n_same,
        "alpha": krippendorff_alpha(votes),
    }
    of = page.removeprefix(f"{STAGE}-").rpartition("-")[0]
    return Judged(of, Pairs(first[answered], second[answered], choice[answered]), values, score == "ms", facts)


def _column(score: str, known: str) -> dict[int, float]:
    """Neuron -> its value in a column of a table, given as `FILE:COLUMN`."""
    file, _, column = score.rpartition(":")
    check(file.endswith(".parquet"), "--score", score, f"choose {known} of a parquet table")
    folder, name = parent_and_name(file)
    try:
        table = folder.read_parquet(name)
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"--score {score}: {file} cannot be read ({str(error).splitlines()[0]})") from error
    key = next((one for one in ("neuron", "latent") if one in table.column_names), None)
    numeric = [one.name for one in table.schema if pa.types.is_integer(one.type) or pa.types.is_floating(one.type)]
    check(
        key is not None, "--score", score, f"the table has no column 'neuron' (it has {', '.join(table.column_names)})"
    )
    check(column in numeric, "--score", score, f"choose one of the columns {', '.join(numeric)}")
    neurons = table[key].to_pylist()
    check(len(set(neurons)) == len(neurons), "--score", score, "the table has several rows for a neuron; keep one each")
    values = table[column].cast(pa.float64()).fill_null(float("nan")).to_pylist()
    return dict(zip(neurons, values, strict=True))


def _rows(found: Agreement) -> list[dict[str, Any]]:
    """The bins in order; None stands for no value and no end."""
    ends = [*found.edge[1:].tolist(), None]
    columns = [found.n_pairs, found.rate, found.low, found.high, found.cumulative]
    names = ("from", "to", "pairs", "rate", "low", "high", "this_and_above")
    rows = zip(found.edge.tolist(), ends, *(column.tolist() for column in columns), strict=True)
    return [_json(dict(zip(names, row, strict=True))) for row in rows]


def _json(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: None if isinstance(one, float) and math.isnan(one) else one for name, one in values.items()}


def lines(result: dict[str, Any]) -> list[str]:
    """The agreement as a table and some sentences."""
    bins = [["difference", "pairs", "agree", "95 % interval", "this and above"]]
    for row in result["bins"]:
        end = f"– {row['to']:.3g}" if row["to"] is not None else "and more"
        shares = [share(row["rate"]), _interval(row), share(row["this_and_above"])]
        bins.append([f"{row['from']:.3g} {end}", f"{row['pairs']:,}", *shares])
    found = [
        f"Agreement of people and {result['score']}, {result['of']}",
        "",
        *table_lines(bins, "<>>>>"),
        "",
        f"{share(result['headline'])}  mean of the bins that have pairs",
        f"{share(result['pooled'])}  all {result['pairs']:,} pairs, interval {_interval(result)}",
    ]
    return [*found, "", *_notes(result), *([f"Written to {result['file']}"] if result["file"] else [])]


def _interval(row: dict[str, Any]) -> str:
    return "–" if row["low"] is None else f"{row['low']:.1%} – {row['high']:.1%}"


def _notes(result: dict[str, Any]) -> Iterator[str]:
    if "raters" in result:
        yield f"Raters: {', '.join(result['raters'])}."
        if result["answers_compared"]:
            alpha = f"Krippendorff's alpha is {number(result['alpha'], 2)}"
            yield f"Two raters gave the same answer in {share(result['same_answers'])} of cases; {alpha}."
        if result["unanswered"]:
            yield f"{result['unanswered']:,} pairs have no answer yet."
    else:
        yield f"R_user names the chosen neuron by {result['chosen_named_by']}."
    if result["divided"]:
        yield f"{result['divided']:,} pairs count half, since people are divided."
    if result["unscored"]:
        yield f"{result['unscored']:,} pairs are left out, since a neuron has no {result['score']}."
