"""Prompts and responses of a dashboard: each text once, and no more of them than a page can carry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignbench.errors import StoreError
from alignbench.jsonio import read_jsonl

# characters of all texts together as JSON, and of one text
BUDGET = 2_000_000
LONGEST = 2_000
_NUMBERS = 40  # what one answer costs besides its text

Answer = list[Any]  # [index of the prompt, index of the response, [score or None per objective]]


@dataclass
class Texts:
    """Answers of every run to the first prompts, side by side, within `BUDGET`.

    `reference` and `reported` hand out lists that are empty until `settle` fills them: as many prompts as fit, the
    same ones for every run, so that nothing stands beside a gap.

    Attributes:
        strings: Every prompt and response once; an answer holds indices.
        found: Answers in the files.
        shown: Answers in the page.
        cut: Texts that were longer than `LONGEST`.
        faults: What is wrong with a run's file -> the runs.
    """

    strings: list[str] = field(default_factory=list)
    found: int = 0
    shown: int = 0
    cut: int = 0
    faults: dict[str, list[str]] = field(default_factory=dict)
    _wanted: list[tuple[list[Answer], list[tuple[str, str, list[float | None]]]]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def reported(self, folder: Path, record: Mapping[str, Any], objectives: Sequence[str]) -> list[Answer]:
        """Answers of a run's reported policy."""
        rows, fault = _rows(folder)
        if fault:
            self.faults.setdefault(fault, []).append(record["run_id"])
        return self._want(rows, record["outcome"]["reported"], objectives)

    def reference(self, folder: Path, record: Mapping[str, Any], objectives: Sequence[str]) -> list[Answer]:
        """Answers of a run's reference, which is its first row."""
        return self._want(_rows(folder)[0], next(iter(record["rows"])), objectives)

    def settle(self) -> None:
        """Fill the lists, prompt by prompt, until a further prompt of all runs would not fit."""
        room = BUDGET
        for k in range(max((len(rows) for _, rows in self._wanted), default=0)):
            level = [(own, rows[k]) for own, rows in self._wanted if k < len(rows)]
            new = {text for _, (prompt, response, _) in level for text in (prompt, response)} - self._places.keys()
            room -= sum(len(json.dumps(_cut(text))) for text in new) + _NUMBERS * len(level)
            if room < 0:
                return
            for own, (prompt, response, scores) in level:
                own.append([self._place(prompt), self._place(response), scores])
                self.shown += 1

    def _want(self, rows: Sequence[Mapping[str, Any]], name: str, objectives: Sequence[str]) -> list[Answer]:
        own: list[Answer] = []
        some = [
            (row["prompt"], row[name], [_score(row.get(f"{name} {objective}")) for objective in objectives])
            for row in rows
            if isinstance(row.get("prompt"), str) and isinstance(row.get(name), str)
        ]
        self.found += len(some)
        self._wanted.append((own, some))
        return own

    def _place(self, text: str) -> int:
        if text not in self._places:
            self._places[text] = len(self.strings)
            self.strings.append(_cut(text))
            self.cut += len(text) > LONGEST
        return self._places[text]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} […: {len(text) - LONGEST} more characters]"


def _score(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _rows(folder: Path) -> tuple[list[dict[str, Any]], str]:
    path = folder / "generations.jsonl"
    if not path.is_file():
        return [], "no generations.jsonl"
    try:
        return [row for row in read_jsonl(path) if isinstance(row, dict)], ""
    except StoreError:
        return [], "generations.jsonl is damaged; the same command writes it again"
