"""Iterative methods on `dataset=enumerable`, round by round: how far each round's policy is from the exact optimum.

    python -m alignbench.report rounds FOLDER [--split train|test] [--out NAME]

reads every record below FOLDER whose iterates all have certificates (method.evaluate_iterates=true), prints the table
of means over seeds, and writes NAME.md, NAME.png and NAME.pdf; NAME is FOLDER/rounds unless it is given.

The measure is the Lagrangian gap beta KL(pi_k || pi*) = D(lambda*) - L(pi_k, lambda*), which neither a broken nor an
over-satisfied margin flatters. Beside the last round stands its paired difference to the baseline series: the runs of
the same seed and thresholds that do not explore (method.online.alpha_reward = alpha_cost = 0), where there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignbench.errors import DataError
from alignbench.report.certificates import certificate_of
from alignbench.report.plot import named, pyplot, save, style
from alignbench.report.table import cell
from alignbench.report.thresholds import Record, Value, distinct, markdown, over_seeds, series_of, thresholds_of

GAP = "lagrangian_gap"


@dataclass(frozen=True)
class Course:
    """One series over its rounds.

    Attributes:
        series: Method, and the settings that tell it from others.
        thresholds: What was asked of all of its runs.
        gaps: (seeds, rounds) Lagrangian gap of every round of every seed.
        seeds: Seed of each row.
        explores: Whether a bonus was in use.
    """

    series: str
    thresholds: tuple[float, ...]
    gaps: tuple[tuple[float, ...], ...]
    seeds: tuple[int, ...]
    explores: bool

    @property
    def by_round(self) -> list[Value]:
        """Mean over seeds and interval, of each round."""
        return [over_seeds(values, least=0.0) for values in zip(*self.gaps, strict=True)]


def courses_of(records: Sequence[Record], split: str) -> list[Course]:
    """All series with a certificate of every round, sorted; records without are passed over."""
    records = distinct(records)
    found: dict[tuple[str, tuple[float, ...], bool, int], dict[int, tuple[float, ...]]] = {}
    for record, series in zip(records, series_of(records), strict=True):
        gaps = _gaps(record, split)
        if len(gaps) > 1:
            key = (series, thresholds_of(record), _explores(record), len(gaps))
            found.setdefault(key, {})[record["seed"]] = gaps
    return [
        Course(series, asked, tuple(runs[seed] for seed in sorted(runs)), tuple(sorted(runs)), explores)
        for (series, asked, explores, _), runs in sorted(found.items())
    ]


def _gaps(record: Record, split: str) -> tuple[float, ...]:
    rows = record["rows"]
    found = []
    for entry in sorted(record["outcome"].get("trajectory") or [], key=lambda e: e["iteration"]):
        certificate = certificate_of(rows.get(str(entry.get("policy"))) or {}, split)
        if certificate is None or certificate.get(GAP) is None:
            return ()
        found.append(float(certificate[GAP]))
    return tuple(found)


def _explores(record: Record) -> bool:
    online = record["config"]["method"].get("online") or {}
    return max(online.get("alpha_reward", 0.0), online.get("alpha_cost", 0.0)) > 0


def differences_of(courses: Sequence[Course]) -> list[Value | None]:
    """Last round's gap minus the baseline's of the same seed, mean over the seeds that both have.

    None for the baseline itself, for a series that has no seed in common with it, and where the baseline is not one
    series of the same thresholds.
    """
    result: list[Value | None] = []
    for course in courses:
        plain = [one for one in courses if not one.explores and one.thresholds == course.thresholds]
        if not course.explores or len(plain) != 1:
            result.append(None)
            continue
        base = dict(zip(plain[0].seeds, plain[0].gaps, strict=True))
        pairs = [own[-1] - base[seed][-1] for seed, own in zip(course.seeds, course.gaps, strict=True) if seed in base]
        result.append(over_seeds(pairs) if pairs else None)
    return result


def cells_of(courses: Sequence[Course]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells."""
    rounds = max(len(course.gaps[0]) for course in courses)
    headings = ["method", "requested", "seeds", *(f"round {k}" for k in range(1, rounds + 1)), "last - not exploring"]
    cells = []
    for course, difference in zip(courses, differences_of(courses), strict=True):
        values = [cell(value, 3) for value in course.by_round]
        asked = ", ".join(f"{value:g}" for value in course.thresholds)
        padding = ["-"] * (rounds - len(values))
        cells.append([course.series, asked, str(len(course.seeds)), *values, *padding, cell(difference, 3)])
    return headings, cells


def caption_of(courses: Sequence[Course], split: str) -> str:
    """What the numbers are."""
    kinds = sorted({str(value["method"]) for course in courses for value in course.by_round})
    return (
        f"Lagrangian gap beta KL(pi_k || pi*), exact on the listed answers of the {split} prompts; "
        f"[{' or '.join(kinds)}]; last column: paired by seed, below zero is better"
    )


def picture(courses: Sequence[Course], path: Path, title: str) -> None:
    """The gap against the round, a line per series with its interval.

    Args:
        courses: What to draw.
        path: Base name; a .png and a .pdf are written.
        title: Above the picture.
    """
    figure, axes = pyplot().subplots(figsize=(8.6, 4.4), layout="constrained")
    for index, course in enumerate(courses):
        marker, colour = style(index)
        aside = 0.03 * (index - (len(courses) - 1) / 2)
        values = course.by_round
        xs = [k + aside for k in range(1, len(values) + 1)]
        means = [value["mean"] for value in values]
        arms = [
            [m - (v["low"] if v["low"] is not None else m) for m, v in zip(means, values, strict=True)],
            [(v["high"] if v["high"] is not None else m) - m for m, v in zip(means, values, strict=True)],
        ]
        axes.errorbar(
            xs, means, yerr=arms, marker=marker, color=colour, markersize=6, capsize=2, linewidth=1, label=course.series
        )
    axes.set_xlabel("round")
    axes.set_ylabel("Lagrangian gap (0: the optimum)")
    axes.set_ylim(bottom=0.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def report(records: Sequence[Record], split: str, base: Path, console: Console) -> None:
    """Print the table, and write .md, .png and .pdf.

    Args:
        records: Records; those without certificates of all rounds are passed over.
        split: Whose prompts.
        base: Base name of the files.
        console: Where to print.

    Raises:
        DataError: no record has what it takes.
    """
    courses = courses_of(records, split)
    if not courses:
        raise DataError(
            f"none of {len(records)} record(s) has certificates of two rounds or more on the {split} prompts",
            where="rows.*.certificate",
            mend="run an iterative method on dataset=enumerable with method.evaluate_iterates=true",
        )
    base.parent.mkdir(parents=True, exist_ok=True)
    headings, cells = cells_of(courses)
    caption = caption_of(courses, split)
    table = Table(title=f"Lagrangian gap by round, {split} prompts", caption=escape(caption))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
    for row in cells:
        table.add_row(*map(escape, row))
    console.print(table)
    named(base, ".md").write_text(f"{markdown(headings, cells)}\n\n{caption}\n", encoding="utf-8")
    names = ", ".join(dict.fromkeys(str(record["config"]["dataset"]["name"]) for record in records))
    picture(courses, base, f"{names}: distance from the exact optimum by round, {split} prompts")
