"""Every picture that a sweep's records allow, each with a name, and why the others cannot be drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from alignbench.errors import ConfigError
from alignbench.report import compare_plot, thresholds
from alignbench.report.cost_plot import costs
from alignbench.report.course_plot import courses
from alignbench.report.dual_plot import dual_function, duals_of
from alignbench.report.entries import Group, groups_of
from alignbench.report.over_optimisation import over_optimisation
from alignbench.report.plot import named
from alignbench.report.rating_plot import ratings
from alignbench.report.reliability_plot import reliability
from alignbench.report.runs import Runs, by_problem, training_curves
from alignbench.report.training_plot import training


@dataclass(frozen=True)
class Sweep:
    """What pictures are made from: the usable runs of a folder, and their comparable groups."""

    runs: Runs

    @cached_property
    def groups(self) -> list[Group]:
        """Groups for comparison; empty where no record has values per prompt."""
        return groups_of(self.runs)


class NotDrawn(Exception):  # noqa: N818
    """The records lack what a picture needs; the message says what, and how to get it."""


Draw = Callable[[Sweep, Path], None]
PLOTS: dict[str, tuple[str, Draw]] = {}


def _plot(name: str, what: str) -> Callable[[Draw], Draw]:
    def register(draw: Draw) -> Draw:
        assert name not in PLOTS
        PLOTS[name] = (what, draw)
        return draw

    return register


@dataclass(frozen=True)
class Drawn:
    """What became of one picture.

    Attributes:
        name: Its name in `PLOTS`.
        what: What it shows.
        files: The .png files; each has a .pdf beside it.
        reason: Why there is none; empty where there is.
    """

    name: str
    what: str
    files: tuple[Path, ...]
    reason: str = ""


def draw_all(runs: Runs, folder: Path, names: Sequence[str] = ()) -> tuple[list[Drawn], list[str]]:
    """Draw the pictures into a folder, NAME.png and NAME.pdf (with a suffix where there are several of a name).

    Args:
        runs: Usable runs.
        folder: Is made if it is not there; pictures of these names from before are replaced, others stay.
        names: Which; all by default.

    Returns:
        What became of each, and notes on records that could not be used.

    Raises:
        ConfigError: An unknown name.
    """
    for name in names:
        if name not in PLOTS:
            raise ConfigError(f"no picture {name!r}", where="--only", mend=f"one of: {', '.join(PLOTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    sweep, found = Sweep(runs), []
    for name, (what, draw) in PLOTS.items():
        if names and name not in names:
            continue
        for old in [*folder.glob(f"{name}.*"), *folder.glob(f"{name}-*.*")]:
            if old.suffix in (".png", ".pdf"):
                old.unlink()
        try:
            draw(sweep, folder / name)
        except NotDrawn as reason:
            found.append(Drawn(name, what, (), str(reason)))
        else:
            files = sorted([*folder.glob(f"{name}.png"), *folder.glob(f"{name}-*.png")])
            found.append(Drawn(name, what, tuple(files)))
    groups = sweep.__dict__.get("groups", [])  # looked at by a picture, with notes of their own
    return found, list(dict.fromkeys([*runs.notes, *(note for group in groups for note in group.notes)]))


@_plot("front", "reward against every constrained utility, with the front")
def _front(sweep: Sweep, path: Path) -> None:
    groups = sweep.groups
    if not groups:
        raise NotDrawn("no record has values per prompt; the same commands evaluate again")
    some = [
        compare_plot.front(group, path if len(groups) == 1 else path.with_name(f"{path.name}-{group.name}"))
        for group in groups
    ]
    if not any(some):
        raise NotDrawn("no method beside the reference has scores; evaluate=gold or another scorer gives them")


@_plot("margins", "requested against achieved margins")
def _margins(sweep: Sweep, path: Path) -> None:
    if not thresholds.points_of(sweep.runs.records):
        raise NotDrawn("no record has achieved margins: its policies have no scores")
    thresholds.picture(sweep.runs.records, path)


@_plot("multipliers", "multipliers and constraint gap by iteration")
def _multipliers(sweep: Sweep, path: Path) -> None:
    if not courses(sweep.runs.records, path):
        raise NotDrawn("no run has two iterations: mocaid, pecaid and pd_dpo have")


@_plot("dual", "the dual function, its minimiser, effective sample size and the effect of fewer responses")
def _dual(sweep: Sweep, path: Path) -> None:
    banks = duals_of(sweep.runs.records)
    if not banks:
        solved = [r for r in sweep.runs.records if (r["outcome"].get("diagnostics") or {}).get("dual")]
        raise NotDrawn(
            f"{len(solved)} record(s) solved a dual, before records held its course; the same commands add it"
            if solved
            else "no run solves a dual: dual, sacpo, mocan, pecan, mocaid and pecaid do"
        )
    for number, (title, duals) in enumerate(banks.items(), 1):
        dual_function(duals, title, path if len(banks) == 1 else path.with_name(f"{path.name}-{number}"))


@_plot("ratings", "Elo-scale ratings with intervals")
def _ratings(sweep: Sweep, path: Path) -> None:
    if not ratings(sweep.runs.records, path):
        raise NotDrawn("no record holds ratings of judged answers: run with judge=gold, for instance")


@_plot("reliability", "predicted probability against observed frequency")
def _reliability(sweep: Sweep, path: Path) -> None:
    if not reliability(sweep.runs.records, path):
        raise NotDrawn(
            "no run has learned scorers (scorers=[learned]), a judge beside gold scores, or labels that it drew itself"
        )


@_plot("training", "training curves")
def _training(sweep: Sweep, path: Path) -> None:
    found, faults = [], []
    for record in sweep.runs.records:
        curves, fault = training_curves(record, sweep.runs.folders[record["run_id"]])
        if curves is None:
            faults.append(fault)
        else:
            found.append((str(record["method"]), curves))
    if not training(found, path):
        raise NotDrawn(faults[0] if faults else "no run trains anything")


@_plot("cost", "tokens, time, memory and models of every method")
def _cost(sweep: Sweep, path: Path) -> None:
    if not costs(sweep.runs.records, path):
        raise NotDrawn("no record states its cost")


@_plot("proxy_gold", "gain by the score model that was used and by gold, over the distance gone")
def _proxy_gold(sweep: Sweep, path: Path) -> None:
    problems = by_problem(sweep.runs.records)
    some = [
        over_optimisation(group, path if len(problems) == 1 else named(path, f"-{problem}"))
        for problem, group in problems.items()
    ]
    if not any(some):
        raise NotDrawn("no run used a score model in a world with gold scores: experiment=learned/mocan does")
