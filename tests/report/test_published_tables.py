"""Our runs beside the papers' numbers: which row, at what scale, how many seeds; files, pictures, bad records."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from pictures import assert_picture
from published_records import record, value
from record_files import folder_of
from scipy import stats

from alignbench import presets
from alignbench.jsonio import read_json, write_json
from alignbench.record import experiments_of
from alignbench.report.__main__ import main
from alignbench.report.published import published
from alignbench.report.published_plot import picture
from alignbench.report.published_runs import Line, find
from alignbench.report.published_tables import CSV_COLUMNS, csv_text, section_of
from alignbench.report.runs import collect
from alignbench.report.sections import Section
from alignbench.run import _experiment


def lines(name: str, *records: dict[str, Any]) -> list[Line]:
    return find(published().table(name), records).lines


def section(name: str, *records: dict[str, Any]) -> Section:
    table = published().table(name)
    return section_of(table, find(table, records), published())


def cells(made: Section, *keys: str) -> dict[str, str]:
    """The line with these keys, by heading."""
    (line,) = [line for line in made.lines if [str(cell) for cell in line[: len(keys)]] == list(keys)]
    return dict(zip(made.headings, map(str, line), strict=True))


def told(made: Section, words: str) -> bool:
    return any(words in note for note in made.notes)


# ---------------------------------------------------------------- without records


def test_without_records_the_paper_s_table_stands_alone() -> None:
    made = section("caid/table4")
    assert made.headings == ["method", "b", "helpfulness", "safety", "note"]
    assert cells(made, "multi-shot", "5")["safety"] == "5.758 [5.037, 6.479]"
    assert cells(made, "multi-shot", "6")["note"] == "5"
    assert told(
        made, "note 5: contradiction, helpfulness and safety at b = 6: 8.852 and 6.151 (Table 4; paper); about 9"
    )
    assert told(made, "certainty of every number: paper = stated in the paper")
    assert told(made, "no record of ours: caid/table4_mocaid")
    assert not told(made, "SCALES")
    assert "arXiv 2505.19387v2" in made.caption


def test_numbers_of_several_certainties_say_theirs() -> None:
    made = section("can/table4")
    assert cells(made, "0.1", "-1.4")["certainty"] == "notebook, paper"
    last = cells(made, "3", "-")
    assert (last["predicted"], last["certainty"], last["achieved"]) == ("5.79", "notebook, inferred", "-")
    assert told(made, "its threshold less the reference's mean safety (inferred)")
    assert cells(section("caid/figure1"), "DPO_s")["safety"] == "≈ 13.6"


# ---------------------------------------------------------------- which row


def test_a_twin_stands_beside_the_row_whose_place_in_the_grid_it_has() -> None:
    # the paper's grid begins 2.8, -1.4, ...; the embedded one 0.1, -0.2, ...
    made = section("can/table4", record("can/table4_mocan", point=1, mean=-0.15))
    line = cells(made, "0.1", "-1.4")
    assert line["our run"] == "table4_mocan: twin, -0.2"
    assert line["ours: achieved"] == "-0.15 [-0.25, -0.05]"
    assert line["ours: predicted"] == "-0.15 [-0.17, -0.13]"
    assert cells(made, "0.7547", "2.8")["our run"] == "-"
    assert told(made, "ours: achieved = safety over reference (gold)")
    assert told(made, "model handbook_llama; data handbook; 128 test prompts, answers per prompt: 2")


def test_a_run_at_the_paper_s_scale_stands_beside_its_own_value() -> None:
    (line,) = lines("can/table4", record("can/table4_mocan", scale="paper", point=1))
    assert line.run.as_published
    assert line.row.keys == (0.1, -1.4)


def test_two_constraints_two_keys() -> None:
    made = section("caid/table6", record("caid/table6_mocaid", point=3))
    line = cells(made, "multi-shot", "0.30", "1.20")
    assert line["our run"] == "table6_mocaid: twin, 0, 0.1"
    assert line["ours: harmlessness"].startswith("0.25")
    assert line["ours: humor"].startswith("0.26")
    assert told(made, "ours: humor = politeness over reference (gold)")


def test_policies_of_one_run_stand_beside_rows_of_their_own() -> None:
    names = ("step reward", "p_sacpo q=0.25", "p_sacpo q=0.5", "p_sacpo q=0.75")
    made = section("sacpo/table3", record("sacpo/table3_p_sacpo", policies=names, mean=0.0))
    shown = [cells(made, "P-SACPO", f"q = {q}")["ours: harmlessness"][:5] for q in (0.25, 0.5, 0.75)]
    assert shown == ["0.600", "0.700", "0.800"]


def test_the_released_code_s_variant_is_a_line_of_its_own() -> None:
    runs = [record("can/figure3_mocan", point=2), record("can/figure3_mocan_code", point=2)]
    made = section("can/figure3_scores", *runs)
    both = [line for line in made.lines if list(map(str, line[:2])) == ["MoCAN", "0.35"]]
    assert len(both) == 2
    at = made.headings.index("our run")
    assert [str(line[at]) for line in both] == ["figure3_mocan: twin, 0.35", "figure3_mocan_code: twin, 0.3511"]
    # the paper's numbers once
    assert [str(line[2]) for line in both] == ["≈ 6.1", ""]


def test_only_the_point_that_a_figure_is_about() -> None:
    samples = presets.composed("can/figure4_responses")[1]["method.dual.samples"]
    at = samples.index(128)
    found = lines("can/figure4", *(record("can/figure4_responses", point=k) for k in (at, at - 1)))
    assert [line.row.keys for line in found] == [(2.8,)]
    assert found[0].measured("lambda 1")["mean"] == pytest.approx(0.7 + at)


def test_what_the_paper_has_not_stands_below() -> None:
    one = record("can/table4_mocan")
    one["config"]["constraint"]["thresholds"] = [0.17]
    made = section("can/table4", one)
    last = dict(zip(made.headings, map(str, made.lines[-1]), strict=True))
    assert (last["our run"], last["predicted"], last["achieved"]) == ("table4_mocan: twin, 0.17", "-", "-")
    assert told(made, "the paper has no number at this setting")
    assert len(made.lines) == 10


@pytest.mark.parametrize(
    ("experiment", "key", "given"),
    [("can/table4_mocan", "constraint.thresholds", [0.1, 0.0]), ("can/figure3_mocan", "method.multipliers", None)],
)
def test_a_grid_s_value_of_another_shape_is_beside_no_row(experiment: str, key: str, given: Any) -> None:
    one = record(experiment)
    group, name = key.split(".")
    one["config"][group][name] = given
    table = "can/table4" if "table4" in experiment else "can/figure3_scores"
    (line,) = lines(table, one)
    assert line.row is None


def test_a_grid_s_key_that_the_table_has_not_is_told_when_changed() -> None:
    one = record("sacpo/table3_safe_first")
    assert lines("sacpo/table3", one)[0].run.changed == ()
    one["config"]["method"]["beta_over_lambda"] = [0.3]
    assert lines("sacpo/table3", one)[0].run.changed == ("method.beta_over_lambda=[0.3]",)


def test_a_method_that_the_paper_did_not_run_stands_below() -> None:
    made = section("caid/table4", record("caid/table4_pecaid"))
    assert [str(cell) for cell in made.lines[-1][:4]] == ["PeCAID", "-", "-", "-"]


# ---------------------------------------------------------------- seeds, intervals, gaps


def test_seeds_are_averaged_with_their_interval_and_missing_ones_are_named() -> None:
    means = [0.1, 0.2, 0.6]
    runs = [record("can/table4_mocan", seed=s, mean=m) for s, m in enumerate(means)]
    runs += [record("can/table4_mocan", point=1, seed=s, mean=m) for s, m in enumerate(means[:2])]
    made = section("can/table4", *runs)
    three, two = cells(made, "0.7547", "2.8"), cells(made, "0.1", "-1.4")
    reach = stats.t.ppf(0.975, df=2) * stats.tstd(means) / math.sqrt(3)
    assert three["ours: achieved"] == f"0.30 [{0.3 - reach:.2f}, {0.3 + reach:.2f}]"
    assert three["our seeds"] == "0, 1, 2"
    assert two["ours: achieved"] == "0.15 [0.10, 0.20]"
    assert two["our seeds"] == "0, 1 (missing: 2)"


def test_a_metric_that_is_no_number_for_one_seed_is_shown_for_none() -> None:
    runs = [record("can/table4_mocan", seed=s) for s in (0, 1)]
    runs[1]["rows"]["mocan"]["constraints"]["safety"]["achieved_margin"]["mean"] = None
    made = section("can/table4", *runs, record("can/table4_mocan", point=1))
    assert cells(made, "0.7547", "2.8")["ours: achieved"] == "-"
    assert told(made, "no number of ours: achieved for seed 1, so none is shown for the others")


def test_a_multiplier_that_the_dual_solved_has_the_dual_s_interval() -> None:
    one = record("can/figure1_dual", point=0)
    one["outcome"]["diagnostics"] = {
        "dual": {
            "prompts": 400,
            "responses": 25600,
            "solution": {"names": ["safety"], "multipliers": [0.7]},
            "intervals": {"jackknife": {"level": 0.95, "multipliers": {"safety": [0.6, 0.85]}}},
        }
    }
    assert cells(section("can/figure1", one), "0.5")["ours: lambda*"] == "0.700 [0.600, 0.850]"
    dual = one["outcome"]["diagnostics"]["dual"]
    dual["intervals"]["jackknife"]["multipliers"]["safety"], dual["prompts"] = [0.0, None], 3
    assert cells(section("can/figure1", one), "0.5")["ours: lambda*"] == "0.700 (no interval: n=3)"
    one["rows"]["sft"]["multipliers"]["safety"] = 0.9  # another than the dual's: stepped to, or stated
    assert cells(section("can/figure1", one), "0.5")["ours: lambda*"] == "0.900"


def test_one_seed_in_two_runs_is_counted_once_and_told() -> None:
    found = find(
        published().table("can/table4"),
        [record("can/table4_mocan", run_id="later", created="2026-02-01"), record("can/table4_mocan", run_id="first")],
    )
    assert [line.records[0]["run_id"] for line in found.lines] == ["later"]
    assert found.notes == ["seed 0 of table4_mocan: twin, 0.1 stands in two runs: later is used, first left out"]


# ---------------------------------------------------------------- scales


def test_scales_that_differ_are_told_first_and_nothing_is_compared() -> None:
    runs = [record("caid/table4_mocaid", point=k) for k in range(7)] + [record("caid/table4_mocan")]
    made = section("caid/table4", *runs)
    assert made.notes[0].startswith("THE SCALES DIFFER")
    assert "must not be compared" in made.notes[0]
    text = made.markdown() + made.latex()
    assert "**" not in text
    assert "textbf" not in text
    assert not any(word in " ".join(made.headings) for word in ("difference", "gap", "ratio", "better"))
    # a number of ours is a number of a record: nothing is computed from the paper's
    at = [i for i, heading in enumerate(made.headings) if heading.startswith("ours")]
    shown = {str(line[i]) for line in made.lines for i in at}
    assert shown == {"0.25 [0.15, 0.35]", "-"}


def test_what_was_changed_from_the_preset_is_told_and_a_line_of_its_own() -> None:
    runs = [record("can/table4_mocan"), record("can/table4_mocan", "method.step.train.epochs=7", mean=0.5)]
    made = section("can/table4", *runs)
    rows = [line for line in made.lines if str(line[1]) == "2.8"]
    at = made.headings.index("our run")
    assert [str(line[at]) for line in rows] == ["table4_mocan: twin, 0.1", "table4_mocan: twin, changed, 0.1"]
    assert told(made, "changed from the preset can/table4_mocan: method.step.train.epochs=7")


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("model.revision=abc", True),
        ("model.path=/models/alpaca-7b-reproduced", True),
        ("model.path=/models/another", False),
        ("constraint.beta=0.2", False),
        ("evaluate.samples_per_prompt=1", False),
        ("hardware.processes=4", True),
    ],
)
def test_only_the_preset_itself_is_at_the_paper_s_scale(override: str, same: bool) -> None:
    (line,) = lines("can/table4", record("can/table4_mocan", override, scale="paper"))
    assert line.run.as_published is same


def test_a_changed_threshold_of_a_run_without_a_grid_is_told() -> None:
    (line,) = lines("pd_dpo/figure1", record("pd_dpo/figure1_dual", "constraint.thresholds=[-1.0]"))
    assert line.run.changed == ("constraint.thresholds=[-1.0]",)


def test_at_the_paper_s_scale_numbers_may_be_read_together() -> None:
    made = section("can/table4", record("can/table4_mocan", scale="paper"))
    assert made.notes[0].startswith("runs at the paper's scale with nothing changed may be read against")
    assert not told(made, "SCALES")
    assert "beaver_v1" in " ".join(made.notes)


# ---------------------------------------------------------------- judges


def judged(name: str, point: int, mean: float) -> dict[str, Any]:
    contests = [
        {"row": "sacpo", "opponent": "sft", "criterion": criterion, "win_rate": value(mean)}
        for criterion in ("helpfulness", "safety")
    ]
    return record(name, point=point, judging={"judge": "gpt4_sacpo", "contests": contests, "ratings": {}})


def test_a_judge_s_win_rates_come_before_a_scorer_s() -> None:
    made = section("sacpo/table3", judged("sacpo/table3_dpo_dpo", 0, 0.6))
    assert cells(made, "DPO(H)->DPO(S)", "0.025")["ours: helpfulness"] == "0.600 [0.500, 0.700]"
    assert told(made, "ours: helpfulness = win rate, helpfulness (judge gpt4_sacpo)")
    assert not any("(win)" in heading for heading in made.headings)


def test_where_a_judge_has_not_been_the_scorer_s_stand_in_columns_of_their_own() -> None:
    made = section("sacpo/table3", judged("sacpo/table3_dpo_dpo", 0, 0.6), record("sacpo/table3_dpo_dpo", point=1))
    other = cells(made, "DPO(H)->DPO(S)", "0.01")
    assert (other["ours: harmlessness"], other["ours: harmlessness (win)"]) == ("-", "0.750 [0.650, 0.850]")


def test_ratings_stand_beside_elo() -> None:
    ratings = {"safety": {"bradley_terry": {"pd_dpo": value(1042.0, 30.0)}}}
    one = record("pd_dpo/figure1_fixed", judging={"judge": "gold", "contests": [], "ratings": ratings})
    assert one["outcome"]["reported"] in ("pd_dpo", "pd_dpo_v1")
    ratings["safety"]["bradley_terry"][one["outcome"]["reported"]] = value(1042.0, 30.0)
    line = cells(section("pd_dpo/figure1", one), "PD-DPO")
    assert (line["harmlessness"], line["ours: harmlessness"]) == ("< 1100", "1042 [1012, 1072]")


# ---------------------------------------------------------------- files


def test_the_files_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of([record("can/table4_mocan", point=k, seed=s) for k in (0, 1) for s in (0, 1)], tmp_path / "runs")
    assert main(["published", str(tmp_path / "runs"), "--table", "can/table4"]) == 0
    printed = capsys.readouterr().out
    assert "runs of these tables' presets: 4 of 4" in printed
    assert "THE SCALES DIFFER" in printed
    out = tmp_path / "runs" / "published"
    assert sorted(path.name for path in out.iterdir()) == [
        "can-table4.csv", "can-table4.md", "can-table4.pdf", "can-table4.png", "can-table4.tex", "published.md",
    ]  # fmt: skip
    assert_picture_without_colour(out / "can-table4.png")
    assert "can-table4.tex" in (out / "published.md").read_text()
    rows = list(csv.DictReader((out / "can-table4.csv").read_text().splitlines()))
    assert tuple(rows[0]) == CSV_COLUMNS
    ours = [row for row in rows if row["whose"] == "ours"]
    assert {row["seeds"] for row in ours} == {"0 1"}
    assert {row["scale"] for row in ours} == {"embedded"}
    theirs = next(row for row in rows if row["row"] == "0.5 | 1.2" and row["column"] == "predicted")
    assert (theirs["value"], theirs["certainty"], theirs["whose"]) == ("1.20", "paper", "published")
    assert theirs["source"] == "arXiv 2405.19544v3 (NeurIPS 2024), Table 4"


def assert_picture_without_colour(png: Path) -> None:
    """One series is black: not what `assert_picture` asks, but for the files."""
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("table", published().tables, ids=lambda table: table.name)
def test_every_table_s_latex_is_well_formed(table: Any) -> None:
    text = section(table.name).latex()
    assert text.count(r"\begin{") == text.count(r"\end{")
    columns = next(line for line in text.splitlines() if line.startswith(r"\begin{tabular}")).count
    width = sum(columns(letter) for letter in "lr") - "tabular".count("l") - "tabular".count("r")
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")].splitlines()
    for line in body:
        if line.endswith(r"\\"):
            assert line.replace(r"\&", "").count("&") == width - 1, line
    assert text.isascii(), [c for c in text if not c.isascii()]
    assert not set("#%").intersection(text.replace(r"\#", "").replace(r"\%", ""))
    assert len([line for line in body if line.endswith(r"\\")]) == len(table.rows) + 1


def test_every_number_is_in_the_csv_with_its_source() -> None:
    count = 0
    for table in published().tables:
        rows = list(csv.DictReader(csv_text(table, find(table, []), published()).splitlines()))
        assert len(rows) == sum(cell is not None for row in table.rows for cell in row.cells)
        assert all(row["source"] and row["certainty"] and row["unit"] and row["better"] for row in rows)
        count += len(rows)
    assert count > 300


def test_all_tables_without_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # pictures are tested for themselves: drawing all of them takes seconds
    assert main(["published", "--table", "caid/cost", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "caid-cost.md").exists()
    assert "0 of 0" in capsys.readouterr().out
    page = (tmp_path / "out" / "published.md").read_text()
    assert "not available: PeCAID: the paper reports no result of it" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "can/table9"], "no published table is called 'can/table9'"),
        (["NOWHERE"], "no record.json below"),
    ],
)
def test_what_cannot_be_reported(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path / "nowhere") if word == "NOWHERE" else word for word in arguments]
    assert main(["published", *given, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_record_without_its_configuration_is_left_out_and_told() -> None:
    one = record("can/table4_mocan")
    del one["config"]["constraint"], one["config"]["model"]
    found = find(published().table("can/table4"), [one, record("can/table4_mocan", experiments="can/table4_mocan")])
    assert found.lines == []
    assert found.notes == [f"left out: {one['run_id']}: no model, constraint in its configuration"]


def test_records_of_no_preset_are_counted_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of([record("can/table4_mocan", experiments=[])], tmp_path / "runs")
    (tmp_path / "runs" / "half").mkdir()
    (tmp_path / "runs" / "half" / "record.json").write_text('{"schema": 1')
    assert main(["published", str(tmp_path / "runs"), "--table", "can/cost"]) == 0
    said = capsys.readouterr()
    assert "0 of 1" in said.out
    assert "left out: half: half-written" in said.err


# ---------------------------------------------------------------- pictures


def test_scales_that_differ_have_panels_of_their_own(tmp_path: Path, drawn: list[Any]) -> None:
    table = published().table("caid/table4")
    runs = [record(f"caid/table4_{name}", point=k) for name in ("mocaid", "mocan") for k in range(3)]
    assert picture(table, lines("caid/table4", *runs), tmp_path / "p")
    assert_picture(tmp_path / "p.png")
    (figure,) = drawn
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("CAID, Tables 4 and 5", "ours: embedded twins, another scale")
    assert len(left.containers) == 14
    assert len(right.containers) == 6
    # each panel has its own units
    assert left.get_xlim()[0] > 1 > right.get_xlim()[1]
    assert right.get_xlabel() == "b (ours)"
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"multi-shot", "one-shot"}


def test_one_scale_one_panel(tmp_path: Path, drawn: list[Any]) -> None:
    table = published().table("can/table4")
    assert picture(table, lines("can/table4", record("can/table4_mocan", scale="paper")), tmp_path / "p")
    (figure,) = drawn
    (panel,) = figure.axes
    assert len(panel.containers) == 8 + 1
    assert [c.lines[0].get_markerfacecolor() != "none" for c in panel.containers] == [False] * 8 + [True]
    assert "filled: ours" in figure.get_suptitle()


def test_a_table_without_axes_has_no_picture(tmp_path: Path) -> None:
    assert not picture(published().table("caid/cost"), [], tmp_path / "p")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what a record says of its preset


def test_a_record_names_the_preset_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _experiment() is None
    whole = presets._whole("can/table4_mocan")
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: whole.hydra))
    assert _experiment() == "can/table4_mocan"


def test_a_run_that_two_presets_asked_for_stands_in_both_tables(tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", {"experiments": ["can/table4_mocan"]})
    assert experiments_of(tmp_path, "caid/table4_mocan") == ["caid/table4_mocan", "can/table4_mocan"]
    assert experiments_of(tmp_path, None) == ["can/table4_mocan"]
    assert experiments_of(tmp_path / "nothing", None) == []
    (tmp_path / "record.json").write_text("{")
    assert experiments_of(tmp_path, "caid/table4_mocan") == ["caid/table4_mocan"]


def test_copies_under_two_presets_count_once_in_each_table(tmp_path: Path) -> None:
    one = record("can/table4_mocan")
    folder_of([one, one | {"experiments": ["caid/table4_mocan"]}], tmp_path)
    (found,) = collect(tmp_path).records
    assert found["experiments"] == ["caid/table4_mocan", "can/table4_mocan"]
    assert read_json(tmp_path / "0" / "record.json")["experiments"] == ["can/table4_mocan"]
    assert [line.row.keys for line in lines("caid/table4", found)] == [("one-shot", 5.0)]
    assert [line.row.keys for line in lines("can/table4", found)] == [(0.7547, 2.8)]
