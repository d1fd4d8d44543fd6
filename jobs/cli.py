"""The command line: `sae-ray`."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from sae_ray.errors import SaeRayError, UsageError

from .options import open_plan, plan_to_work_on, study_options

_GARBAGE = (100_000, 50, 100)
"""Thresholds of the garbage collector. With Python's own, a fifth of a short command goes into looking through what its
imports made, which stays."""

DEMO = "demo"
DEMO_ROOT = "runs/demo"


class Command(click.Command):
    """Shows an error that a user can fix as one message with its exit code; anything else keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        gc.set_threshold(*_GARBAGE)
        try:
            return super().invoke(ctx)
        except SaeRayError as error:
            from sae_ray.store.files import without_keys

            click.echo(f"Error: {without_keys(str(error))}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted. Finished work is kept; run the same command to resume.", err=True)
            ctx.exit(130)


SECTIONS = {
    "Begin": ("demo", "new", "studies", "doctor", "world"),
    "Studies": ("run", "submit", "status", "watch", "report", "import"),
    "Single stages": ("extract", "train", "evaluate", "score", "concepts", "pictures", "steering", "naming"),
    "Latents and language models": ("find", "ask", "edit", "serve", "humans"),
    "Sharing": ("export", "push"),
}


class Group(click.Group):
    """The commands, each of which also runs on its own: `python -m jobs.extract`."""

    command_class = Command


class Main(Group):
    """All of them, by what they are for."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(150)) for name in names])


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-ray")
def main() -> None:
    """Sparse autoencoders for vision-language models: from a folder of images to a scored grid of SAEs."""


def _json_option(command: Callable) -> Callable:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")(command)


def _sae_option(command: Callable) -> Callable:
    explained = "The SAE, named as in the summary. Default: the one used for steering, or the only one."
    return click.option("--sae", metavar="CELL", help=explained)(command)


@main.command()
@study_options
@click.option("--dry-run", is_flag=True, help="Print the steps, their rows, bytes and work; do nothing.")
@_json_option
def run(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Run a whole study. Finished steps are not repeated."""
    from . import status

    if dry_run:
        report = status.dry_run(open_plan(list_again=True, **options))
        click.echo(json.dumps(report, indent=1) if as_json else "\n".join(status.dry_run_lines(report)))
        return
    plan = plan_to_work_on(list_again=True, describe_again=True, **options)
    from . import study

    summary = study.run(plan)
    click.echo(json.dumps(summary, indent=1) if as_json else study.summary_text(plan, summary))
    if summary["failed"]:
        sys.exit(1)


@main.command()
@click.option("--root", default=DEMO_ROOT, show_default=True, metavar="DIR", help="Where results are written.")
@click.pass_context
def demo(context: click.Context, root: str) -> None:
    """Run the embedded study: no checkout, no images and no models are needed. Prints where the report is.

    Its images and models are written to ~/.cache/sae-ray/world.
    """
    context.invoke(world, folder=os.path.expanduser("~/.cache/sae-ray/world"))
    from sae_ray.study.shipped import shipped_studies

    # By its file: a file called demo in this folder would hide the name.
    context.invoke(run, study=str(shipped_studies()[DEMO]), root=root)


@main.command()
def studies() -> None:
    """List the studies that sae-ray ships. `sae-ray run NAME` runs one; copy its file to change it."""
    from sae_ray.study.shipped import purpose, shipped_studies

    for name, file in shipped_studies().items():
        click.echo(f"{name}: {purpose(file)}\n  {file}")


@main.command()
@click.argument("file", type=click.Path())
@click.option("--images", metavar="DIR", help="The images: a folder or a URI.")
@click.option("--encoder", metavar="DIR_OR_ID", help="The model to interpret, as encoder.model.")
@click.option("--revision", help="Commit, tag or branch of a model on the hub.")
def new(file: str, images: str | None, encoder: str | None, revision: str | None) -> None:
    """Write a study for your images and a model to FILE, with comments on what can be chosen.

    The model is asked which sites it has. What is not given is asked for.
    """
    from sae_ray.study.draft import new_file, write_draft

    new_file(file)  # nothing is asked in vain
    images, encoder = images or click.prompt("Folder of images"), encoder or click.prompt("Model")
    write_draft(file, images, encoder, revision)
    click.echo(f"{file}: look at its comments, then\n  sae-ray run {file} --dry-run\n  sae-ray run {file}")


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Look at whether this machine has what sae-ray needs, and say what to do where it does not.

    Exits with 1 if something is missing that nothing works without.
    """
    from .doctor import findings, lines

    found = findings()
    report = {name: one._asdict() for name, one in found.items()}
    click.echo(json.dumps(report, indent=1) if as_json else "\n".join(lines(found)))
    if any(one.state == "missing" for one in found.values()):
        sys.exit(1)


@main.command()
@study_options
@click.option(
    "--address",
    metavar="URL",
    envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
    show_envvar=True,
    help="The dashboard of the cluster, such as http://HOST:8265.",
)
@click.option("--detach", is_flag=True, help="Print the id of the job and do not follow it.")
def submit(address: str | None, detach: bool, **options: Any) -> None:
    """Run a whole study on a running Ray cluster and follow it.

    The study runs on even if this command is interrupted or loses its connection. Submit again to follow it, or to
    resume it once it has ended. A --root is needed: an absolute path that all nodes share, or a URI such as
    s3://bucket/folder. `sae-ray status --root` shows from anywhere how far it is.
    """
    from . import submit as job

    job.submit(address, detach, **options)


@main.command("import")
@click.argument("file", type=click.Path(exists=True))
@click.option("--site", required=True, metavar="NAME", help="What the study calls these activations in grid.sites.")
@click.option("--root", required=True, metavar="DIR", help="Where they are written: a directory or a URI.")
@click.option("--heldout", metavar="FILE", help="Held-out activations. Default: a tenth of the images of FILE.")
@click.option("--column", metavar="NAME", help="The column of a table, or the tensor of a .safetensors file.")
@click.option(
    "--image-table",
    "images",
    metavar="FILE",
    help="A .csv or .parquet file with a row per row of FILE and the columns image_id, label or both. Rows with the "
    "same image_id are tokens of one image.",
)
@click.option("--heldout-image-table", "heldout_images", metavar="FILE", help="The same for the held-out activations.")
@click.option(
    "--judge",
    metavar="FILE",
    help="Another encoder's embeddings, one row per held-out image (per image without --heldout): MonoSemanticity is "
    "scored with them.",
)
def import_(file: str, root: str, site: str, **options: Any) -> None:
    """Put activations from elsewhere into a root.

    FILE is a .npy, .parquet or .safetensors file, a folder of parquet files, or a Hugging Face dataset that was saved
    to disk. A study without [images] and [encoder] trains on them: `sae-ray run STUDY --root DIR`.
    """
    from sae_ray.study import import_activations

    imported = import_activations(root, site, file, **options)
    images, found = imported.images, imported.sites[site]
    click.echo(
        f"{site}: {images['train'].n_images:,} training and {images['heldout'].n_images:,} held-out images, "
        f'{found.rows_per_image} row(s) each, {found.width} wide; train on them with sites = ["{site}"]'
    )


@main.command()
@study_options
def extract(**options: Any) -> None:
    """Extract the activations and the judge's embeddings of all images of a study."""
    from sae_ray.study.models import check_models, models_needed

    from . import extract as stage

    plan = plan_to_work_on(list_again=True, describe_again=True, **options)
    check_models(models_needed(plan.extracts))
    stage.run(plan)
    for one in plan.extracts:
        click.echo(one.step.folder)


@main.command()
@study_options
def train(**options: Any) -> None:
    """Train the SAEs of a study on its extracted activations."""
    from . import train as stage

    plan = plan_to_work_on(**options)
    stage.run(plan)
    for one in plan.trains:
        click.echo(one.step.folder)
    if any(one.step.failure for one in plan.trains):
        sys.exit(1)


@main.command()
@study_options
def evaluate(**options: Any) -> None:
    """Measure the trained SAEs of a study on held-out activations: fidelity, and how each latent fires."""
    from . import evaluate as stage

    plan = plan_to_work_on(**options)
    stage.run(plan)
    for one in plan.evaluations:
        click.echo(one.step.folder)


@main.command()
@study_options
def score(**options: Any) -> None:
    """Score the SAEs of a study and the raw neurons, and print the summary."""
    from . import score as stage
    from . import study

    plan = plan_to_work_on(**options)
    stage.run(plan)
    click.echo(study.summary_text(plan, study.write_summary(plan)))


@main.command()
@study_options
@_json_option
def concepts(as_json: bool, **options: Any) -> None:
    """Measure what the neurons of a study mean, and print which SAE is best by which measure.

    A study without [concepts] is measured as if it had an empty one.
    """
    from sae_ray.study.models import check_models, models_needed
    from sae_ray.study.root import remember

    from . import concepts as stage
    from . import extract

    plan = open_plan(**options)
    if plan.study.concepts is None:
        options["settings"] += ("concepts={}",)
        plan = open_plan(**options)
    space = [] if plan.naming_space is None else [plan.naming_space]
    check_models(models_needed(space, plan.concepts))
    stage.check(plan)
    remember(plan)  # not before: a root that remembers a file which cannot be read would refuse the next command, too
    extract.run_only(plan, space)
    stage.run(plan)
    if as_json:
        click.echo(json.dumps({one.name: one.counts for one in stage.cells(plan)}, indent=1))
    else:
        click.echo("\n".join(stage.lines(plan)))


@main.command()
@study_options
def steering(**options: Any) -> None:
    """Measure how well the SAEs of a study steer its LLaVA, and print the rates."""
    from sae_ray.study.models import check_models, models_needed

    from . import steering as stage
    from . import study

    plan = plan_to_work_on(**options)
    check_models(models_needed((), steerings=plan.steerings))
    stage.run(plan)
    click.echo(study.summary_text(plan, study.write_summary(plan)))


@main.command()
@study_options
def naming(**options: Any) -> None:
    """Let the LLaVA of a study name the latents of its SAEs, and print how well the names hold."""
    from sae_ray.study.models import check_models, models_needed

    from . import naming as stage
    from . import study

    plan = plan_to_work_on(**options)
    if plan.study.naming is None:
        raise UsageError("the study has no [naming]; add it, or use --set 'naming={}'")
    check_models(models_needed((), namings=plan.namings))
    stage.run(plan)
    click.echo(study.summary_text(plan, study.write_summary(plan)))


@main.command()
@study_options
def pictures(**options: Any) -> None:
    """Make the thumbnails and heat maps that the report of a study shows."""
    from . import pictures as stage

    plan = plan_to_work_on(**options)
    stage.run(plan)
    click.echo(plan.pictures.step.folder)


@main.command()
@click.argument("text")
@study_options
@_sae_option
@click.option("-n", "n", type=click.IntRange(min=1), default=10, show_default=True, help="Latents to show.")
@_json_option
def find(text: str, sae: str | None, n: int, as_json: bool, **options: Any) -> None:
    """Find the latents whose top images best match TEXT, such as "star"."""
    from .find import found, found_lines

    plan = open_plan(**options)
    rows = found(plan, text, sae)[:n]
    click.echo(json.dumps(rows, indent=1) if as_json else "\n".join(found_lines(rows)))


@main.group(cls=Group)
def humans() -> None:
    """Ask people which neurons are monosemantic, and compare scores with their answers."""


@humans.command("make")
@study_options
@_sae_option
@click.option("--pairs", "n_pairs", default=200, show_default=True, help="Pairs of neurons to compare.")
def humans_make(sae: str | None, n_pairs: int, **options: Any) -> None:
    """Make a page on which people compare pairs of neurons, and print its path.

    The page is a folder of static files: open its index.html, put it on any web server, or send it. Raters see the 16
    top images of both neurons and no scores. At the end they download a CSV file for `sae-ray humans score`.
    """
    from .humans import make_page

    click.echo(make_page(open_plan(**options), sae, n_pairs) / "index.html")


@humans.command("score")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("--root", metavar="DIR", help="The root of the study whose page was rated.")
@click.option(
    "--score",
    metavar="NAME",
    help="A column of the study's scores, such as ms (default) or frequency; dino (default) or clip for the benchmark; "
    "or FILE:COLUMN of any parquet table with one row per neuron.",
)
@_json_option
def humans_score(files: tuple[str, ...], root: str | None, score: str | None, as_json: bool) -> None:
    """Compare a score with the answers of people, and print how often they agree.

    FILES are the CSV files that the raters of one page downloaded. Where they disagree, the majority counts. Instead,
    FILES may be the folder of the benchmark of arXiv 2504.02821.
    """
    from .humans import compare, lines

    result = compare(files, root, score)
    click.echo(json.dumps(result, indent=1) if as_json else "\n".join(lines(result)))


@main.command()
@study_options
@_json_option
def status(as_json: bool, **options: Any) -> None:
    """Show every step of a study: done, running, partial or missing, with rows, size and time."""
    from . import status as report

    entries = report.status(open_plan(**options))
    click.echo(json.dumps(entries, indent=1) if as_json else "\n".join(report.status_lines(entries)))


@main.command()
@click.option("--root", required=True, metavar="DIR", help="The root of the study: a directory or a URI.")
def watch(root: str) -> None:
    """Show a study while it runs, until it is finished: every step at work, and of training loss, L0 and dead latents.

    It reads files only, so it works from any machine that can read the root. Ctrl-C ends the display, not the study.
    """
    from . import watch as display

    display.watch(root)


@main.command()
@study_options
@click.option("--serve", is_flag=True, help="Then serve it to a browser, for reports on remote machines.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="For --serve; 8600 by default. Only this machine reaches it."
)
def report(serve: bool, port: int | None, **options: Any) -> None:
    """Make the HTML report of a study's finished steps and print its path."""
    if port is not None and not serve:
        raise UsageError("--port is for a report that is served; add --serve, or leave it out")
    from contextlib import nullcontext

    from sae_ray.report import REPORT
    from sae_ray.report.server import PORT, report_server, serve_until_interrupted

    from . import study

    plan = open_plan(**options)
    # A port that is taken is found before the report is made.
    with report_server(plan.root / REPORT, PORT if port is None else port) if serve else nullcontext() as server:
        click.echo(study.make_report(plan) / "index.html")
        if server is not None:
            serve_until_interrupted(server, click.echo)


@main.command()
@click.argument("image")
@click.argument("prompt", required=False)
@click.option(
    "--llava",
    required=True,
    metavar="DIR_OR_ID",
    help="The LLaVA: a directory (a path or a URI) or a model id on the hub.",
)
@click.option("--sae", metavar="DIR", help="The SAE's directory. It must be trained on the layer that the LLaVA reads.")
@click.option("--edit", metavar="PATCH", help="Edit the LLaVA by a patch of `sae-ray edit make`; no latent is needed.")
@click.option(
    "--latent",
    "latents",
    multiple=True,
    metavar="LATENT[=STRENGTH]",
    help="39=40, or 39=4x for 4 times the largest value of latent 39 on a token; 39 alone with --sweep or "
    "--mode ablate. May be repeated.",
)
@click.option("--mode", help="Edit: set (default), add, scale, ablate or balanced.")
@click.option("--error", help="Drop (default) or keep the part that the SAE does not reconstruct.")
@click.option("--isolate", is_flag=True, help="Zero all other latents.")
@click.option(
    "--token", "tokens", multiple=True, type=int, metavar="N", help="Edit this token, not all. May be repeated."
)
@click.option(
    "--region",
    "regions",
    multiple=True,
    metavar="L,T,R,B",
    help="Edit only this rectangle: left, top, right and bottom in fractions of the image. May be repeated.",
)
@click.option("--mask", metavar="FILE", help="Edit only where this image is white.")
@click.option(
    "--when",
    metavar="LATENT[>STRENGTH]",
    help='Edit only tokens on which this latent fires, or is stronger than this, as in "7>0.5x".',
)
@click.option("--intervention", "file", metavar="FILE", help="JSON file with these settings instead; it may mix modes.")
@click.option("--sweep", metavar="STRENGTHS", help='Several strengths, as in "0x,1x,2x,4x"; one answer for each.')
@click.option("--max-new-tokens", type=int, help="Length of the answers in tokens; 32 by default.")
@click.option("--device", default="cpu", show_default=True, help="A torch device.")
@click.option("--dtype", default="float32", show_default=True, help="Dtype of the LLaVA.")
@_json_option
def ask(
    as_json: bool,
    image: str,
    prompt: str | None,
    llava: str,
    sae: str | None,
    edit: str | None,
    max_new_tokens: int | None,
    device: str,
    dtype: str,
    sweep: str | None,
    **options: Any,
) -> None:
    """Ask a LLaVA about IMAGE (a file, or the word white) with and without edited latents or weights, and print all
    answers.

    PROMPT is the question; by default it asks what is shown, in one word.
    """
    from sae_ray.steering.config import MAX_NEW_TOKENS, ONE_WORD

    from .ask import interventions_asked, lines, steered_answers

    asked = interventions_asked(sweep=sweep, is_edited=edit is not None, **options)
    length = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    models = {"sae": sae, "edit": edit, "device": device, "dtype": dtype}
    result = steered_answers(image, prompt or ONE_WORD, llava, asked=asked, max_new_tokens=length, **models)
    click.echo(json.dumps(result, indent=1) if as_json else "\n".join(lines(result, sweep)))


@main.group(cls=Group)
def edit() -> None:
    """Remove a latent from a model's weights by a patch that can be undone."""


@edit.command("make")
@click.option(
    "--model", required=True, metavar="DIR_OR_ID", help="A LLaVA, CLIP, SigLIP or DINOv2 in the transformers format."
)
@click.option("--revision", help="Commit, tag or branch of a model on the hub.")
@click.option("--sae", required=True, metavar="DIR", help="The SAE's directory.")
@click.option("--latent", required=True, type=int, metavar="N", help="The latent to remove.")
@click.option("--mode", default="project", show_default=True, help="How: project, rows or vectors.")
@click.option(
    "--scope", help="Where: reader (default for a LLaVA), writers (default with --layer), mlp or projection (default)."
)
@click.option("--layer", type=int, metavar="N", help="The block that the SAE was trained at; by default the LLaVA's.")
@click.option("--keep", default="origin", show_default=True, help="What stays along the direction: origin (0) or mean.")
@click.option("--share", default=0.9, show_default=True, help="rows: how much of the direction's norm² is set to 0.")
@click.option("--kappa", type=float, help="vectors: how similar to the latent a value vector must be, from 0 to 1.")
@click.option("--value", type=float, help="vectors: what the latent is set to; 0 ablates, negative values push away.")
@click.option("--out", required=True, metavar="PATCH", help="The file to write, such as star.safetensors.")
def edit_make(sae: str, model: str, latent: int, out: str, **settings: Any) -> None:
    """Write a patch that removes one latent from a model's weights. The model's files stay as they are.

    The mode project leaves nothing along the latent's decoder direction. The scope says what is changed: reader, what a
    LLaVA's projector reads; writers, everything that writes into the residual stream up to the block; mlp, one MLP;
    projection, a CLIP's image embedding.
    """
    from .editing import make

    patch = make(model, sae, latent, out, **settings)
    click.echo(f"{out}: {patch.facts.mode}, {patch.facts.scope}, {len(patch.changes)} tensors of {patch.facts.model}")


@edit.command("apply")
@click.argument("patch")
@click.option("--model", metavar="DIR_OR_ID", help="The model; by default the one that the patch names.")
@click.option("--out", required=True, metavar="DIR", help="The directory to write.")
def edit_apply(patch: str, model: str | None, out: str) -> None:
    """Write a copy of the model with PATCH applied, which every program can load."""
    from sae_ray.editing import edited_copy, load_patch

    click.echo(edited_copy(patch, model or load_patch(patch).facts.model, out))


@edit.command("undo")
@click.argument("directory")
def edit_undo(directory: str) -> None:
    """Restore the edited copy in DIRECTORY to the exact bytes of the model that it was made from."""
    from sae_ray.editing import undo

    undo(directory)


@edit.command("evaluate")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@click.option("--root", required=True, metavar="DIR", help="The root of the study that the SAE is of.")
@click.option(
    "--prompt", "prompts", multiple=True, help="Ask this instead of the study's other prompts. May be repeated."
)
@click.option("--device", default="cpu", show_default=True, help="A torch device.")
@click.option("--out", default="edit.parquet", show_default=True, metavar="FILE", help="The table to write.")
@_json_option
def edit_evaluate(
    patches: tuple[str, ...], root: str, prompts: tuple[str, ...], device: str, out: str, as_json: bool
) -> None:
    """Measure what each PATCH does to the latent, to other latents and to answers about held-out images."""
    from sae_ray.study.root import recalled_plan

    from .editing import evaluate, lines, write

    rows = evaluate(recalled_plan(root), patches, prompts, device)
    write(rows, out)
    click.echo(json.dumps(rows, indent=1) if as_json else "\n".join(lines(rows)))


@main.command()
@click.argument("sae")
@click.option(
    "--to",
    required=True,
    type=click.Choice(["saelens", "dictionary_learning", "sparsify", "overcomplete", "neuronpedia"]),
    help="Who is to open it.",
)
@click.option("--out", required=True, metavar="DIR", help="A new folder, or its URI.")
@click.option("--centred", is_flag=True, help="For overcomplete: write the SAE of activations less its b_dec.")
def export(sae: str, to: str, out: str, centred: bool) -> None:
    """Write SAE as another library opens it, and print the folder.

    Codes and reconstructions stay the same; an SAE that the other form cannot express is refused. For neuronpedia, its
    latents are written instead, with top images, histograms and names; SAE is then a folder in the root of a study.
    """
    from .sharing import export as export_to

    click.echo(export_to(sae, to, out, centred))


@main.command()
@click.argument("sae")
@click.argument("repository")
@click.option("--folder", metavar="NAME", help="Its folder there. Default: its name in the study, or the top.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--license", metavar="ID", help="The licence of the SAE, for the card: an id of the hub, as apache-2.0.")
def push(sae: str, repository: str, folder: str | None, private: bool, license: str | None) -> None:
    """Upload SAE to REPOSITORY (owner/name) on the Hugging Face hub, and print the address of the commit.

    A repository may hold many SAEs. Its model card tells what the study of each has measured, and how to load it here
    and in SAELens. Log in with `hf auth login` before.
    """
    from sae_ray.sae import load_sae

    click.echo(load_sae(sae).push_to_hub(repository, folder, private=private or None, license=license))


@main.command()
@click.option("--root", metavar="DIR", help="The study whose SAEs steer: its directory or URI.")
@click.option(
    "--demo",
    "of_demo",
    is_flag=True,
    help="Serve the demo's LLaVA and SAE from --root, by default runs/demo, and run the demo first if it is not there.",
)
@click.option("--llava", metavar="DIR_OR_ID", help="The LLaVA; the study's by default.")
@click.option("--sae", "saes", multiple=True, metavar="CELL", help="Only this SAE of the study. May be repeated.")
@click.option("--edit", metavar="PATCH", help="Serve the LLaVA with its weights edited by a patch of `sae-ray edit`.")
@click.option(
    "--engine", type=click.Choice(["transformers", "vllm"]), help="What generates answers; transformers by default."
)
@click.option("--device", help="A torch device; cpu by default.")
@click.option("--dtype", help="Dtype of the LLaVA; float32 by default.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Addresses that other machines can reach need an API key."
)
@click.option("--port", default=8000, show_default=True)
@click.option("--config", metavar="FILE", help="YAML file with any argument of the application; options override it.")
@click.pass_context
def serve(
    context: click.Context, of_demo: bool, host: str, port: int, config: str | None, engine: str | None, **options: Any
) -> None:
    """Serve the steered LLaVA of a study: an OpenAI-compatible API, and a playground to open in a browser.

    If the environment variable SAE_RAY_API_KEY is set, clients must send its value as their API key.
    """
    from sae_ray.serve.local import read_config, run  # pyright: ignore[reportMissingImports]  # see pyproject.toml

    from sae_ray.store.files import Folder, address_shown
    from sae_ray.study.root import recall

    from .cluster import connect

    if of_demo:
        options["root"] = options["root"] or DEMO_ROOT
        memory = recall(Folder(options["root"]))
        if memory is not None and memory.study.name != DEMO:
            raise UsageError(
                f"--root {address_shown(options['root'])} holds the study {memory.study.name}, which is not the demo; "
                "leave out --demo to serve it, or name another root"
            )
        if not Folder(options["root"]).exists("report/index.html"):
            context.invoke(demo, root=options["root"])
    run(read_config(config, engine, options), host, port, connect, click.echo)


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
