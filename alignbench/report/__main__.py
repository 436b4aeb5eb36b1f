"""Records in tables and pictures.

python -m alignbench.report FOLDER [--out NAME] [--each]
    every record below FOLDER in one table and one picture; records that ask for different thresholds in the table of
    requested against achieved margins (with --each also in one result table per problem); of runs that used a score
    model in a world with gold scores, a picture of both gains over the distance from the reference

python -m alignbench.report compare FOLDER [--out NAME] [--against METHOD] [--corner REWARD,UTILITY,...]
    methods against each other over seeds and thresholds: feasibility with confidence, paired differences corrected for
    their number, constrained best and regret, front, hypervolume, threshold calibration, sensitivity to seed and beta,
    cost; Markdown, LaTeX (booktabs), CSV and a picture

python -m alignbench.report certificates FOLDER [--split train|test] [--out NAME]
    the exact certificates of runs on dataset=enumerable, and CAID's claim (a folder that is itself called as
    one of these commands is reported as ./certificates)

python -m alignbench.report rounds FOLDER [--split train|test] [--out NAME]
    the distance of every round's policy from the exact optimum, and what exploration is worth

python -m alignbench.report claims FOLDER [--out NAME]
    the papers' claims: effect, interval and verdict of each, or the command that makes its runs; Markdown, LaTeX, CSV
    and a picture

python -m alignbench.report dashboard FOLDER [--out NAME] [--store STORE]
    one self-contained HTML page of everything below FOLDER: plots with filters, tables, responses side by side; a
    multirun writes it at its end

python -m alignbench.report judging FOLDER [--out NAME]
    what one judge said in several runs, each contest once, and Bradley-Terry ratings of all their policies together

python -m alignbench.report plots FOLDER [--out FOLDER] [--only NAME,...]
    every picture that the records allow, as .png and .pdf, and why the others cannot be drawn

python -m alignbench.report wandb FOLDER --project NAME [--entity NAME] [--runs offline|online] [--save]
    a W&B workspace as code (extra [wandb]), written as JSON and with --save saved; with --runs the W&B runs themselves,
    made again from the records

python -m alignbench.report published [FOLDER] [--table PAPER/TABLE] [--out FOLDER]
    the papers' published tables with source and certainty, and beside them the runs of their presets below FOLDER, with
    the scale at which these ran; without FOLDER the papers' tables alone; Markdown, LaTeX (booktabs), CSV and pictures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from alignbench.errors import AlignbenchError, ConfigError, DataError
from alignbench.report import (
    certificates,
    compare,
    dashboard,
    judging,
    published,
    published_tables,
    rounds,
    thresholds,
    wandb_workspace,
)
from alignbench.report.claims import page
from alignbench.report.compare_plot import picture
from alignbench.report.entries import REFERENCE, groups_of
from alignbench.report.over_optimisation import over_optimisation
from alignbench.report.plot import named, trade_off
from alignbench.report.plots import PLOTS, draw_all
from alignbench.report.published_runs import Found
from alignbench.report.runs import Runs, by_problem, collect
from alignbench.report.sections import Section, csv_text
from alignbench.report.table import markdown_table, terminal_table

_PAIRS_SHOWN = 20


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        command = _COMMANDS.get(given[0]) if given else None
        if command is None:
            _summary(given)
        else:
            command(given[1:])
    except AlignbenchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _summary(arguments: list[str]) -> None:
    parser = _parser("python -m alignbench.report", "report")
    parser.add_argument("--each", action="store_true", help="where thresholds differ: a table per problem as well")
    options = parser.parse_args(arguments)
    _report(options.folder, options.out or options.folder / "report", each=options.each)


def _exact(which: str, arguments: list[str]) -> None:
    parser = _parser(f"python -m alignbench.report {which}", which)
    parser.add_argument("--split", choices=certificates.SPLITS, default="test", help="whose prompts (default: test)")
    options = parser.parse_args(arguments)
    base = options.out or options.folder / which
    report = {"certificates": certificates.report, "rounds": rounds.report}[which]
    report(_read(options.folder, thresholds=True), options.split, base, _console())
    _say_where(base)


def _compare(arguments: list[str]) -> None:
    parser = _parser("python -m alignbench.report compare", "compare")
    parser.add_argument("--against", help=f"differences from this method only ({REFERENCE}: the reference)")
    parser.add_argument(
        "--corner", type=_numbers, help="reference point of the hypervolume (default: the smallest means)"
    )
    options = parser.parse_args(arguments)
    runs = collect(options.folder, measured=True)
    groups = groups_of(runs)
    if not groups:
        raise DataError(
            f"no run below {options.folder} has values per prompt", where=str(options.folder),
            mend="run them again: the store keeps what was computed; a dashboard shows each by itself",
        )  # fmt: skip
    base = options.out or options.folder / "compare"
    base.parent.mkdir(parents=True, exist_ok=True)
    console = _console()
    for group in groups:
        out = base if len(groups) == 1 else base.with_name(f"{base.name}-{group.name}")
        sections = compare.sections_of(group, against=options.against, corner=options.corner)
        notes = [f"- {note}" for note in group.notes]
        for section in sections:
            # pairs grow with the square of the methods: in the files, and on a terminal if there are few
            if section.key != "differences" or len(section.lines) <= _PAIRS_SHOWN:
                console.print(section.terminal())
        text = [f"# {group.name}\n", *(section.markdown() for section in sections)]
        text += ["## Notes\n", "\n".join(notes) or "- every record was used", ""]
        named(out, ".md").write_text("\n".join(text), encoding="utf-8")
        named(out, ".tex").write_text("\n\n".join(section.latex() for section in sections) + "\n", encoding="utf-8")
        named(out, ".csv").write_text(csv_text(sections), encoding="utf-8")
        drawn = picture(group, out)
        for note in notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        _say_where(out, picture=drawn)
        print(f"for a paper: {named(out, '.tex')}\nfor programs: {named(out, '.csv')}")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _claims(arguments: list[str]) -> None:
    options = _parser("python -m alignbench.report claims", "claims").parse_args(arguments)
    base = options.out or options.folder / "claims"
    runs = collect(options.folder)
    page.report(runs, base, options.folder, _console())
    for note in runs.notes:
        print(note, file=sys.stderr)
    _say_where(base)
    print(f"for a paper: {named(base, '.tex')}\nfor programs: {named(base, '.csv')}")


def _judging(arguments: list[str]) -> None:
    options = _parser("python -m alignbench.report judging", "judging").parse_args(arguments)
    base = options.out or options.folder / "judging"
    found = judging.together(_read(options.folder, judged=True))
    base.parent.mkdir(parents=True, exist_ok=True)
    _console().print(judging.terminal(found))
    named(base, ".md").write_text(judging.markdown(found), encoding="utf-8")
    judging.picture(found, base)
    _say_where(base)


def _plots(arguments: list[str]) -> None:
    parser = _parser("python -m alignbench.report plots", "plots")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help=f"some of: {', '.join(PLOTS)}")
    options = parser.parse_args(arguments)
    out = options.out or options.folder / "plots"
    runs = collect(options.folder)
    drawn, notes = draw_all(runs, out, options.only)
    for note in notes:
        print(note, file=sys.stderr)
    for found in drawn:
        print(
            f"{found.name + ':':<12} {found.what}"
            if found.files
            else f"{found.name + ':':<12} not drawn: {found.reason}"
        )
        for file in found.files:
            print(f"{'':<12} {file}")


def _wandb(arguments: list[str]) -> None:
    parser = _parser("python -m alignbench.report wandb", "wandb")
    parser.add_argument("--project", default="alignbench", help="W&B project (default: alignbench)")
    parser.add_argument("--entity", help="W&B user or team; needed by --save")
    parser.add_argument("--runs", choices=("offline", "online"), help="make the W&B runs again from the records")
    parser.add_argument("--save", action="store_true", help="save the workspace; needs a login")
    options = parser.parse_args(arguments)
    out, name = options.out or options.folder / "wandb-report", options.folder.resolve().name
    if options.save and not options.entity:
        raise ConfigError("whose workspace is it to be?", where="--save", mend="--entity NAME: a W&B user or team")
    runs = collect(options.folder)
    for note in runs.notes:
        print(note, file=sys.stderr)
    space = wandb_workspace.workspace(
        runs, entity=options.entity or "", project=options.project, name=f"alignbench: {name}"
    )
    wandb_workspace.write_spec(space, out / "workspace.json")
    print(f"workspace: {out / 'workspace.json'}")
    if options.runs:
        made = wandb_workspace.rebuild(
            runs, out / "runs", mode=options.runs, project=options.project, entity=options.entity, group=name
        )
        print(f"runs: {len(made)} below {out / 'runs'}")
        if options.runs == "offline":
            print(f"upload them: wandb sync {out / 'runs'}/*/wandb/offline-run-*")
    if options.save:
        print(f"saved: {wandb_workspace.save(space)}")


def _published(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alignbench.report published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", help="folder with run folders; none: the papers alone")
    parser.add_argument("--table", help="one table only, as PAPER/TABLE")
    parser.add_argument("--out", type=Path, help="folder for the files (default: FOLDER/published, outputs/published)")
    options = parser.parse_args(arguments)
    of = published.published()
    tables = of.tables if options.table is None else (of.table(options.table),)
    runs = Runs([], {}) if options.folder is None else collect(options.folder)
    console = _console()

    def say(section: Section, found: Found) -> None:
        if options.table is not None or found.lines:
            console.print(section.terminal())
            for note in section.notes:
                console.print(f"- {note}", markup=False, highlight=False, soft_wrap=True)

    out = options.out or (options.folder or Path("outputs")) / "published"
    page, used = published_tables.report(of, tables, runs.records, out, runs.notes, say)
    for note in runs.notes:
        print(note, file=sys.stderr)
    print(f"runs of these tables' presets: {used} of {len(runs.records)}\ntables: {page}")


def _dashboard(arguments: list[str]) -> None:
    parser = _parser("python -m alignbench.report dashboard", "dashboard")
    parser.add_argument("--store", type=Path, default=Path("store"), help="artifacts found there are linked")
    options = parser.parse_args(arguments)
    base = options.out or options.folder / "dashboard"
    print(f"dashboard: {dashboard.write(options.folder, named(base, '.html'), options.store)}")


def _parser(program: str, base: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with run folders, for instance outputs")
    parser.add_argument(
        "--out", type=Path, default=None, help=f"base name of the .md, .png and .pdf (default: FOLDER/{base})"
    )
    return parser


def _read(folder: Path, **needed: bool) -> list[dict[str, Any]]:
    runs = collect(folder, **needed)
    for note in [*runs.notes, *(thresholds.missing_seeds(runs.records) if "judged" not in needed else ())]:
        print(note, file=sys.stderr)
    return runs.records


def _console() -> Console:
    return Console(width=None if Console().is_terminal else thresholds.WIDTH)


def _report(folder: Path, out: Path, *, each: bool = False) -> None:
    records = _read(folder, measured=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    problems = by_problem(records)
    summary = thresholds.thresholds_differ(records) and bool(thresholds.points_of(records))
    if summary:
        _console().print(thresholds.terminal_table(records, "requested against achieved"))
        thresholds.write(records, out)
        _say_where(out)
        if not each:
            print(f"a result table for each of {len(problems)} problems: the same command with --each")
            return
    for problem, group in problems.items():
        base = out if len(problems) == 1 and not summary else out.with_name(f"{out.name}-{problem}")
        _console().print(terminal_table(group, problem))
        named(base, ".md").write_text(markdown_table(group), encoding="utf-8")
        utility = group[0]["config"]["constraint"]["utilities"][0]
        scored = utility in next(iter(group[0]["rows"].values()))["metrics"]
        if scored:
            trade_off(group, base, utility=utility)
        _say_where(base, picture=scored)
        further = base.with_name(f"{base.name}-over_optimisation")
        if over_optimisation(group, further):
            print(f"proxy and gold: {named(further, '.png')}")


def _say_where(base: Path, *, picture: bool = True) -> None:
    print(f"table: {named(base, '.md')}\npicture: {named(base, '.png') if picture else 'none without scores'}")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "certificates": partial(_exact, "certificates"),
    "claims": _claims,
    "compare": _compare,
    "dashboard": _dashboard,
    "judging": _judging,
    "plots": _plots,
    "published": _published,
    "rounds": partial(_exact, "rounds"),
    "wandb": _wandb,
}


if __name__ == "__main__":
    sys.exit(main())
