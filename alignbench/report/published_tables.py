"""A table per published table: the paper's numbers with source and certainty, and beside them our runs.

Nothing is computed between the two: no difference, no mark for the better one. Where the scales differ a note says that
the numbers must not be compared, and the picture has a panel for each.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from alignbench.report.plot import named
from alignbench.report.published import Column, Published, PublishedTable, Row
from alignbench.report.published_plot import picture
from alignbench.report.published_runs import Found, Line, described, find
from alignbench.report.runs import Record
from alignbench.report.sections import Cell, Section, Value
from alignbench.report.stats import Estimate

CSV_COLUMNS = (
    "table", "row", "column", "whose", "text", "value", "low", "high", "spread", "metric", "unit", "better",
    "certainty", "source", "scale", "changed", "seeds", "missing_seeds", "n", "method",
)  # fmt: skip
_CHANGES_SHOWN = 6
_DIGITS = {"win": 3, "judged": 3, "lambda": 3, "rating": 0}


def section_of(table: PublishedTable, found: Found, of: Published) -> Section:
    """The table with our lines beside the paper's; columns that say the same in every row are notes instead."""
    marks = _Marks()
    used = measures_of(table, found.lines)
    headings = [*table.keys, *(column.name for column in table.columns), "certainty", "note"]
    if found.lines:
        headings += ["our run", *used, "our seeds"]
    lines: list[list[Cell]] = []
    for row in (*table.rows, None):
        beside = [line for line in found.lines if line.row is row]
        # a row of ours that the paper has not stands alone; a row of the paper stands also without ours
        for i, line in enumerate(beside or ([None] if row is not None else [])):
            cells: list[Cell] = [*map(_key, _keys(table, row, line))]
            # the paper's numbers once, however many of ours stand beside them
            cells += _theirs(table, row, marks) if i == 0 or row is None else [""] * (len(table.columns) + 2)
            if found.lines:
                cells += ["-"] * (len(used) + 2) if line is None else _ours(line, list(used.values()))
            lines.append(cells)
    notes = [*_scales(found.lines), *marks.notes, *_notes(table, found, of)]
    for name, told in (("certainty", ""), ("note", ""), ("our seeds", "seeds of every run of ours: {}")):
        at = headings.index(name) if name in headings else None
        values = {str(line[at]) for line in lines} - {"-", ""} if at is not None else set()
        if at is not None and len(values) < 2 and not (name == "note" and values):
            headings.pop(at)
            lines = [[*line[:at], *line[at + 1 :]] for line in lines]
            notes += [told.format(*values)] if told and values else []
    return Section(
        key=f"published-{table.paper}-{table.table}",
        title=table.title,
        headings=headings,
        lines=lines,
        caption="; ".join([f"{of.papers[table.paper].version}, {table.source}", *map(_explained, table.columns)]),
        texts=len(table.keys),
        notes=[
            *notes,
            *(f"{name} = {described(measure, found.lines)}" for name, measure in used.items()),
            *(
                ["(!): the interval may be too short"]
                if any("(!)" in str(cell) for line in lines for cell in line)
                else []
            ),
            *(text for line in found.lines for name, measure in used.items() if (text := line.gap(name, measure))),
        ],
    )


def measures_of(table: PublishedTable, lines: Sequence[Line]) -> dict[str, str]:
    """Heading -> measure of ours: of each column the first that a line has, and another where that leaves lines out."""
    used: dict[str, str] = {}
    for column in table.columns:
        covered: set[int] = set()
        for measure in column.measures:
            new = {i for i, line in enumerate(lines) if line.measured(measure) is not None} - covered
            if new and measure not in used.values():
                kind = f" ({measure.partition(' ')[0]})" if covered else ""
                used[f"ours: {column.name}{kind}"] = measure
            covered |= new
    return used


def _keys(table: PublishedTable, row: Row | None, line: Line | None) -> Sequence[object]:
    if row is not None:
        return row.keys
    return [None if line is None else line.keys.get(name) for name in table.keys]


def _theirs(table: PublishedTable, row: Row | None, marks: _Marks) -> list[Cell]:
    """The paper's numbers of a row, their certainty and its notes; dashes where the paper has no such row."""
    numbers = [None] * len(table.columns) if row is None else row.cells
    certainties = dict.fromkeys(number.certainty for number in numbers if number is not None)
    return [
        *("-" if number is None else str(number) for number in numbers),
        ", ".join(certainties) or "-",
        marks.of(_row_notes(table, row)),
    ]


class _Marks:
    """Numbered notes on single rows; rows of one note share its number."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def of(self, texts: Sequence[str]) -> str:
        """The numbers of these notes."""
        for text in texts:
            if text not in self._texts:
                self._texts.append(text)
        return ", ".join(str(self._texts.index(text) + 1) for text in texts)

    @property
    def notes(self) -> list[str]:
        return [f"note {i + 1}: {text}" for i, text in enumerate(self._texts)]


def _row_notes(table: PublishedTable, row: Row | None) -> list[str]:
    if row is None:
        return ["the paper has no number at this setting"]
    texts = [str(one) for one in table.contradictions if row.keys in one.rows]
    texts += [row.note] if row.note else []
    for column, number in zip(table.columns, row.cells, strict=True):
        if number is not None and number.source != (column.source or table.source):
            texts.append(f"{column.name}: {number.source} ({number.certainty})")
    return texts


def _key(value: object) -> str:
    if value is None:
        return "-"
    return str(getattr(value, "text", f"{value:g}" if isinstance(value, float) else value))


def _ours(line: Line, used: Sequence[str]) -> list[Cell]:
    seeds = ", ".join(map(str, line.records))
    if line.missing:
        seeds += f" (missing: {', '.join(map(str, line.missing))})"
    return [str(line.run), *(_cell(line, measure) for measure in used), seeds]


def _cell(line: Line, measure: str) -> Cell:
    found = line.measured(measure)
    if found is None:
        return "-"
    low, high = (math.nan if found.get(end) is None else float(found[end]) for end in ("low", "high"))
    n, clusters = int(found.get("responses") or found.get("n") or 0), int(found.get("clusters") or 0)
    level, method = float(found.get("level", 0.95)), str(found.get("method", ""))
    estimate = Estimate(float(found["mean"]), low, high, n, clusters, level, method)
    return Value(estimate, _DIGITS.get(measure.partition(" ")[0], 2))


def _explained(column: Column) -> str:
    better = "" if column.better == "neither" else f", {column.better} is better"
    stated = {"value": "", "spread": f", ± {column.spread}"}.get(column.form, f", [{column.spread}]")
    read_off = f", read off to {column.error.text}" if column.error is not None else ""
    source = f", from: {column.source}" if column.source else ""
    unit = "" if column.unit == "none" else f" ({column.unit})"
    return f"{column.name}: {column.metric}{unit}{better}{stated}{read_off}{source}"


def _notes(table: PublishedTable, found: Found, of: Published) -> list[str]:
    words = dict.fromkeys(n.certainty for row in table.rows for n in row.cells if n is not None)
    told = "certainty" if len(words) > 1 else "certainty of every number"
    notes = [f"{told}: " + "; ".join(f"{word} = {of.certainties[word]}" for word in words)]
    notes += [str(one) for one in table.contradictions if not one.rows]
    notes += table.notes
    setting = table.setting
    notes.append(
        f"published runs: model {setting['model']}; data {setting['data']}; prompts: {setting['prompts']}; "
        f"seeds: {setting['seeds']}"
    )
    if table.ours and found.without:
        notes.append(f"no record of ours: {', '.join(dict.fromkeys(found.without))}")
    return notes + found.notes


def _scales(lines: Sequence[Line]) -> list[str]:
    """What our runs were, each kind once, and what may be compared."""
    notes: dict[str, None] = {}
    for line in lines:
        record = next(iter(line.records.values()))
        config, reported = record["config"], record["rows"][line.run.policy].get("metrics", {})
        prompts = next((m["clusters"] for m in reported.values() if m and m.get("clusters")), "?")
        samples = config["evaluate"].get("samples_per_prompt", "?")
        where = "at the paper's scale" if line.run.scale == "paper" else "embedded twin, on a CPU-sized world"
        text = (
            f"our runs ({where}): model {config['model']['name']}; data {config['dataset']['name']}; "
            f"{prompts} {config['evaluate'].get('split', '')} prompts, answers per prompt: {samples}; "
            "[95% prompt-clustered bootstrap] for one seed, smallest to largest for two, Student's t from three on"
        )
        notes[text] = None
        if line.run.changed:
            more = len(line.run.changed) - _CHANGES_SHOWN
            shown = ", ".join(line.run.changed[:_CHANGES_SHOWN]) + (f" and {more} more" if more > 0 else "")
            notes[f"changed from the preset {line.run.experiment}: {shown}"] = None
    first = []
    if any(not line.run.as_published for line in lines):
        first.append(
            "THE SCALES DIFFER: other models, data and units. The paper's numbers and ours must not be compared with "
            "each other, only within themselves"
        )
    if any(line.run.as_published for line in lines):
        first.append("runs at the paper's scale with nothing changed may be read against the paper's numbers")
    return [*first, *notes]


# ---------------------------------------------------------------- files


def csv_text(table: PublishedTable, found: Found, of: Published) -> str:
    """Every number of the paper and of ours in a line of its own, with all that belongs to it (`CSV_COLUMNS`)."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in table.rows:
        for column, number in zip(table.columns, row.cells, strict=True):
            if number is None:
                continue
            stated = {name: getattr(number, name) for name in ("value", "low", "high", "spread")}
            writer.writerow(
                {"table": table.name, "row": _name(row.keys), "column": column.name, "whose": "published"}
                | {"text": str(number), "metric": column.metric, "unit": column.unit, "better": column.better}
                | {name: one.text for name, one in stated.items() if one is not None}
                | {"certainty": number.certainty, "source": f"{of.papers[table.paper].version}, {number.source}"}
                | {"scale": "paper"}
            )
    used = measures_of(table, found.lines)
    for line in found.lines:
        about = {
            "table": table.name,
            "row": _name(_keys(table, line.row, line)),
            "whose": "ours",
            "source": str(line.run),
            "scale": line.run.scale,
            "changed": "; ".join(line.run.changed),
            "seeds": " ".join(map(str, line.records)),
            "missing_seeds": " ".join(map(str, line.missing)),
        }
        for name, measure in used.items():
            cell = _cell(line, measure)
            if isinstance(cell, Value):
                e = cell.estimate.to_dict()
                numbers = {"value": e["mean"], "low": e["low"], "high": e["high"], "n": e["n"] or None}
                writer.writerow(
                    about
                    | {"column": name.removeprefix("ours: "), "metric": described(measure, [line])}
                    | {"text": str(cell), "method": e["method"]}
                    | {key: one for key, one in numbers.items() if one is not None}
                )
    return stream.getvalue()


def _name(keys: Sequence[object]) -> str:
    return " | ".join(_key(key) for key in keys)


def report(
    of: Published,
    tables: Sequence[PublishedTable],
    records: Sequence[Record],
    out: Path,
    notes: Sequence[str],
    say: Callable[[Section, Found], None],
) -> tuple[Path, int]:
    """Write every table as .md, .tex, .csv and, where it has a picture, .png and .pdf, and a page that lists them.

    Args:
        of: The papers' numbers.
        tables: Which of them.
        records: Ours; those of no preset are passed over.
        out: Folder for the files.
        notes: On the records, for the page.
        say: Called with each table as it is made.

    Returns:
        The page, and how many of the records stand in a table.
    """
    used: set[str] = set()
    out.mkdir(parents=True, exist_ok=True)
    page = ["# Published numbers, and ours beside them\n"]
    for paper, about in of.papers.items():
        own = [table for table in tables if table.paper == paper]
        if not own:
            continue
        page.append(f"## {about.title}\n\n{about.version}\n")
        page += ["| table | where | rows | our lines | files |", "| --- | --- | --- | --- | --- |"]
        for table in own:
            found = find(table, records)
            used |= {str(record["run_id"]) for line in found.lines for record in line.records.values()}
            section = section_of(table, found, of)
            base = out / f"{table.paper}-{table.table}"
            named(base, ".md").write_text(section.markdown(), encoding="utf-8")
            named(base, ".tex").write_text(section.latex() + "\n", encoding="utf-8")
            named(base, ".csv").write_text(csv_text(table, found, of), encoding="utf-8")
            endings = [".md", ".tex", ".csv", *([".png", ".pdf"] if picture(table, found.lines, base) else [])]
            files = ", ".join(f"[{ending[1:]}]({named(base, ending).name})" for ending in endings)
            page.append(
                f"| {table.name}: {table.title} | {table.source} | {len(table.rows)} | {len(found.lines)} | {files} |"
            )
            say(section, found)
        page += ["", *(f"- not available: {one}" for one in about.missing), ""]
    page += [f"- {note}" for note in notes]
    path = out / "published.md"
    path.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    return path, len(used)
