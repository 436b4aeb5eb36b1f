"""The papers' published numbers: published.yaml, read with a strict schema.

A table has *keys* (what tells its rows apart: model, setting) and *columns* (what was measured). Every number has a
source and a certainty, its table's unless the column or the number itself says otherwise. A cell is written by its
column's form: `value` a number, `spread` [value, spread], `interval` [value, low, high], `range` [low, high]; or, where
a number differs from its column in anything, a mapping {value, low, high, spread, bound, certainty, source}; or null.
Numbers keep the digits they are written with: 0.490 was stated to three.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import yaml

from alignbench.errors import DataError

FILE = Path(__file__).with_name("published.yaml")
FORMS = {
    "value": ("value",),
    "spread": ("value", "spread"),
    "interval": ("value", "low", "high"),
    "range": ("low", "high"),
}
BETTER = ("higher", "lower", "neither")
BOUNDS = {"about": "≈ ", "below": "< ", "above": "> "}
#: How near a grid's value is to a key that the paper rounds.
_NEAR = 0.005
_MEASURES = ("gain", "win", "margin", "predicted", "lambda", "judged", "rating")


class Stated(float):
    """A number with the digits it was stated with."""

    text: str

    def __new__(cls, text: str) -> Stated:
        """From the text in the file."""
        made = super().__new__(cls, text)
        made.text = text
        return made


Key = str | Stated | None


@dataclass(frozen=True)
class Number:
    """One published number.

    Attributes:
        value: As stated; None where only a range was.
        low: Lower end of the stated interval or range.
        high: Upper end.
        spread: The stated spread.
        bound: "about", "below", "above", or "" for the number itself.
        certainty: One of the file's certainties.
        source: Where it stands.
    """

    value: Stated | None
    low: Stated | None
    high: Stated | None
    spread: Stated | None
    bound: str
    certainty: str
    source: str

    def __str__(self) -> str:
        # what was read off a picture must not pass for a printed number
        sign = BOUNDS[self.bound or "about"] if self.bound or self.certainty == "figure" else ""
        text = "" if self.value is None else self.value.text
        if self.spread is not None:
            text += f" ± {self.spread.text}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low.text}, {self.high.text}]"
        return f"{sign}{text.strip()}"


@dataclass(frozen=True)
class Column:
    """What was measured.

    Attributes:
        name: Heading.
        metric: What the number is.
        unit: Its unit.
        better: "higher", "lower" or "neither".
        form: How its cells are written.
        spread: What the stated spread or interval is.
        least: No number of the column is smaller.
        most: No number of the column is larger.
        error: How far a number that was read off a figure may be off.
        certainty: In place of the table's.
        source: In place of the table's.
        measures: What of our records stands beside it, the first that they have: "gain reward", "win reward", "win 1"
            (of the first utility), "margin 1", "predicted 1", "lambda 1", "judged safety", "rating safety".
    """

    name: str
    metric: str
    unit: str
    better: str
    form: str
    spread: str = ""
    least: float = -math.inf
    most: float = math.inf
    error: Stated | None = None
    certainty: str = ""
    source: str = ""
    measures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        keys: A value per key of the table.
        cells: A number per column, or None.
        note: What a reader must know of this row.
    """

    keys: tuple[Key, ...]
    cells: tuple[Number | None, ...]
    note: str = ""


@dataclass(frozen=True)
class Said:
    """One of the statements that contradict each other."""

    value: str
    source: str
    certainty: str


@dataclass(frozen=True)
class Contradiction:
    """What a paper (or a paper and its code) says in several ways.

    Attributes:
        about: The matter.
        said: The statements, at least two.
        rows: Keys of the rows that it is about; empty: the whole table.
    """

    about: str
    said: tuple[Said, ...]
    rows: tuple[tuple[Key, ...], ...] = ()

    def __str__(self) -> str:
        said = "; ".join(f"{one.value} ({one.source}; {one.certainty})" for one in self.said)
        return f"contradiction, {self.about}: {said}"


@dataclass(frozen=True)
class Ours:
    """Which records stand beside a table's rows.

    Attributes:
        experiment: Their preset.
        keys: Keys that they share.
        grid: Swept configuration key -> the table's keys that its values are.
        rows: Policy of the record -> keys of its row; empty: the reported policy.
        where: Swept configuration key -> the one value, at the paper's scale, that the table is about.
    """

    experiment: str
    keys: Mapping[str, Key] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Key]] = dataclasses.field(default_factory=dict)
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """What a table's picture shows.

    Attributes:
        x: Key or column of the horizontal axis.
        y: Column of the vertical axis.
        by: Key whose values are series; "" for one series.
        identity: Whether x and y have one unit and their equality is a line.
    """

    x: str
    y: str
    by: str = ""
    identity: bool = False


@dataclass(frozen=True)
class PublishedTable:
    """One table or figure of a paper.

    Attributes:
        paper: The paper's short name.
        table: The table's, within the paper.
        title: What it is.
        source: Table, figure, section or code in which its numbers stand.
        certainty: Of its numbers, unless they say otherwise.
        setting: `model`, `data`, `prompts` and `seeds` of the published runs.
        keys: Names of what tells rows apart.
        columns: What was measured.
        rows: The numbers.
        ours: Which records stand beside them.
        contradictions: Where the paper contradicts itself or its code.
        notes: What else a reader must know.
        picture: What its picture shows; None: none.
    """

    paper: str
    table: str
    title: str
    source: str
    certainty: str
    setting: Mapping[str, str]
    keys: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    ours: tuple[Ours, ...] = ()
    contradictions: tuple[Contradiction, ...] = ()
    notes: tuple[str, ...] = ()
    picture: Picture | None = None

    @property
    def name(self) -> str:
        """PAPER/TABLE."""
        return f"{self.paper}/{self.table}"

    def row_of(self, keys: Mapping[str, Any]) -> Row | None:
        """The first row with these keys, whatever its others are; None where the paper has no such row."""
        wanted = [(i, keys[name]) for i, name in enumerate(self.keys) if name in keys]
        return next((row for row in self.rows if all(same_key(row.keys[i], value) for i, value in wanted)), None)


@dataclass(frozen=True)
class Paper:
    """One paper.

    Attributes:
        title: Methods.
        version: What was read.
        missing: Published numbers that were not available to us.
    """

    title: str
    version: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """The whole file.

    Attributes:
        certainties: Word -> its meaning.
        papers: By short name.
        tables: In the file's order.
    """

    certainties: Mapping[str, str]
    papers: Mapping[str, Paper]
    tables: tuple[PublishedTable, ...]

    def table(self, name: str) -> PublishedTable:
        """The table PAPER/TABLE.

        Raises:
            DataError: There is none of that name.
        """
        for table in self.tables:
            if table.name == name:
                return table
        known = ", ".join(table.name for table in self.tables)
        raise DataError(f"no published table is called {name!r}", where="--table", mend=f"one of: {known}")


def same_key(stated: Key, given: Any) -> bool:
    """Whether a value is a row's key, which may be rounded (0.35 for 0.3511)."""
    if isinstance(stated, float) and isinstance(given, int | float):
        return abs(stated - given) <= _NEAR
    return bool(stated == given)


# ---------------------------------------------------------------- reading


@cache
def published() -> Published:
    """The papers' numbers."""
    return read(FILE.read_text(encoding="utf-8"), FILE.name)


def read(text: str, name: str = "published.yaml") -> Published:
    """The papers' numbers from the file's text.

    Raises:
        DataError: The text is no YAML, has a key twice, or breaks the schema; the message names the table and row.
    """
    try:
        whole = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        _refuse(str(error).replace("\n", " "), name, "repair the YAML")
    _keys(whole, {"certainties", "papers", "tables"}, set(), name)
    certainties = _texts(whole["certainties"], f"{name}: certainties")
    papers = {}
    for key, paper in _mapping(whole["papers"], f"{name}: papers").items():
        where = f"{name}: papers.{key}"
        _keys(paper, {"title", "version"}, {"missing"}, where)
        missing = tuple(_text(one, where) for one in _list(paper.get("missing", []), where))
        papers[str(key)] = Paper(_text(paper["title"], where), _text(paper["version"], where), missing)
    tables = tuple(_table(one, certainties, papers, name) for one in _list(whole["tables"], f"{name}: tables"))
    _unique((table.name for table in tables), f"{name}: tables", "table")
    return Published(certainties, papers, tables)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key twice and keeps the digits of numbers."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Stated:
    text = str(loader.construct_scalar(node))
    try:
        return Stated(text)
    except ValueError:
        raise yaml.constructor.ConstructorError(
            None, None, f"{text!r} is no plain decimal number", node.start_mark
        ) from None


def _once(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


for _tag in ("float", "int"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)
_Loader.add_constructor("tag:yaml.org,2002:map", _once)


def _table(given: Any, certainties: Mapping[str, str], papers: Mapping[str, Paper], name: str) -> PublishedTable:
    required = {"paper", "table", "title", "source", "certainty", "setting", "keys", "columns", "rows"}
    where = f"{name}: {given.get('paper')}/{given.get('table')}" if isinstance(given, Mapping) else name
    _keys(given, required, {"ours", "contradictions", "notes", "picture"}, where)
    if given["paper"] not in papers:
        _refuse(f"unknown paper {given['paper']!r}", where, f"one of: {', '.join(papers)}")
    setting = _texts(given["setting"], f"{where}: setting")
    _keys(setting, {"model", "data", "prompts", "seeds"}, set(), f"{where}: setting")
    keys = tuple(_text(key, f"{where}: keys") for key in _list(given["keys"], f"{where}: keys"))
    source = _text(given["source"], f"{where}: source")
    certainty = _one_of(given["certainty"], certainties, f"{where}: certainty")
    columns = tuple(_column(one, certainties, where) for one in _list(given["columns"], f"{where}: columns"))
    _unique((*keys, *(column.name for column in columns)), where, "key or column")
    table = PublishedTable(
        paper=str(given["paper"]),
        table=_text(given["table"], where),
        title=_text(given["title"], where),
        source=source,
        certainty=certainty,
        setting=setting,
        keys=keys,
        columns=columns,
        rows=tuple(
            _row(one, keys, columns, (source, certainty), certainties, where)
            for one in _list(given["rows"], f"{where}: rows")
        ),
        ours=tuple(_ours(one, keys, where) for one in _list(given.get("ours", []), f"{where}: ours")),
        notes=tuple(_text(one, f"{where}: notes") for one in _list(given.get("notes", []), f"{where}: notes")),
        picture=_picture(given["picture"], keys, columns, where) if "picture" in given else None,
    )
    _unique((row.keys for row in table.rows), where, "row")
    said = _list(given.get("contradictions", []), f"{where}: contradictions")
    return dataclasses.replace(
        table, contradictions=tuple(_contradiction(one, table, certainties, where) for one in said)
    )


def _column(given: Any, certainties: Mapping[str, str], where: str) -> Column:
    here = f"{where}: column {given.get('name')}" if isinstance(given, Mapping) else where
    fields = {field.name for field in dataclasses.fields(Column)}
    _keys(given, {"name", "metric", "unit", "better", "form"}, fields, here)
    form = _one_of(given["form"], FORMS, f"{here}: form")
    spread = _text(given.get("spread", ""), here, empty=form == "value")
    measures = tuple(_text(one, here) for one in _list(given.get("measures", []), here))
    for measure in measures:
        _one_of(measure.partition(" ")[0], _MEASURES, f"{here}: measures")
    return Column(
        name=_text(given["name"], here),
        metric=_text(given["metric"], here),
        unit=_text(given["unit"], here),
        better=_one_of(given["better"], BETTER, f"{here}: better"),
        form=form,
        spread=spread,
        least=float(given.get("least", -math.inf)),
        most=float(given.get("most", math.inf)),
        error=given.get("error"),
        certainty=_one_of(given["certainty"], certainties, f"{here}: certainty") if "certainty" in given else "",
        source=_text(given.get("source", ""), here, empty=True),
        measures=measures,
    )


def _row(
    given: Any,
    keys: Sequence[str],
    columns: Sequence[Column],
    defaults: tuple[str, str],
    certainties: Mapping[str, str],
    where: str,
) -> Row:
    here = f"{where}: row {given.get('keys')}" if isinstance(given, Mapping) else where
    _keys(given, {"keys", "cells"}, {"note"}, here)
    own, cells = _list(given["keys"], here), _list(given["cells"], here)
    for what, values, names in (("keys", own, keys), ("cells", cells, [column.name for column in columns])):
        if len(values) != len(names):
            _refuse(f"{len(values)} {what} for {', '.join(names)}", here, f"give {len(names)}, null for none")
    numbers = tuple(
        None if cell is None else _cell(cell, column, defaults, certainties, f"{here}, {column.name}")
        for cell, column in zip(cells, columns, strict=True)
    )
    if all(number is None for number in numbers):
        _refuse("no number in the row", here, "leave the row out")
    return Row(_own_keys(own, here), numbers, _text(given.get("note", ""), here, empty=True))


def _cell(given: Any, column: Column, defaults: tuple[str, str], certainties: Mapping[str, str], where: str) -> Number:
    names = FORMS[column.form]
    if not isinstance(given, Mapping):
        values = given if isinstance(given, list) else [given]
        if len(values) != len(names):
            _refuse(f"{len(values)} number(s) for {', '.join(names)}", where, "give a number for each, or a mapping")
        given = dict(zip(names, values, strict=True))
    _keys(given, set(), {"value", "low", "high", "spread", "bound", "certainty", "source"}, where)
    found = {name: given.get(name) for name in ("value", "low", "high", "spread")}
    for name, value in found.items():
        if value is not None and not (isinstance(value, Stated) and math.isfinite(value)):
            _refuse(f"{name} is {value!r}, no number", where, "give a finite number")
    value, low, high, spread = found.values()
    if (low is None) != (high is None) or (value is None and low is None):
        _refuse("neither a value nor both ends of a range", where, "give value, or low and high")
    if low is not None and not low <= (low if value is None else value) <= high:
        _refuse(f"not {low.text} <= {'' if value is None else value.text + ' <= '}{high.text}", where, "see the source")
    if spread is not None and (spread < 0 or value is None):
        _refuse("a spread that is negative or of no value", where, "see the source")
    for one in (value, low, high):
        if one is not None and not column.least <= one <= column.most:
            _refuse(f"{one.text} is outside [{column.least:g}, {column.most:g}]", where, "see the source")
    return Number(
        value=value,
        low=low,
        high=high,
        spread=spread,
        bound=_one_of(given["bound"], BOUNDS, where) if "bound" in given else "",
        certainty=_one_of(given.get("certainty") or column.certainty or defaults[1], certainties, where),
        source=_text(given.get("source") or column.source or defaults[0], where),
    )


def _ours(given: Any, keys: Sequence[str], where: str) -> Ours:
    here = f"{where}: ours {given.get('experiment')}" if isinstance(given, Mapping) else where
    _keys(given, {"experiment"}, {"keys", "grid", "rows", "where"}, here)
    own = _mapping(given.get("keys", {}), here)
    grid = {str(key): tuple(_list(names, here)) for key, names in _mapping(given.get("grid", {}), here).items()}
    rows = {str(row): _mapping(of, here) for row, of in _mapping(given.get("rows", {}), here).items()}
    for names in (own, *grid.values(), *rows.values()):
        for name in names:
            _one_of(name, keys, f"{here}: keys of the table")
    return Ours(_text(given["experiment"], here), own, grid, rows, _mapping(given.get("where", {}), here))


def _contradiction(given: Any, table: PublishedTable, certainties: Mapping[str, str], where: str) -> Contradiction:
    here = f"{where}: contradiction about {given.get('about')}" if isinstance(given, Mapping) else where
    _keys(given, {"about", "said"}, {"rows"}, here)
    said = []
    for one in _list(given["said"], here):
        _keys(one, {"value", "source", "certainty"}, set(), here)
        certainty = _one_of(one["certainty"], certainties, here)
        said.append(Said(_text(one["value"], here), _text(one["source"], here), certainty))
    if len(said) < 2:
        _refuse("fewer than two statements", here, "a contradiction has at least two")
    rows = tuple(_own_keys(_list(keys, here), here) for keys in _list(given.get("rows", []), here))
    for keys in rows:
        if keys not in [row.keys for row in table.rows]:
            _refuse(f"the table has no row {list(keys)}", here, "name a row by all of its keys")
    return Contradiction(_text(given["about"], here), tuple(said), rows)


def _picture(given: Any, keys: Sequence[str], columns: Sequence[Column], where: str) -> Picture:
    here = f"{where}: picture"
    _keys(given, {"x", "y"}, {"by", "identity"}, here)
    names = [column.name for column in columns]
    by = _one_of(given["by"], keys, here) if "by" in given else ""
    x, y = _one_of(given["x"], (*keys, *names), here), _one_of(given["y"], names, here)
    return Picture(x, y, by, bool(given.get("identity", False)))


# ---------------------------------------------------------------- checks


def _refuse(what: str, where: str, mend: str) -> NoReturn:
    raise DataError(what, where=where, mend=mend)


def _keys(given: Any, required: set[str], optional: set[str], where: str) -> None:
    if not isinstance(given, Mapping):
        _refuse(f"a {type(given).__name__} instead of a mapping", where, "see alignbench/report/published.py")
    missing, unknown = sorted(required - set(given)), sorted(map(str, set(given) - required - optional))
    if missing:
        _refuse(f"missing: {', '.join(missing)}", where, "state it")
    if unknown:
        known = ", ".join(sorted(required | optional))
        _refuse(f"unknown: {', '.join(unknown)}", where, f"known: {known}")


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        _refuse(f"a {type(given).__name__} instead of a mapping", where, "see alignbench/report/published.py")
    return dict(given)


def _list(given: Any, where: str) -> list[Any]:
    if not isinstance(given, list):
        _refuse(f"a {type(given).__name__} instead of a list", where, "see alignbench/report/published.py")
    return given


def _texts(given: Any, where: str) -> dict[str, str]:
    return {str(key): _text(value, f"{where}.{key}") for key, value in _mapping(given, where).items()}


def _text(given: Any, where: str, *, empty: bool = False) -> str:
    if not isinstance(given, str) or (not given.strip() and not empty):
        _refuse(f"{given!r} instead of a text", where, "write a text, in quotes where it is a number")
    return given


def _own_keys(given: list[Any], where: str) -> tuple[Key, ...]:
    for key in given:
        if key is not None and not isinstance(key, str | Stated):
            _refuse(f"key {key!r}", where, "a text, a number or null")
    return tuple(given)


def _one_of(given: Any, known: Iterable[str], where: str) -> str:
    if given not in (names := list(known)):
        _refuse(f"unknown {given!r}", where, f"one of: {', '.join(names)}")
    return str(given)


def _unique(given: Iterable[Hashable], where: str, what: str) -> None:
    seen: set[Hashable] = set()
    for one in given:
        if one in seen:
            _refuse(f"{what} {one!r} twice", where, "each stands once")
        seen.add(one)
