"""The papers' numbers: the file against the documents, against itself and the presets; the schema's refusals."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from alignbench import presets
from alignbench.errors import DataError
from alignbench.report.published import Number, PublishedTable, published, read
from alignbench.report.published_runs import preset

DOCUMENTS = Path(__file__).resolve().parents[3] / "shared" / "papers"
TABLES = published().tables
NUMBER = re.compile(r"(?<![\w.])-?(?:\d+\.\d+|\.\d+|\d+)(?![\w]|\.\d)")


def of(name: str) -> PublishedTable:
    return published().table(name)


def numbers(table: PublishedTable) -> list[tuple[str, Number]]:
    return [
        (f"{table.name} {row.keys} {column.name}", number)
        for row in table.rows
        for column, number in zip(table.columns, row.cells, strict=True)
        if number is not None
    ]


def stated(number: Number) -> list[float]:
    return [one for one in (number.value, number.spread, number.low, number.high) if one is not None]


def column(table: PublishedTable, name: str) -> dict[tuple[Any, ...], Number]:
    (at,) = [i for i, one in enumerate(table.columns) if one.name == name]
    return {row.keys: row.cells[at] for row in table.rows if row.cells[at] is not None}


# ---------------------------------------------------------------- against the documents


@pytest.fixture(scope="module")
def documents() -> str:
    paths = sorted(DOCUMENTS.glob("*.md"))
    if not paths:
        pytest.skip(f"no documents in {DOCUMENTS}")
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def in_text(text: str) -> list[float]:
    return [float(found) for found in NUMBER.findall(text)]


def test_every_number_stands_in_the_documents(documents: str) -> None:
    known = {abs(value) for value in in_text(documents.replace("+-", " ").replace("%", " "))}
    assert len(known) > 300
    for table in TABLES:
        for where, number in numbers(table):
            for value in stated(number):
                assert abs(value) in known, f"{where}: {value}"


def lines_of(documents: str, after: str) -> list[list[str]]:
    """Cells of the first Markdown table after a text."""
    rest = documents[documents.index(after) :].splitlines()
    first = next(i for i, line in enumerate(rest) if line.startswith("|"))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), rest[first:]))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[2:]]


def test_sacpo_s_table_is_the_documents(documents: str) -> None:
    theirs = {}
    for label, help_, harmless in lines_of(documents, "**Table 3, win rate vs SFT"):
        name, setting = re.fullmatch(r"(.*?)(?: (?:q=)?(\.\d+))?(?: \(printed.*\))?", label).groups()
        key = None if setting is None else (f"q = 0{setting}" if " q=" in label else float(setting))
        theirs[name, key] = in_text(f"{help_} {harmless}".replace("+-", " "))
    ours = {row.keys: [value for cell in row.cells for value in stated(cell)] for row in of("sacpo/table3").rows}
    assert ours == theirs
    assert len(ours) == 27


def test_caid_s_tables_are_the_documents(documents: str) -> None:
    cells = {row.keys: [stated(cell) for cell in row.cells if cell] for row in of("caid/table4").rows}
    found = {}
    for b, *columns in lines_of(documents, "### A5.1 Single constraint"):
        multi_help, one_help, multi_safe, one_safe = map(in_text, columns)
        found |= {("multi-shot", float(b)): [multi_help, multi_safe], ("one-shot", float(b)): [one_help, one_safe]}
    assert cells == found
    two = {row.keys: [stated(cell) for cell in row.cells if cell] for row in of("caid/table6").rows}
    for pair, *multi, one in lines_of(documents, "### A5.2 Multi-constraint"):
        margins = tuple(in_text(pair))
        assert two["multi-shot", *margins] == [in_text(cell) for cell in multi]
        assert two["one-shot", *margins][0] == in_text(one.removeprefix("+"))
    assert len(two) == 28


def test_can_s_tables_are_the_documents(documents: str) -> None:
    threshold, predicted, achieved = lines_of(documents, "**Table 4 (MoCAN, predicted margin")
    own = of("can/table4")
    assert [n.value for n in column(own, "threshold").values()] == [float(v) for v in threshold[1:]]
    assert [n.value for n in column(own, "predicted").values()] == [in_text(v)[0] for v in predicted[1:]]
    assert [stated(n) for n in column(own, "achieved").values()] == [in_text(v) for v in achieved[1:-1]]
    shown = [
        tuple(in_text(f"{help_} {safe}"))
        for line in lines_of(documents, "**Fig. 3 middle/right")
        for _, help_, safe in (line[:3], line[4:])
    ]
    cells = [tuple(stated(cell)[0] for cell in row.cells) for row in of("can/figure3_win_rates").rows]
    assert sorted(cells) == sorted(shown)


@pytest.mark.parametrize(
    ("name", "after", "until", "pattern"),
    [
        ("can/figure3_scores", "**Fig. 3 left", "**Fig. 3 middle", r"\((-?[.\d]+),(-?[.\d]+)\)"),
        ("can/pecan_dual", "PeCAN dual (1604", "So the paper's", r"([.\d]+) (\d*\.\d+)[;.](?=\s)"),
        ("caid/figure1", "Single-objective DPO baselines", "Figure 3", r"help (-?[.\d]+), safety (-?[.\d]+)\)"),
        ("caid/figure3", "Figure 3 (optimal lambda", "Too few", r"(\d+): (\d\.\d+)"),
        ("caid/figure5", "Figure 5 (help", "AdvBench", r"(\d) \((\d\.\d+), (\d\.\d+)\)"),
        ("caid/figure6", "AdvBench, Figure 6", "Observation", r"(\d) \((\d\.\d+), (?:about )?(\d\.\d+)\)"),
    ],
)
def test_figures_are_the_documents(name: str, after: str, until: str, pattern: str, documents: str) -> None:
    rest = documents[documents.index(after) :]
    text = rest[: rest.index(until)].replace("b=", "")
    theirs = [tuple(map(float, found)) for found in re.findall(pattern, text)]
    ours = []
    for row in of(name).rows:
        if all(cell.certainty != "inferred" for cell in row.cells):
            keys = [key for key in row.keys if isinstance(key, float)] if len(theirs[0]) > len(row.cells) else []
            ours.append((*keys, *(stated(cell)[0] for cell in row.cells)))
    assert ours == theirs
    assert len(ours) == {"can/figure3_scores": 11, "can/pecan_dual": 20, "caid/figure1": 2, "caid/figure3": 10}.get(
        name, 7
    )


# ---------------------------------------------------------------- against itself


def test_contradictions_and_what_is_missing_are_named() -> None:
    assert {table.name for table in TABLES if table.contradictions} >= {"sacpo/table3", "caid/table4", "can/table4"}
    # of every two statements one differs from the other, and somebody stands behind each
    for table in TABLES:
        for one in table.contradictions:
            assert len({said.value for said in one.said}) == len(one.said)
    assert all(paper.missing for paper in published().papers.values())


def test_the_reference_wins_half_against_itself() -> None:
    for name in ("sacpo/table3", "can/figure3_win_rates"):
        (row,) = [row for row in of(name).rows if row.keys[0] == "SFT"]
        assert [cell.value for cell in row.cells] == [0.5, 0.5]


@pytest.mark.parametrize("name", ["caid/table4", "caid/table6"])
def test_intervals_lie_around_their_means(name: str) -> None:
    for where, number in numbers(of(name)):
        if number.low is not None:
            assert (number.low + number.high) / 2 == pytest.approx(number.value, abs=0.00101), where


def test_equal_rows_are_named_as_a_contradiction() -> None:
    for table in TABLES:
        for a, b in itertools.combinations([row for row in table.rows if any(row.cells)], 2):
            same = [stated(cell) for cell in a.cells if cell] == [stated(cell) for cell in b.cells if cell]
            named = {keys for one in table.contradictions for keys in one.rows}
            # whole rows with intervals; single round numbers may agree
            if same and any(cell and cell.low is not None for cell in a.cells):
                assert {a.keys, b.keys} <= named, f"{table.name}: {a.keys} and {b.keys}"


def test_can_s_margins_are_thresholds_less_the_reference() -> None:
    (reference,) = [r.cells[1].value for r in of("can/notebook_means").rows if r.keys == ("reference", "released")]
    predicted = column(of("can/table4"), "predicted")
    for keys, threshold in column(of("can/table4"), "threshold").items():
        assert threshold.value - reference == pytest.approx(predicted[keys].value, abs=0.006)
    for (threshold,), margin in column(of("can/figure1"), "margin").items():
        assert threshold - reference == pytest.approx(margin.value, abs=0.051)


def test_where_can_s_prediction_misses_its_interval_the_note_says_so() -> None:
    table = of("can/table4")
    outside = [
        keys[0]
        for keys, achieved in column(table, "achieved").items()
        if not achieved.low <= column(table, "predicted")[keys].value <= achieved.high
    ]
    assert outside == [0.5, 0.9]
    assert "the predicted margin lies outside the achieved interval at lambda = 0.5 and 0.9" in table.notes


@pytest.mark.parametrize(
    ("name", "halves"),
    [
        ("can/figure3_win_rates", {"helpfulness": 2 * 129, "safety": 2 * 83}),
        ("caid/figure5", {"helpfulness": 2 * 83, "safety": 2 * 83}),
        ("caid/figure6", {"helpfulness": 200, "safety": 200}),
    ],
)
def test_shares_that_were_read_off_are_shares_of_their_prompts(name: str, halves: dict[str, int]) -> None:
    for criterion, count in halves.items():
        for keys, number in column(of(name), criterion).items():
            # 1/166 is six thousandths: three digits tell a share from what lies between
            if number.bound or len(number.value.text.partition(".")[2]) < 3:
                continue
            nearest = round(number.value * count) / count
            assert number.value == pytest.approx(nearest, abs=0.00051), f"{name} {keys} {criterion}"


@pytest.mark.parametrize("name", ["can/figure1", "can/figure4", "can/pecan_dual", "caid/figure3"])
def test_a_larger_margin_takes_a_larger_multiplier(name: str) -> None:
    values = [number.value for _, number in sorted(column(of(name), "lambda*").items())]
    assert values == sorted(set(values))


def test_caid_s_times_add_up() -> None:
    minutes = {keys[0]: number.value for keys, number in column(of("caid/cost"), "minutes").items()}
    dual = minutes["one dual estimation"]
    assert minutes["one dual estimation, answers"] + minutes["one dual estimation, scores"] == dual
    assert minutes["four epochs of DPO"] == 4 * minutes["one epoch of DPO"]
    assert minutes["three dual estimations more than one-shot"] == 3 * dual
    hours = column(of("caid/cost"), "hours")[("one aligned model",)].value
    assert (minutes["four epochs of DPO"] + 4 * dual) / 60 == hours


# ---------------------------------------------------------------- against the presets

# presets of whose results nothing was published that we know of
WITHOUT_NUMBERS = {
    "sacpo/appendix_h_llama2", "sacpo/appendix_h_pythia", "can/figure3_pecan_beta", "can/figure4_prompts",
    "caid/figure3_prompts", "pd_dpo/truthfulqa_fixed",
}  # fmt: skip
# presets that run what the paper's table has not, beside what it has
FURTHER = {"caid/table4_pecaid", "pd_dpo/figure1_dual", "can/figure3_mocan_code", "can/figure3_pecan_code"}


def test_every_preset_finds_its_table() -> None:
    named = {ours.experiment for table in TABLES for ours in table.ours}
    assert named | WITHOUT_NUMBERS == set(presets.preset_names())
    assert not named & WITHOUT_NUMBERS


GRIDS = [(table, ours) for table in TABLES for ours in table.ours if ours.experiment not in FURTHER]


@pytest.mark.parametrize(("table", "ours"), GRIDS, ids=lambda x: getattr(x, "name", getattr(x, "experiment", "")))
def test_a_preset_s_grid_is_its_table_s_rows(table: PublishedTable, ours: Any) -> None:
    _, twin, paper = preset(ours.experiment, "embedded")
    assert {key: len(points) for key, points in twin.items()} == {key: len(points) for key, points in paper.items()}
    assert set(ours.grid) | set(ours.where) <= set(paper)
    rows = []
    for policy in ours.rows.values() or ({},):
        names = [name for of_key in ours.grid.values() for name in of_key]
        for point in itertools.product(*(paper[key] for key in ours.grid)):
            values = [value for one in point for value in (one if isinstance(one, list) else [one])]
            row = table.row_of({**ours.keys, **policy, **dict(zip(names, values, strict=True))})
            if ours.experiment == "can/figure3_dpo_safe" and values == [0.1]:
                assert row is None  # trained by the paper, and no number of it
                continue
            assert row is not None, (policy, point)
            rows.append(row.keys)
    assert len(set(rows)) == len(rows)


# ---------------------------------------------------------------- the schema

SMALL = """
certainties: {paper: stated, figure: read off}
papers:
  a: {title: A, version: v1}
tables:
  - paper: a
    table: t
    title: T
    source: Table 1
    certainty: paper
    setting: {model: m, data: d, prompts: p, seeds: s}
    keys: [model]
    columns:
      - {name: x, metric: rate, unit: share, better: higher, form: interval, spread: 95%, least: 0, most: 1}
      - {name: y, metric: rate, unit: share, better: higher, form: value}
    rows:
      - {keys: [one], cells: [[0.50, 0.4, 0.6], -1.20]}
      - {keys: [two], cells: [null, {value: 3, certainty: figure, source: Fig. 1, bound: about}]}
    ours: [{experiment: a/t}]
    contradictions:
      - about: one
        rows: [[one]]
        said: [{value: "1", source: Table 1, certainty: paper}, {value: "2", source: Fig. 1, certainty: figure}]
    picture: {x: x, y: y}
"""


def test_a_number_keeps_its_digits_source_and_certainty() -> None:
    (table,) = read(SMALL).tables
    first, second = table.rows
    assert [str(cell) for cell in first.cells] == ["0.50 [0.4, 0.6]", "-1.20"]
    assert (first.cells[0].certainty, first.cells[0].source) == ("paper", "Table 1")
    assert (second.cells[1].certainty, second.cells[1].source) == ("figure", "Fig. 1")
    assert str(second.cells[1]) == "≈ 3"
    assert second.cells[0] is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: T", "title: T\n    title: U", "key 'title' twice"),
        ("table: t", "table: t\n    colour: red", "unknown: colour"),
        ("    source: Table 1\n", "", "missing: source"),
        ("source: Table 1\n", "source: ''\n", "instead of a text"),
        ("source: Fig. 1, bound", "source: 7, bound", "instead of a text"),
        ("{keys: [two]", "{keys: [one]", "row .* twice"),
        ("{name: y,", "{name: x,", "key or column 'x' twice"),
        ("{name: y,", "{name: model,", "key or column 'model' twice"),
        ("[0.50, 0.4, 0.6]", "[0.50, 0.6, 0.4]", "not 0.6 <= 0.50 <= 0.4"),
        ("[0.50, 0.4, 0.6]", "[1.50, 0.4, 1.6]", r"outside \[0, 1\]"),
        ("[0.50, 0.4, 0.6]", "[0.50, 0.4]", r"2 number\(s\) for value, low, high"),
        ("[0.50, 0.4, 0.6]", "[0.50, 0.4, much]", "no number"),
        ("[0.50, 0.4, 0.6]", "[0.50, 0.4, .nan]", "no plain decimal number|no number"),
        ("-1.20", "true", "no number"),
        ("certainty: figure, source", "certainty: sure, source", "unknown 'sure'"),
        ("bound: about", "bound: perhaps", "unknown 'perhaps'"),
        ("better: higher, form: value", "better: bigger, form: value", "unknown 'bigger'"),
        ("form: value", "form: values", "unknown 'values'"),
        ("spread: 95%, ", "", "instead of a text"),
        ("cells: [[0.50, 0.4, 0.6], -1.20]", "cells: [-1.20]", "1 cells for x, y"),
        ("cells: [[0.50, 0.4, 0.6], -1.20]", "cells: [null, null]", "no number in the row"),
        ("seeds: s}", "seed: s}", "missing: seeds"),
        ("rows: [[one]]", "rows: [[three]]", "no row"),
        (', {value: "2", source: Fig. 1, certainty: figure}]', "]", "fewer than two"),
        ("picture: {x: x, y: y}", "picture: {x: x, y: z}", "unknown 'z'"),
        ("experiment: a/t", "experiment: a/t, keys: {colour: red}", "unknown 'colour'"),
        ("paper: a\n", "paper: b\n", "unknown paper 'b'"),
        ("    rows:\n", "    rows: 3\n    row:\n", "unknown: row"),
        ("tables:", "tables: [", "repair the YAML"),
    ],
)
def test_what_breaks_the_schema_is_refused(old: str, new: str, message: str) -> None:
    assert SMALL.count(old) >= 1
    with pytest.raises(DataError, match=message):
        read(SMALL.replace(old, new, 1))


def test_a_table_twice_is_refused() -> None:
    again = SMALL[SMALL.index("  - paper: a") :]
    with pytest.raises(DataError, match="table 'a/t' twice"):
        read(SMALL + again)


def test_an_unknown_table_lists_those_that_are_there() -> None:
    with pytest.raises(DataError, match=r"sacpo/table3, .*caid/table6"):
        of("sacpo/table9")
