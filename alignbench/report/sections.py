"""Tables of a report in one form, written as Markdown, LaTeX (booktabs), CSV and for a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from alignbench.report.stats import Estimate
from alignbench.report.table import cell
from alignbench.report.thresholds import markdown

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "≈": r"$\approx$", "±": r"$\pm$",
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A number of a table.

    Attributes:
        estimate: With its interval; NaN ends where there is none.
        digits: Decimals that are shown; files for machines have all.
    """

    estimate: Estimate
    digits: int = 2

    def __str__(self) -> str:
        return cell(self.estimate.to_dict(), self.digits)


Cell = str | Value


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        key: Short name, for the CSV and LaTeX labels.
        title: What it is.
        headings: One per column; the first columns are text.
        lines: Rows.
        caption: How to read it.
        texts: Leading columns of text, left-aligned.
        notes: Sentences below it.
    """

    key: str
    title: str
    headings: Sequence[str]
    lines: Sequence[Sequence[Cell]]
    caption: str
    texts: int = 1
    notes: Sequence[str] = ()

    def terminal(self) -> Table:
        """For a terminal."""
        table = Table(title=escape(self.title), caption=escape(self.caption))
        for i, heading in enumerate(self.headings):
            table.add_column(escape(heading), justify="left" if i < self.texts else "right", overflow="fold")
        for line in self.lines:
            table.add_row(*(escape(str(value)) for value in line))
        return table

    def markdown(self) -> str:
        """With its title as a heading and its caption below."""
        lines = [[str(value) for value in line] for line in self.lines]
        below = "".join(f"\n- {note}" for note in self.notes)
        text = f"## {self.title}\n\n{markdown(list(self.headings), lines)}\n\n{self.caption}\n"
        return f"{text}{below}\n" if below else text

    def latex(self) -> str:
        """A table environment for booktabs."""
        columns = "l" * self.texts + "r" * (len(self.headings) - self.texts)
        rows = [" & ".join(latex(str(value)) for value in line) + r" \\" for line in self.lines]
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{latex(self.title)}. {latex(self.caption[:1].upper() + self.caption[1:])}.}}",
                rf"\label{{tab:{self.key}}}",
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                " & ".join(latex(heading) for heading in self.headings) + r" \\",
                r"\midrule",
                *rows,
                r"\bottomrule",
                r"\end{tabular}",
                *([r"\footnotesize\raggedright"] if self.notes else []),
                *(rf"\par {latex(note)}" for note in self.notes),
                r"\end{table}",
            ]
        )


def latex(text: str) -> str:
    """Text with LaTeX's own characters escaped, and a proper minus before digits."""
    escaped = "".join(_LATEX.get(character, character) for character in text).replace(r"-\textgreater{}", r"$\to$")
    # an option's value or a range keeps its hyphen: a minus is one that starts a number
    words = escaped.replace("[-", "[$-$").split(" ")
    return " ".join(f"$-${word[1:]}" if word[:1] == "-" and word[1:2].isdigit() else word for word in words)


def csv_text(sections: Sequence[Section]) -> str:
    """All tables in long form: one line per cell, with full precision.

    Columns: table, row (its leading texts), column, text, mean, low, high, n, prompts, level, method; the last seven
    are empty for text.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["table", "row", "column", "text", "mean", "low", "high", "n", "prompts", "level", "method"])
    for section in sections:
        for line in section.lines:
            row = " | ".join(str(value) for value in line[: section.texts])
            for heading, value in list(zip(section.headings, line, strict=True))[section.texts :]:
                numbers: list[object] = [""] * 7
                if isinstance(value, Value):
                    e = value.estimate.to_dict()
                    order = ("mean", "low", "high", "n", "clusters", "level", "method")
                    # a difference of two methods has no one number of responses
                    numbers = ["" if e[name] is None or (name, e[name]) == ("n", 0) else e[name] for name in order]
                writer.writerow([section.key, row, heading, str(value), *numbers])
    return stream.getvalue()
