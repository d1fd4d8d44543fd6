"""How the command line names a study: its file, the options that override it, and its root."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from sae_ray.study.config import Study
    from sae_ray.study.plan import StudyPlan
    from sae_ray.study.root import Memory

SHORTHANDS = {
    "--images": "images.train.path",
    "--labels": "images.train.labels",
    "--heldout": "images.heldout.path",
    "--encoder": "encoder.model",
    "--judge": "judge.model",
    "--judge-point": "judge.point",
    "--site": "grid.sites",
    "--architecture": "grid.architectures",
    "--expansion": "grid.expansions",
    "--k": "grid.k",
    "--steps": "training.steps",
    "--track": "resources.train.trackers",
}
LISTS = {"--site", "--architecture", "--expansion", "--k", "--track"}
NUMBERS = {"--expansion", "--k", "--steps"}


class FieldOption(click.Option):
    """An option that sets a field of the study; its help is the field's docstring, which is read when it is shown."""

    def __init__(self, *names: Any, field: str, **settings: Any):
        super().__init__(*names, **settings)
        self.field = field

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from sae_ray.study.fields import field_help

        self.help = f"{self.field}: {field_help(self.field)}"
        return super().get_help_record(ctx)


class StudyFile(click.Path):
    """A study file, or the name of a study that sae-ray ships; shells complete both."""

    name = "study"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from sae_ray.study.shipped import shipped_studies

        # Files come first: bash forgets what was offered before them.
        files = super().shell_complete(ctx, param, incomplete)
        return [*files, *(CompletionItem(name) for name in shipped_studies() if name.startswith(incomplete))]


def study_options(command: Callable) -> Callable:
    """The study's file, its root, and flags that set single fields."""
    for flag, field in reversed(SHORTHANDS.items()):
        option = click.option(flag, _parameter(field), cls=FieldOption, field=field, multiple=flag in LISTS)
        command = option(command)
    settings = click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Set any field of the study, as in --set training.batch_size=512; the value is TOML.",
    )
    root = click.option(
        "--root",
        metavar="DIR",
        help="Where results are written: a directory or a URI. Default: runs/<name of the study>, or "
        "~/sae-ray/<name of the study> in a Ray job, whose own directory is deleted after it.",
    )
    study = click.argument("study", required=False, type=StudyFile())
    return study(root(settings(command)))


def open_plan(
    study: str | None,
    root: str | None,
    settings: tuple[str, ...],
    list_again: bool = False,
    describe_again: bool = False,
    **flags: Any,
) -> StudyPlan:
    """The plan of the study that the options name.

    Args:
        list_again: list the image folders even if the root remembers them; report changes and what is skipped.
        describe_again: describe the models even if the root remembers them, but for directories that have not changed.

    Raises:
        UsageError: there is no study, something in it is invalid, or the root cannot be read or would be lost.
    """
    from sae_ray.store.files import Folder
    from sae_ray.study.root import changed_folders, plan_study, recall, skipped_lines

    if root is not None and _in_job() and "://" not in root and not Path(root).expanduser().is_absolute():
        raise UsageError(
            f"--root {root} is relative to the directory of this Ray job, which is deleted after the job; "
            "give an absolute path or a URI"
        )
    loaded, memory = read_study(study, root, settings, **flags)
    folder = Folder(root or _default_root(loaded.name))
    memory = memory or recall(folder)
    plan = plan_study(loaded, folder, memory, list_again, describe_again)
    if list_again:
        for line in (*changed_folders(plan, memory), *skipped_lines(plan)):
            click.echo(line, err=True)
    return plan


def read_study(
    study: str | None, root: str | None, settings: tuple[str, ...], **flags: Any
) -> tuple[Study, Memory | None]:
    """The study that the options name, and what the root remembers if the study comes from there.

    Without a study file, it is the one that the root remembers, or what the flags alone describe.

    Raises:
        UsageError: there is no study, or something in it is invalid.
    """
    from sae_ray.store.files import Folder, address_shown
    from sae_ray.study.config import Study
    from sae_ray.study.root import recall

    overrides = _overrides(settings, flags)
    if study is not None:
        return Study.load(study, overrides), None
    if root is not None and (memory := recall(Folder(root))) is not None:
        return Study.from_dict(memory.study.to_dict(), overrides), memory
    if overrides:
        return Study.from_dict({"name": "study"}, overrides), None
    empty = f" (--root {address_shown(root)} remembers none)" if root is not None else ""
    raise UsageError(
        f"no study{empty}: give a study file or the name of one that `sae-ray studies` lists, or --images, --encoder "
        "and --site (after `sae-ray import`, --site alone), or the --root of an earlier study"
    )


def arguments(study: str | None, root: str | None, settings: tuple[str, ...], **flags: Any) -> list[str]:
    """The command line that gives these options: the inverse of what `study_options` reads."""
    words = [study] if study is not None else []
    words += ["--root", root] if root is not None else []
    for flag, field in SHORTHANDS.items():
        given = flags[_parameter(field)]
        for value in given if flag in LISTS else [given] if given else []:
            words += [flag, value]
    for setting in settings:
        words += ["--set", setting]
    return words


def plan_to_work_on(**options: Any) -> StudyPlan:
    """As `open_plan`, and saves the study in the root. Raises UsageError when the root cannot be written."""
    from sae_ray.study.root import remember

    plan = open_plan(**options)
    remember(plan)
    return plan


def chosen_sae(plan: StudyPlan, sae: str | None) -> str:
    """The name of the SAE that `--sae` names; without it, the one that steers the study's LLaVA, or the only one.

    Raises UsageError if there is no such SAE, or none is named and there are several.
    """
    there = [train.grid_cell.name for train in plan.trains]
    likely = [one.name for one in plan.steerings] or there
    if sae is None and len(likely) == 1:
        return likely[0]
    if sae not in there:
        problem = "no SAE is chosen" if sae is None else f"--sae is {sae!r}, which the study does not have"
        raise UsageError(f"{problem}; give --sae one of {', '.join(there)}")
    return sae


def _overrides(settings: tuple[str, ...], flags: Mapping[str, Any]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for flag, field in SHORTHANDS.items():
        given = flags[_parameter(field)]
        if given:
            read = _value if flag in NUMBERS else str
            overrides[field] = [read(text) for text in given] if flag in LISTS else read(given)
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write FIELD=VALUE, such as --set seed=1")
        overrides[field] = _value(text)
    return overrides


def _parameter(field: str) -> str:
    return field.replace(".", "__")


def _value(text: str) -> Any:
    """A TOML value. Anything else is taken as a string, so that paths need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _default_root(name: str) -> str:
    return str(Path.home() / "sae-ray" / name if _in_job() else Path("runs") / name)


def _in_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
