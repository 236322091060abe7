"""The command `optimize`: one thin function for each verb.

Nothing heavy is imported at the top, so that `optimize --help` answers at once. A verb returns its exit code (None is
0); what goes wrong in one becomes a message or a JSON document, and an exit code, in `Verb`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optimize.commands import keeping
from optimize.commands.options import (
    By,
    Json,
    RecipeFile,
    Remeasure,
    Remote,
    Reports,
    Sets,
    Style,
    Trust,
    UsageError,
    Verb,
    WorkFolder,
    group,
)
from optimize.commands.reporting import (
    INTERRUPTED,
    UNEXPECTED,
    OutputFormat,
    emit,
    note,
    relative,
    say,
    show,
    stdout_for_the_result,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimize.recipe import Recipe
    from optimize.registry import Version
    from optimize.run import Run

app = group("Makes trained models smaller and faster, and proves it.")


def _print_version(asked: bool) -> None:
    if asked:
        from optimize import __version__

        print(f"optimize {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the libraries warn of.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    if not debug:
        _quiet_libraries()
    # PyTorch's large tensors in large pages: stages that stream through them take an eighth less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _quiet_libraries() -> None:
    """Bars and advice of the libraries below would tear the view of the stages apart. What is set already stays."""
    import warnings

    warnings.simplefilter("ignore")
    for name, value in {
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


@app.command(cls=Verb)
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The recipe to write.")] = Path("recipe.yaml"),
    from_: Annotated[str | None, typer.Option("--from", metavar="NAME", help="Copy a recipe that comes along.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A model folder, hub id or wheel:// source.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="A CSV, TSV, JSON lines, Parquet or Arrow file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    as_json: Json = False,
) -> None:
    """Write a first recipe: a copy (--from quickstart), or one for a --model and --data of yours."""
    from optimize.commands.init import init

    written = init(file, copy_of=from_, model=model, data=data, force=force)
    if as_json:
        emit({"schema": 1, **written.to_json()})
        return
    for guess in written.guesses:
        note(guess)
    say(f"Wrote {relative(written.file)}. Next: optimize apply {relative(written.file)}")


@app.command(cls=Verb)
def validate(
    recipe: RecipeFile, sets: Sets = None, output_format: Style = OutputFormat.full, as_json: Json = False
) -> None:
    """Check a recipe without running it: every mistake at once, each with its place and what to try."""
    loaded = _load(recipe, sets)
    if as_json or output_format is OutputFormat.json:
        emit({"schema": 1, "error": None, "digest": loaded.digest, "recipe": loaded.document()})
    else:
        note(f"{relative(recipe.absolute())} is valid: {loaded.name}, {' -> '.join(one.id for one in loaded.stages)}")


@app.command(cls=Verb)
def plan(
    recipe: RecipeFile,
    sets: Sets = None,
    output_format: Style = OutputFormat.full,
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """Say which stages would run, which are reused, and why."""
    from optimize.planning import plan

    loaded = _load(recipe, sets)
    with stdout_for_the_result():
        planned = plan(loaded)
    if as_json or output_format is OutputFormat.json:
        emit(planned.to_json())
        return
    from optimize.terminal import plan_table

    show(plan_table(planned))


@app.command(cls=Verb)
def apply(
    recipe: RecipeFile,
    sets: Sets = None,
    remeasure: Remeasure = False,
    promote: Annotated[bool, typer.Option("--promote/--no-promote", help="Promote what passes.")] = True,
    reports: Reports = None,
    output_format: Style = OutputFormat.full,
    work: WorkFolder = None,
    as_json: Json = False,
) -> int:
    """Run the stages, score and compare the artifacts, judge the gates, promote what passes."""
    from optimize.engine import apply
    from optimize.progress_view import listening

    loaded = _load(recipe, sets)
    with stdout_for_the_result(), listening() as progress:
        run = apply(loaded, progress=progress, remeasure=remeasure, promote=promote)
    return _conclude(run, as_json or output_format is OutputFormat.json, reports)


@app.command(cls=Verb)
def gate(
    recipe: RecipeFile,
    against: Annotated[str, typer.Option("--against", metavar="NAME@ALIAS", help="What is promoted now.")],
    since: Annotated[
        list[str] | None,
        typer.Option("--since", metavar="ALIAS~N", help="An older version too, such as production~5. Repeatable."),
    ] = None,
    acknowledged: Annotated[
        Path | None,
        typer.Option("--acknowledged", help="Regressions that are let pass; acknowledged.yaml beside RECIPE."),
    ] = None,
    sets: Sets = None,
    promote: Annotated[bool, typer.Option("--promote/--no-promote", help="Promote what passes.")] = False,
    remote: Remote = None,
    trust_remote_code: Trust = False,
    reports: Reports = None,
    output_format: Style = OutputFormat.full,
    work: WorkFolder = None,
    as_json: Json = False,
) -> int:
    """Apply a recipe and judge its candidate over what is promoted now, both measured here and now."""
    from optimize.commands.gating import said
    from optimize.gating import gate
    from optimize.progress_view import listening

    loaded = _load(recipe, sets)
    with stdout_for_the_result(), listening() as progress:
        run = gate(
            loaded,
            against=against,
            since=since or (),
            remote=remote,
            acknowledgements=acknowledged,
            promote=promote,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not (as_json or output_format is OutputFormat.json):
        show(said(run.document))
    return _conclude(run, as_json or output_format is OutputFormat.json, reports)


@app.command(cls=Verb)
def compare(
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="A digest, a folder or NAME@ALIAS.")],
    over: Annotated[str, typer.Argument(metavar="OVER", help="What it is held against: the same.")],
    gates: Annotated[Path | None, typer.Option("--gates", help="A YAML file of gates to judge CANDIDATE by.")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Whose rows and settings to use; the newest run's by default.")
    ] = None,
    remeasure: Remeasure = False,
    remote: Remote = None,
    trust_remote_code: Trust = False,
    reports: Reports = None,
    work: WorkFolder = None,
    as_json: Json = False,
) -> int:
    """Measure one artifact against another, with the statistics of `apply`."""
    from optimize.comparison import compare
    from optimize.progress_view import listening

    with stdout_for_the_result(), listening() as progress:
        run = compare(
            candidate,
            over,
            recipe=recipe,
            gates=gates,
            remote=remote,
            trust_remote_code=trust_remote_code,
            progress=progress,
            remeasure=remeasure,
        )
    return _conclude(run, as_json, reports)


@app.command(cls=Verb)
def render(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id or folder, `latest`, or a result's file.")],
    kinds: Reports = None,
    work: WorkFolder = None,
) -> None:
    """Draw a result again as CI shows it; what has no PATH goes to standard output. By default Markdown."""
    from optimize.report.outputs import find_result, write_reports

    document, folder = find_result(run)
    write_reports(document, folder, kinds or ["markdown"], to_stdout=True)


@app.command(cls=Verb)
def comment(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id or folder, `latest`, or a result's file.")],
    github: Annotated[
        bool, typer.Option("--github", help="On the pull request of this job, with GITHUB_TOKEN.")
    ] = False,
    gitlab: Annotated[
        bool, typer.Option("--gitlab", help="On the merge request of this job, with GITLAB_TOKEN.")
    ] = False,
    number: Annotated[int | None, typer.Option("--number", min=1, help="Which pull or merge request.")] = None,
    work: WorkFolder = None,
) -> None:
    """Write a result into the conversation of a pull or merge request, or update what was written there before."""
    from optimize.report.outputs import find_result, post

    if github == gitlab:
        raise typer.BadParameter("say --github or --gitlab")
    document, _ = find_result(run)
    post(document, "github-comment" if github else "gitlab-comment", number)


@app.command(cls=Verb)
def sensitivity(
    recipe: RecipeFile,
    stage: Annotated[str | None, typer.Option("--stage", metavar="NAME", help="Whose settings, of several.")] = None,
    by: Annotated[By, typer.Option("--by", help="What changes at a time.")] = By.layer,
    settings: Annotated[
        str | None, typer.Option("--settings", metavar="A,B", help="Bits or sparsities to try, such as 2,3,4,8.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Mean bits (4), overall sparsity (0.5), or share of the size (30%).")
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="Write the recipe that spends the budget best.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run the stage with the choice, and with one setting for all.")
    ] = True,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration rows to compare answers on.")] = 32,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a row.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw of rows.")] = 0,
    sets: Sets = None,
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """Score each layer's reaction to each bit width or sparsity, and spend a budget where it hurts least."""
    from optimize import sensitivity
    from optimize.commands.sensitivity import numbers, page
    from optimize.progress_view import listening

    tried = numbers(settings)
    with stdout_for_the_result(), listening() as progress:
        found = sensitivity.measure(
            _load(recipe, sets),
            stage=stage,
            by=by.value,
            settings=tried,
            budget=budget,
            write=write,
            check=check,
            samples=samples,
            length=length,
            seed=seed,
            progress=progress,
        )
    if as_json:
        emit(found)
    else:
        show(page(found))


@app.command(cls=Verb)
def promote(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, its run.json, or `latest`.")],
    alias: Annotated[str, typer.Option("--alias", help="The name that will point at it, such as production.")],
    artifact: Annotated[str | None, typer.Option("--artifact", help="Which artifact of the run.")] = None,
    waive: Annotated[
        str | None, typer.Option("--waive", metavar="REASON", help="Do without a passing verdict.")
    ] = None,
    expires: Annotated[str | None, typer.Option("--expires", metavar="DATE", help="When the waiver ends.")] = None,
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """Point an alias at an artifact that passed its gates."""
    from optimize.promotion import promote

    _say_version(promote(run, alias=alias, artifact=artifact, waive=waive, expires=expires), alias, as_json)


@app.command(cls=Verb)
def rollback(
    reference: Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="Such as minilm-sentiment@production.")],
    to: Annotated[int | None, typer.Option("--to", metavar="VERSION", help="By default the one before.")] = None,
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """Point an alias back at an earlier version."""
    from optimize.work import Work

    name, alias = _split(reference)
    _say_version(Work().registry.rollback(name, alias, to=to), alias, as_json)


@app.command(cls=Verb)
def get(
    reference: Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="Or NAME@VERSION.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that does not exist yet.")],
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """Copy a promoted model, checked file by file, to a folder that serves without this tool."""
    from optimize.work import Work

    _split(reference)
    place = Work()
    version = place.registry.resolve(reference)
    artifact = place.store.open(version.digest)
    place.store.verify(artifact)
    path = artifact.export_to(folder)
    if version.waiver and version.waiver_expired:
        note(f"warning: {reference} was promoted under a waiver that ended {version.waiver.expires}")
    if as_json:
        emit({"schema": 1, "digest": artifact.digest, "format": artifact.format, "path": str(path)})
    else:
        say(f"{reference} ({artifact.format}) is in {relative(path)}")


@app.command(cls=Verb)
def push(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="[REF...]", help="Artifacts besides what is promoted.")
    ] = None,
    remote: Remote = None,
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """Send what is promoted, and the registry, to the remote."""
    from optimize.commands.gating import said_of_push
    from optimize.progress_view import listening
    from optimize.remote import push

    with stdout_for_the_result(), listening() as progress:
        pushed = push(*(references or ()), remote=remote, progress=progress)
    emit({"schema": 1, **pushed.to_json()}) if as_json else say(said_of_push(pushed))


@app.command(cls=Verb)
def pull(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="[REF...]", help="By default everything that an alias points at.")
    ] = None,
    take_theirs: Annotated[
        bool, typer.Option("--take-theirs", help="Where both registries went on: set the log of here aside.")
    ] = False,
    remote: Remote = None,
    trust_remote_code: Trust = False,
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """Bring what is promoted, and the registry, from the remote, checked on arrival."""
    from optimize.commands.gating import said_of_pull
    from optimize.progress_view import listening
    from optimize.remote import pull

    with stdout_for_the_result(), listening() as progress:
        pulled = pull(
            *(references or ()),
            remote=remote,
            take_theirs=take_theirs,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    emit({"schema": 1, **pulled.to_json()}) if as_json else say(said_of_pull(pulled))


@app.command(cls=Verb)
def history(
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="NAME", help="Runs of this recipe.")] = None,
    artifact: Annotated[
        str | None, typer.Option("--artifact", metavar="STAGE", help="With this stage, such as int8 or quantize.int8.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="How this metric went on, such as accuracy, latency, size.")
    ] = None,
    since: Annotated[str | None, typer.Option("--since", metavar="WHEN", help="7d, 12h, 2w, or 2026-11-20.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The newest so many runs.")] = 20,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="First fill the database anew from the runs.")] = False,
    import_: Annotated[
        list[Path] | None, typer.Option("--import", metavar="FOLDER", help="First add runs from elsewhere. Repeatable.")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option("--database", metavar="URL", help="Another database than the work folder's [$OPTIMIZE_HISTORY]."),
    ] = None,
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """What ran, what came of it, and how a metric went on from run to run."""
    from optimize.commands.history import drawn, look

    found = look(
        database, rebuild, import_ or (), recipe=recipe, artifact=artifact, metric=metric, since=since, limit=limit
    )
    emit({"schema": 1, **found}) if as_json else show(drawn(found))


@app.command(cls=Verb)
def track(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, its run.json, or `latest`.")],
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="TRACKER", help="mlflow, tensorboard or wandb; by default what its recipe says."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of --to, such as uri=http://127.0.0.1:5000."),
    ] = None,
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """Send a run to an experiment tracker, now or once more."""
    from optimize.commands.track import send

    sent = send(run, to or (), sets or ())
    if as_json:
        emit({"schema": 1, **sent})
        return
    for one in sent["sent"]:
        say(f"{one['to']}: {one['where']}")


@app.command(cls=Verb)
def harness(
    reference: Annotated[str, typer.Argument(metavar="REF", help="NAME@ALIAS, a digest, or a folder.")],
    tasks: Annotated[str, typer.Option("--tasks", metavar="A,B", help="Tasks of lm-eval, such as arc_easy,hellaswag.")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Score only so many rows of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="Examples in each prompt.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows a call.")] = 8,
    include_path: Annotated[Path | None, typer.Option("--include-path", help="A folder with tasks of yours.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="By default every core.")] = None,
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """Score a language model on downstream tasks, with EleutherAI's lm-evaluation-harness."""
    from optimize import harness
    from optimize.commands.harness import table

    with stdout_for_the_result():
        found = harness.evaluate(
            reference,
            [name.strip() for name in tasks.split(",")],
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            include_path=include_path,
            threads=threads,
        )
    if as_json:
        emit({"schema": 1, **{key: found[key] for key in ("results", "n-shot", "n-samples", "versions")}})
    else:
        show(table(found["results"]))


@app.command(cls=Verb)
def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN...", help="Ids, run.json files, or `latest`.")
    ] = None,
    history: Annotated[
        str | None, typer.Option("--history", metavar="NAME", help="The runs of a recipe's name, or of NAME@ALIAS.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Where to write the page.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """Draw a run as a page again, several runs side by side, or the history of a name."""
    from optimize.report.html.several import report
    from optimize.work import Work

    path = report(Work(), runs or (), history=history, output=output)
    if as_json:
        emit({"schema": 1, "report": str(path)})
    else:
        say(f"The report is in {relative(path)}")
    if open_:
        typer.launch(str(path))


app.add_typer(keeping.registry, name="registry")
app.add_typer(keeping.store, name="store")


@app.command(cls=Verb)
def stages(
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="Explain one, such as quantize.int8.")] = None,
    as_json: Json = False,
) -> None:
    """List the stages there are, or explain one: fields, defaults, source, example."""
    from optimize.commands.stages import explain, explanation, listing, table

    described = explain(stage) if stage else listing()
    if as_json:
        emit({"schema": 1, "stages": described})
    else:
        show(explanation(described) if stage else table(described))


@app.command(cls=Verb)
def schema() -> None:
    """Print the JSON Schema of recipes, for completion and checks in an editor."""
    from optimize.recipe import json_schema

    emit(json_schema())


@app.command(cls=Verb)
def doctor(work: WorkFolder = None, as_json: Json = False) -> int:
    """Say what is installed, what is missing and how to add it, and what this machine is good at."""
    from optimize.commands.doctor import examine, page
    from optimize.work import Work

    examined = examine(Work().root)
    if as_json:
        emit({"schema": 1, **examined})
    else:
        show(page(examined))
    return 0 if examined["healthy"] else UNEXPECTED


def _load(file: Path, overrides: Sequence[str] | None) -> Recipe:
    from optimize.recipe import load

    return load(file, overrides or ())


def _split(reference: str) -> tuple[str, str]:
    name, at, alias = reference.partition("@")
    if not (name and at and alias):
        raise typer.BadParameter(f"{reference!r} is no NAME@ALIAS, such as minilm-sentiment@production")
    return name, alias


def _conclude(run: Run, as_json: bool, reports: Sequence[str] | None = None) -> int:
    """The table and the one line that says what was decided and why, and what else shall show it."""
    if as_json:
        emit(run.document)
    else:
        from optimize.terminal import result_table

        show(result_table(run.document))
        show(f"\n{run.summary}")
        note(f"run {run.document['run']}: {relative(run.directory / 'run.json')}")
        if (page := run.directory / "report.html").exists():
            note(f"report: {relative(page)}")
    if reports:
        from optimize.report.outputs import write_reports

        write_reports(run.document, run.directory, reports)
    return run.exit_code


def _say_version(version: Version, alias: str, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        emit({"schema": 1, **asdict(version)})
    else:
        say(f"{version.name}@{alias} is version {version.version}, {version.digest}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        # A name in a recipe must not end a run because a terminal can't show it.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # A cancelled job ends like Ctrl-C: workers are ended, and run.json says what happened.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code: Any
    try:
        code = app(arguments, prog_name="optimize", standalone_mode=False)
    except UsageError as error:
        if "--json" in arguments:
            message = error.format_message()
            emit({"schema": 1, "error": {"type": "UsageError", "message": message, "stage": None, "location": None}})
        error.show()
        code = 2
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)
