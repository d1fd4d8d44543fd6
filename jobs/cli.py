"""The command line: `sae-ray`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from sae_ray.errors import SaeRayError

from .options import open_plan, remember, study_options


class Command(click.Command):
    """Shows what a user can mend as one message with its exit code; anything else keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SaeRayError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted. What is finished stays; the same command goes on from there.", err=True)
            ctx.exit(130)


class Group(click.Group):
    """The commands, each of which also runs on its own: `python -m jobs.extract`."""

    command_class = Command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-ray")
def main() -> None:
    """Sparse autoencoders for vision-language models: from a folder of images to a scored grid of SAEs."""


def _json_option(command: Callable) -> Callable:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")(command)


@main.command()
@study_options
@click.option("--dry-run", is_flag=True, help="Print the steps, their rows, bytes and work; do nothing.")
@_json_option
def run(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Run a whole study. What is finished is not done again."""
    from . import status, study

    plan = open_plan(**options)
    if dry_run:
        report = status.dry_run(plan)
        click.echo(json.dumps(report, indent=1) if as_json else "\n".join(status.dry_run_lines(report)))
        return
    remember(plan)
    summary = study.run(plan)
    click.echo(json.dumps(summary, indent=1) if as_json else study.summary_text(plan, summary))
    if summary["failed"]:
        sys.exit(1)


@main.command()
@study_options
def extract(**options: Any) -> None:
    """Extract activations, and the judge's embeddings, of all images of a study."""
    from . import extract as stage

    plan = open_plan(**options)
    remember(plan)
    stage.run(plan)
    for one in plan.extracts:
        click.echo(one.step.folder)


@main.command()
@study_options
def train(**options: Any) -> None:
    """Train the SAEs of a study on activations that are there."""
    from . import train as stage

    plan = open_plan(**options)
    remember(plan)
    stage.run(plan)
    for one in plan.trains:
        click.echo(one.step.folder)
    if any(one.step.failure for one in plan.trains):
        sys.exit(1)


@main.command()
@study_options
def score(**options: Any) -> None:
    """Score the SAEs of a study, and the raw neurons, and print the summary."""
    from . import score as stage
    from . import study

    plan = open_plan(**options)
    remember(plan)
    stage.run(plan)
    click.echo(study.summary_text(plan, study.write_summary(plan)))


@main.command()
@study_options
@_json_option
def status(as_json: bool, **options: Any) -> None:
    """Show every step of a study: done, running, partial or missing, with rows, bytes and time."""
    from . import status as report

    entries = report.status(open_plan(**options))
    click.echo(json.dumps(entries, indent=1) if as_json else "\n".join(report.status_lines(entries)))


@main.command()
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--train", "n_train", default=20_000, show_default=True, help="Training images.")
@click.option("--heldout", "n_heldout", default=4_000, show_default=True, help="Held-out images.")
def world(folder: str, n_train: int, n_heldout: int) -> None:
    """Write the embedded world into FOLDER: images, a CLIP, a judge and a LLaVA, all in ordinary formats."""
    from sae_ray.world import write_world

    from .progress import Progress

    total = n_train + n_heldout
    with Progress(f"world in {folder}", total, "images") as progress:

        def show(written: int, missing: int) -> None:
            progress.advance(total - missing + written - progress.done)

        write_world(folder, n_train=n_train, n_heldout=n_heldout, progress=show)


if __name__ == "__main__":
    main()
