"""The page of claims: Markdown, LaTeX, CSV and a forest plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from alignbench.report.claims.declared import PAPERS, RUNS, Claim
from alignbench.report.claims.effects import ALPHA, LEVEL, RULES
from alignbench.report.claims.results import (
    NOT_RUN,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    VERDICTS,
    Measured,
    Result,
    results_of,
)
from alignbench.report.claims.selection import SPLIT, Setting
from alignbench.report.plot import COLOURS, named, pyplot, save
from alignbench.report.runs import Runs
from alignbench.report.sections import Cell, Section, Value, csv_text
from alignbench.report.thresholds import markdown

_OVER = {
    "mean": "mean over the points",
    "every": "every point must hold",
    "some": "one point is enough (corrected for their number)",
    "slope": "slope over the points",
}
# verdict -> (marker, filled, colour): told apart without colour, too
_LOOKS = {
    SUPPORTED: ("o", True, COLOURS[5]),
    NOT_SUPPORTED: ("X", True, COLOURS[4]),
    UNDECIDED: ("s", False, "0.35"),
}
_REACH = 8.0
_SCALE = (
    "model.name", "dataset.world.train_prompts", "dataset.world.pairs_per_prompt", "evaluate.samples_per_prompt",
    "constraint.beta",
)  # fmt: skip


def report(runs: Runs, base: Path, folder: Path, console: Console) -> list[Result]:
    """Judge every claim, print the table, and write .md, .tex, .csv, .png and .pdf.

    Args:
        runs: A folder's records.
        base: Base name of the files.
        folder: Where the records lie, for the commands.
        console: Where to print.

    Returns:
        The results, in the order of the page.
    """
    results, known = results_of(runs)
    base.parent.mkdir(parents=True, exist_ok=True)
    sections = sections_of(results)
    for section in sections:
        console.print(section.terminal())
    console.print(tally(results), markup=False, highlight=False, soft_wrap=True)
    picture(results, base)
    named(base, ".md").write_text(page(results, known, runs, folder, named(base, ".png").name), encoding="utf-8")
    narrow = sections_of(results, narrow=True)
    named(base, ".tex").write_text("\n\n".join(section.latex() for section in narrow) + "\n", encoding="utf-8")
    named(base, ".csv").write_text(csv_text(sections), encoding="utf-8")
    return results


def tally(results: Sequence[Result]) -> str:
    """How many of each verdict."""
    return f"{len(results)} claims: " + ", ".join(
        f"{sum(result.verdict == verdict for result in results)} {verdict}" for verdict in VERDICTS
    )


def sections_of(results: Sequence[Result], *, narrow: bool = False) -> list[Section]:
    """One table per paper.

    Args:
        results: In the order of the page.
        narrow: For a paper's column: without the part that decided, setting, unit and rule.
    """
    headings = ["claim", "deciding part", "setting", "effect", "unit", "s", "rule", "seeds", "p if false", "p if true"]
    kept = [
        i for i, name in enumerate(headings) if not (narrow and name in ("deciding part", "setting", "unit", "rule"))
    ]
    sections = []
    for paper, title in PAPERS.items():
        lines: list[list[Cell]] = []
        for result in _of(results, paper):
            key = result.key
            line: list[Cell] = [result.claim.id, _deciding(result), result.setting or "-"]
            if key is None:
                line += ["-"] * 4
            else:
                line += [Value(key.effect.interval()), key.part.unit, f"{key.part.smallest:g}", key.part.kind]
            line += [str(len(result.seeds)) if result.seeds else "-", _p(result.supports), _p(result.refutes)]
            lines.append([*(line[i] for i in kept), result.verdict])
        if lines:
            columns = [*(headings[i] for i in kept), "verdict"]
            label = f"claims-{_slug(paper)}"
            sections.append(Section(label, title, columns, lines, CAPTION, texts=1 if narrow else 3))
    return sections


CAPTION = (
    f"effect: of the part that decided, positive in the claimed direction [{LEVEL:.0%}, by itself]; s: smallest effect "
    "of interest; p: of such data if the claim were false, and if it were true, each after Holm's correction over the "
    f"paper's claims; decided at {ALPHA:g} one-sided: supported where the first is smaller, not supported the second"
)


def rules_text() -> str:
    """How verdicts are made."""
    rules = "\n".join(f"- **{kind}**: {text}." for kind, text in RULES.items())
    return f"""Claims, experiments, effects and rules are declared in `alignbench/report/claims/declared.py`, before the
numbers. Every effect is signed so that the claimed direction is positive, and has a smallest effect of interest s. A
claim's rule is one of

{rules}

"Surely": the one-sided p is at most {ALPHA:g} (the {LEVEL:.0%} interval excludes the value) *after* Holm's correction
over all judged claims of the same paper, separately for "supported" and for "not supported": the chance that any
claim of a paper is wrongly called supported is at most {ALPHA:.1%}, and likewise for not supported, as far as intervals
keep their level (of nominal 95 %, 93.5 to 97.4 % in simulations of three seeds). Everything else is undecided. An
effect that is surely positive and surely below s is not supported: it does not matter. A claim of several parts, or of
several points, needs all of them unless it says that one is enough; to refute it one part is enough, corrected for
their number.

Effects are paired by seed and, where prompts are sampled, by prompt; intervals are about other seeds and other prompts
at once (`alignbench/report/crossed.py`), or about other seeds where a seed gives one number (exact sums over the
listed answers of the {SPLIT} prompts, absolute errors, counts). **Fewer than three seeds are undecided**, whatever
their prompts say. Seeds and thresholds that not every role has are left out and named; what differs from
the declared seeds and thresholds is told; runs of different models, data or evaluation are never mixed. All of it is at
embedded scale: it tests the mechanism, and says nothing about a 7B model.
"""


def page(results: Sequence[Result], known: Sequence[Setting], runs: Runs, folder: Path, image: str) -> str:
    """The Markdown page."""
    text = ["# The papers' claims, tested\n", tally(results) + ".\n"]
    text += [f"![effects in units of the smallest effect of interest]({image})\n", "## How verdicts are made\n"]
    text.append(rules_text())
    for paper, title in PAPERS.items():
        own = _of(results, paper)
        if not own:
            continue
        lines = [
            [r.claim.id, r.claim.statement, r.claim.source, _effect(r.key), _seeds(r), f"**{r.verdict}**: {r.reason}"]
            for r in own
        ]
        text.append(f"## {title}\n")
        text.append(markdown(["claim", "in our words", "source", "effect", "seeds", "verdict"], lines) + "\n")
        text += [_details(result, folder) for result in own]
    text.append("## Settings\n")
    text.append(_settings_text(results, known) + "\n")
    text.append("## Notes\n")
    text.append("\n".join(f"- {note}" for note in runs.notes) or "- every record could be read")
    return "\n".join(text) + "\n"


def _details(result: Result, folder: Path) -> str:
    claim = result.claim
    lines = [f"### {claim.id}\n", f"{claim.statement} ({claim.source})\n"]
    lines.append(f"- experiment: {', '.join(map(_role, claim.roles.items()))}; {_OVER[claim.over]}")
    for part in claim.parts:
        lines.append(f"- measured: {part.text}; rule {part.kind}, s = {part.smallest:g} {part.unit}")
    if result.measured:
        where = f" at {'; '.join(result.points)}" if result.points else ""
        lines.append(f"- setting {result.setting}, seeds {', '.join(map(str, result.seeds))}{where}")
        lines.append(f"- p if it were false {_p(result.supports)}, p if it were true {_p(result.refutes)} (corrected)")
    lines += [f"- {note}" for note in result.notes]
    if claim.note:
        lines.append(f"- note: {claim.note}")
    lines.append("- its runs:\n\n" + "\n".join(f"      {line}" for line in commands(claim, folder)) + "\n")
    if len(result.measured) > 1:
        rows = [
            [m.part.text, m.where or "-", _effect(m), _p(m.evidence.supports), _p(m.evidence.refutes),
             "<" if i == result.shown else ""]
            for i, m in enumerate(result.measured)
        ]  # fmt: skip
        lines.append(markdown(["part", "at", "effect", "p if false", "p if true", "decides"], rows) + "\n")
    lines.append(f"**{result.verdict}**: {result.reason}\n")
    return "\n".join(lines)


def commands(claim: Claim, folder: Path | str) -> list[str]:
    """The commands that make a claim's runs."""
    return [f"python main.py -m output_dir={folder} {RUNS[name]}" for name in claim.runs]


def _settings_text(results: Sequence[Result], known: Sequence[Setting]) -> str:
    """What the settings are, those that claims were measured in; and how same-named ones differ."""
    used = {result.setting for result in results}
    shown = [setting for setting in known if setting.name in used]
    if not shown:
        return "No claim was measured."
    lines = []
    for setting in shown:
        record = setting.records[0]
        metric: Mapping[str, Any] = next(iter(next(iter(record["rows"].values()))["metrics"].values()), {})
        keys = ", ".join(f"{key} {json.loads(setting.keys[key])}" for key in _SCALE if key in setting.keys)
        prompts = (
            f"{metric['clusters']} {record['config']['evaluate']['split']} prompts; " if "clusters" in metric else ""
        )
        others = [other for other in known if other is not setting and _base(other) == _base(setting)]
        differ = sorted({k for o in others for k in {*o.keys, *setting.keys} if o.keys.get(k) != setting.keys.get(k)})
        text = f"- **{setting.name}** ({len(setting.records)} runs): {prompts}{keys}"
        if differ:
            values = (f"{key} = {setting.keys.get(key, 'unset')}" for key in differ[:8])
            text += f"; unlike its namesakes {', '.join(values)}"
        lines.append(text)
    return "\n".join(lines)


def _base(setting: Setting) -> Any:
    return setting.records[0]["config"]["dataset"]["name"]


# ---------------------------------------------------------------- picture


def picture(results: Sequence[Result], path: Path) -> None:
    """A row per claim: its effect and interval in units of s, where the claim would hold in grey.

    Args:
        results: In the order of the page.
        path: Base name; a .png and a .pdf are written.
    """
    rows: list[Result | str] = []
    for paper, title in PAPERS.items():
        own = _of(results, paper)
        rows += [title, *own] if own else []
    figure, axes = pyplot().subplots(figsize=(12.0, 0.8 + 0.27 * len(rows)), layout="constrained")
    labels = []
    for height, row in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
        labels.append((height, row if isinstance(row, str) else _label(row)))
        if isinstance(row, Result):
            _draw(axes, row, height)
    axes.axvline(0.0, color="0.45", linewidth=1, zorder=1)
    for value in (-1.0, 1.0):
        axes.axvline(value, color="0.45", linewidth=0.8, linestyle=":", zorder=1)
    axes.set_xlim(-_REACH, _REACH)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_yticks([height for height, _ in labels], [text for _, text in labels], fontsize=8)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if isinstance(row, str) else "normal")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(
        f"effect in units of the smallest effect of interest, {LEVEL:.0%} interval by itself; the claimed direction is "
        "to the right, and the claim holds where it is grey"
    )
    save(figure, path)


def _draw(axes: Any, result: Result, height: int) -> None:
    key = result.key
    note = f"{result.verdict}"
    if key is not None:
        s, value = key.part.smallest, key.effect.interval()
        low, high = {"above": (0.0, _REACH), "same": (-1.0, 1.0), "not_below": (-1.0, _REACH)}[key.part.kind]
        axes.barh(height, high - low, left=low, height=0.62, color="0.92", zorder=0)
        marker, filled, colour = _LOOKS[result.verdict]
        ends = [e / s for e in (value.low, value.high) if not math.isnan(e)]
        shown = [min(max(e, -_REACH), _REACH) for e in ends]
        if shown:
            few = not key.effect.parts  # no other seeds in it
            axes.plot(shown, [height] * 2, color=colour, linewidth=1.6, linestyle="--" if few else "-", zorder=2)
            for end, at in zip(ends, shown, strict=True):
                if end != at:
                    axes.plot(at, height, ">" if at > 0 else "<", color=colour, markersize=6, clip_on=False, zorder=3)
        if abs(value.mean / s) <= _REACH:
            face = colour if filled else "white"
            axes.plot(value.mean / s, height, marker, color=colour, markerfacecolor=face, markersize=6.5, zorder=3)
        few_seeds = f" ({len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''})" if not key.effect.parts else ""
        note = f"{Value(value)} {key.part.unit}: {result.verdict}{few_seeds}"
    axes.annotate(
        note, (1, height), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points", va="center",
        fontsize=8, color="0.5" if result.verdict == NOT_RUN else "0.1", annotation_clip=False,
    )  # fmt: skip


def _label(result: Result) -> str:
    where = result.key.where if result.key is not None else ""
    setting = f" ({result.setting})" if result.setting[-1:].isdigit() else ""
    return f"{result.claim.id}{setting}{f' @ {where}' if where else ''}"


# ---------------------------------------------------------------- small


def _of(results: Sequence[Result], paper: str) -> list[Result]:
    return [result for result in results if result.claim.paper == paper]


def _slug(paper: str) -> str:
    return paper.lower().replace("-", "_")


def _deciding(result: Result) -> str:
    key = result.key
    if key is None:
        return "-"
    return f"{key.part.text} @ {key.where}" if key.where else key.part.text


def _effect(measured: Measured | None) -> str:
    return "-" if measured is None else f"{Value(measured.effect.interval())} {measured.part.unit}"


def _seeds(result: Result) -> str:
    return str(len(result.seeds)) if result.seeds else "-"


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def _role(item: tuple[str, Any]) -> str:
    name, role = item
    where: Mapping[str, Any] = role.where
    stated = [f"{key.removeprefix('method.')}={value}" for key, value in where.items() if value is not None]
    grid = f", over {role.varies.removeprefix('method.')}" if role.varies else ""
    return f"{name} = {role.method} ({', '.join(stated)}{grid})"
