"""Comparisons from run folders made by hand: every table's numbers, files, picture, bad records."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_records import PROMPTS, SAMPLES, write_run
from scipy import stats as scipy_stats

from alignbench.errors import ConfigError, DataError
from alignbench.record import PER_PROMPT
from alignbench.report.__main__ import main
from alignbench.report.compare import (
    calibration,
    constrained_best,
    costs,
    differences,
    feasible,
    fronts,
    lower_bound,
    sections_of,
    to_beta,
    to_seed,
    volume,
    volumes,
)
from alignbench.report.crossed import cross, holm
from alignbench.report.entries import REFERENCE, Entry, Group, groups_of, paired
from alignbench.report.front import hypervolume
from alignbench.report.runs import collect
from alignbench.report.sections import Section, Value, latex


def group(folder: Path) -> Group:
    (found,) = groups_of(collect(folder))
    return found


def entry(found: Group, series: str, asked: tuple[float, ...] | None = None) -> Entry:
    (one,) = [e for e in found.entries if e.series == series and asked in (None, e.thresholds)]
    return one


def cells(section: Section, *lead: str) -> dict[str, Any]:
    (line,) = [line for line in section.lines if tuple(map(str, line[: len(lead)])) == lead]
    return dict(zip(section.headings, line, strict=True))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three methods, three seeds, two thresholds: safe and dear, greedy, dominated."""
    for seed in range(3):
        for asked in (0.2, 0.4):
            write_run(tmp_path, "careful", seed=seed, asked=(asked,), reward=-0.2, safety=asked + 0.2)
            write_run(tmp_path, "greedy", seed=seed, asked=(asked,), reward=0.5, safety=0.0)
            write_run(tmp_path, "worse", seed=seed, asked=(asked,), reward=-0.6, safety=0.11 + asked / 2)
    return tmp_path


# ---------------------------------------------------------------- numbers


def test_entries_hold_seeds_by_prompts(sweep: Path) -> None:
    found = group(sweep)
    assert [e.series for e in found.entries] == [REFERENCE, *(m for m in ("careful", "greedy", "worse") for _ in "ab")]
    one = entry(found, "careful", (0.2,))
    assert one.values["reward"].shape == (3, PROMPTS)
    assert (one.seeds, one.missing, one.responses) == ((0, 1, 2), (), 3 * PROMPTS * SAMPLES)
    assert one.slacks["safety"].mean() == pytest.approx(0.2)
    assert one.requested == {"safety": 0.2}
    own, base = (entry(found, name).values["safety"] for name in (REFERENCE, REFERENCE))
    assert own is base
    assert one.values["safety"].mean() - own.mean() == pytest.approx(0.4)


def test_feasibility_is_a_lower_bound(sweep: Path) -> None:
    found = group(sweep)
    assert [feasible(found, entry(found, name, (0.2,))) for name in ("careful", "greedy", "worse")] == [
        "yes", "no", "likely",
    ]  # fmt: skip
    slack = entry(found, "careful", (0.2,)).slack("safety")
    assert slack is not None
    t = scipy_stats.t.ppf(0.95, [PROMPTS - 1, 2])
    parts = slack.parts
    total = parts[0][0] + parts[1][0]
    expected = slack.mean - math.sqrt(total) * t[0] ** (parts[0][0] / total) * t[1] ** (parts[1][0] / total)
    assert lower_bound(slack) == pytest.approx(expected)


def test_differences_are_paired_and_corrected(sweep: Path) -> None:
    found = group(sweep)
    section = differences(found, None)
    assert len(section.lines) == 2 * 6  # pairs of four, at two thresholds
    line = cells(section, "careful - greedy", "0.2")
    assert line["reward"].estimate.mean == pytest.approx(-0.7)
    pair = paired(entry(found, "careful", (0.2,)), entry(found, "greedy", (0.2,)), "reward")
    assert pair is not None
    assert line["reward"].estimate == pair[0].interval(0.95)
    alone = entry(found, "careful", (0.2,)).mean("reward")
    assert alone is not None
    assert pair[0].error < 0.5 * alone.error, "what prompts contribute to both cancels"
    every = [
        paired(*sides, name)[0].p_value  # type: ignore[index]
        for sides in [
            (a, b) for asked in found.asked for i, b in enumerate(found.at(asked)) for a in found.at(asked)[i + 1 :]
        ]
        for name in found.objectives
    ]
    assert f"all {len(every)} tests" in section.caption
    shown = [line[section.headings.index("p safety")] for line in section.lines]
    adjusted = holm(every)[1::2]
    assert sorted(shown) == sorted(f"{p:.3f}" if p >= 0.001 else "<0.001" for p in adjusted)


def test_against_one_method(sweep: Path) -> None:
    found = group(sweep)
    section = differences(found, REFERENCE)
    assert {str(line[0]) for line in section.lines} == {f"{m} - reference" for m in ("careful", "greedy", "worse")}
    with pytest.raises(ConfigError, match="one of: careful, greedy, reference, worse"):
        sections_of(found, against="nobody")


def test_best_regret_and_front(sweep: Path) -> None:
    found = group(sweep)
    entries = [e for e in found.at((0.2,)) if e.thresholds]
    winner = constrained_best(found, entries)
    assert winner is not None
    assert winner.series == "careful"
    assert fronts(found, entries) == {"careful": "yes", "greedy": "yes", "worse": "no: careful, surely"}
    line = cells(next(s for s in sections_of(found) if s.key == "best"), "greedy", "0.2")
    assert line["regret"].estimate.mean == pytest.approx(-0.7)
    assert line["largest violation"] == "0.20"
    difference = differences(found, None)
    plain = cells(difference, "careful - greedy", "0.2")["reward"].estimate
    wide = line["regret"].estimate
    assert wide.high - wide.low > plain.high - plain.low, "three pairs at once"


def test_without_any_feasible_method_there_is_no_best(tmp_path: Path) -> None:
    write_run(tmp_path, "greedy", safety=-1.0)
    found = group(tmp_path)
    assert constrained_best(found, found.entries[1:]) is None
    assert cells(next(s for s in sections_of(found) if s.key == "best"), "greedy")["regret"] == "-"


def test_hypervolumes(sweep: Path) -> None:
    found = group(sweep)
    own = [e for e in found.entries if e.series == "careful"]
    points = [[e.values[name].mean() for name in found.objectives] for e in own]
    line = cells(volumes(found, [-2.0, -2.0]), "careful")
    assert line["hypervolume"].estimate.mean == pytest.approx(hypervolume(points, [-2, -2]))
    assert line["points"] == "2"
    # one point: the volume is a product, and the delta method its closed form
    single = volume(own[:1], found.objectives, np.array([-2.0, -2.0]))
    (x, y), (a, b) = points[0], (own[0].values[name] for name in found.objectives)
    linear = cross((y + 2) * a + (x + 2) * b)
    assert single.high - single.mean == pytest.approx(linear.interval(0.95).high - linear.mean, rel=1e-9)
    with pytest.raises(ConfigError, match="one for each of: reward, safety"):
        sections_of(found, corner=[0.0])


def test_calibration(sweep: Path) -> None:
    section = calibration(group(sweep))
    careful, greedy = cells(section, "careful"), cells(section, "greedy")
    assert careful["bias"].estimate.mean == pytest.approx(0.2)
    assert careful["slope"].estimate.mean == pytest.approx(1.0)
    assert (careful["met"], careful["covered"], careful["runs"]) == ("6/6", "0/6", "6")
    assert greedy["bias"].estimate.mean == pytest.approx(-0.3)
    assert greedy["slope"].estimate.mean == pytest.approx(0.0, abs=1e-9)
    assert greedy["mean absolute error"] == "0.30"
    assert cells(section, "worse")["slope"].estimate.mean == pytest.approx(0.5)


def test_absolute_thresholds_leave_the_reference_out_of_the_slack(tmp_path: Path) -> None:
    write_run(tmp_path, safety=0.5, asked=(0.1,), form="absolute_utility")
    write_run(tmp_path / "cost", safety=0.5, asked=(-0.1,), form="absolute_cost")
    for folder in (tmp_path, tmp_path / "cost"):
        found = next(g for g in groups_of(collect(folder)) if g.name.endswith("cost") == (folder.name == "cost"))
        one = found.entries[1]
        np.testing.assert_allclose(one.slacks["safety"], one.values["safety"] - 0.1)


def test_sensitivity_to_beta_and_to_the_seed(tmp_path: Path) -> None:
    for seed in range(3):
        for beta in (0.25, 0.5, 1.0):
            write_run(tmp_path, beta=beta, seed=seed, reward=0.1 * math.log2(beta), safety=-0.2 * math.log2(beta))
    found = group(tmp_path)
    line = cells(to_beta(found), "mocan")
    assert line["beta"] == "0.25, 0.5, 1"
    assert line["reward per doubling"].estimate.mean == pytest.approx(0.1)
    assert line["safety per doubling"].estimate.mean == pytest.approx(-0.2)
    assert line["kl per doubling"].estimate.mean == 0
    seeds = to_seed(found)
    assert len(seeds.lines) == 4
    own = entry(found, "mocan beta=0.5").values["reward"].mean(axis=1)
    line = cells(seeds, "mocan beta=0.5")
    assert line["reward: range"] == f"{own.min():.2f} to {own.max():.2f}"
    assert own.max() - own.min() > 0.01
    assert float(str(line["reward: sd between seeds"])) == pytest.approx(
        entry(found, "mocan beta=0.5").mean("reward").between_seeds,
        abs=6e-4,  # type: ignore[union-attr]
    )


def test_costs(sweep: Path) -> None:
    line = cells(costs(group(sweep)), "careful")
    assert (line["runs"], line["trained tokens"], line["seconds"]) == ("6", "1,000", "12.5")
    assert (line["peak memory, GiB"], line["models trained"], line["models held"]) == ("1.00", "1", "1")


def test_two_utilities(tmp_path: Path) -> None:
    for method, safety in (("a", 0.5), ("b", 0.1)):
        for seed in range(3):
            write_run(tmp_path, method, seed=seed, safety=safety, asked=(0.2, 0.2), utilities=("safety", "politeness"))
    found = group(tmp_path)
    assert [feasible(found, e) for e in found.entries[1:]] == ["yes", "no"]
    assert "hypervolume" in {section.key for section in sections_of(found)}


# ---------------------------------------------------------------- files


def test_the_command_writes_all_files(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(sweep)]) == 0
    shown = capsys.readouterr().out
    for name in ("compare.md", "compare.png", "compare.tex", "compare.csv"):
        assert name in shown
        assert (sweep / name).stat().st_size > 500
    assert (sweep / "compare.pdf").exists()
    text = (sweep / "compare.md").read_text()
    for title in ("Methods", "Paired differences", "Constrained best", "Hypervolume", "Threshold calibration", "Cost"):
        assert f"## {title}" in text
    assert "every record was used" in text
    tex = (sweep / "compare.tex").read_text()
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == tex.count(r"\toprule") == 7
    for body in tex.split(r"\midrule")[1:]:
        rows = body.split(r"\bottomrule")[0].strip().split("\n")
        assert len({row.replace(r"\&", "").count("&") for row in rows}) == 1
    rows = list(csv.DictReader((sweep / "compare.csv").open()))
    (value,) = [r for r in rows if (r["table"], r["row"], r["column"]) == ("methods", "careful | 0.2 | 3", "reward")]
    found = entry(group(sweep), "careful", (0.2,)).mean("reward")
    assert found is not None
    assert float(value["mean"]) == found.mean
    assert float(value["high"]) == found.interval(0.95).high


def test_one_threshold_draws_regrets(tmp_path: Path) -> None:
    for method, reward in (("a", 0.2), ("b", 0.1)):
        write_run(tmp_path, method, reward=reward, safety=0.5)
    assert main(["compare", str(tmp_path), "--against", "a", "--corner=-3,-3", "--out", str(tmp_path / "x.csv")]) == 0
    assert (tmp_path / "x.png").exists()
    assert "(reward -3.000, safety -3.000)" in (tmp_path / "x.md").read_text()


def test_latex_of_special_characters() -> None:
    assert latex("a_b & 50% [-0.1, 2] -0.3 x-y") == r"a\_b \& 50\% [$-$0.1, 2] $-$0.3 x-y"
    section = Section("k", "t", ["a"], [["|x|"]], "c")
    assert r"\textbar{}x\textbar{}" in section.latex()
    assert "\\|x\\|" in section.markdown()
    assert isinstance(Value, type)


# ---------------------------------------------------------------- bad records


def notes(folder: Path) -> str:
    return "\n".join(note for found in groups_of(collect(folder)) for note in found.notes)


def test_missing_seeds_are_shown_and_pairs_use_common_ones(tmp_path: Path) -> None:
    for seed in range(4):
        write_run(tmp_path, "a", seed=seed, safety=0.5)
    for seed in (1, 3):
        write_run(tmp_path, "b", seed=seed, safety=0.5)
    found = group(tmp_path)
    assert "b @ 0.2: seeds 0, 2 missing, seeds 1, 3 there" in notes(tmp_path)
    sections = {section.key: section for section in sections_of(found)}
    assert cells(sections["methods"], "b")["seeds"] == "2 of 4"
    assert cells(sections["differences"], "a - b")["seeds"] == "2"
    pair = paired(entry(found, "a"), entry(found, "b"), "reward")
    assert pair is not None
    assert pair[1] == (1, 3)


def test_seeds_without_overlap_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "a", seed=0)
    write_run(tmp_path, "b", seed=1)
    line = cells(differences(group(tmp_path), None), "a - b")
    assert (line["seeds"], line["reward"], line["p reward"]) == ("0", "-", "-")


@pytest.mark.parametrize("void", ["record", "table"])
def test_a_metric_that_is_no_number_for_one_method(tmp_path: Path, void: str) -> None:
    write_run(tmp_path, "a", safety=0.5)
    record = write_run(tmp_path, "b", safety=0.5)
    folder = tmp_path / record["run_id"]
    if void == "record":
        record["rows"]["b"]["metrics"]["safety"]["mean"] = math.nan
        (folder / "record.json").write_text(json.dumps(record))  # a JSON that says NaN
    else:
        rows = [json.loads(line) for line in (folder / PER_PROMPT).read_text().splitlines()]
        for row in rows:
            row["safety"] = None if row["row"] == "b" else row["safety"]
        rewrite(folder, record, rows)
    found = group(tmp_path)
    assert "b @ 0.2: no number for safety; left out of what needs it" in notes(tmp_path)
    sections = {section.key: section for section in sections_of(found)}
    line = cells(sections["methods"], "b")
    assert (line["safety"], line["safety slack"], line["feasible"]) == ("-", "-", "-")
    assert isinstance(line["reward"], Value)
    assert isinstance(cells(sections["methods"], "a")["safety"], Value)
    assert cells(sections["differences"], "b - reference")["safety"] == "-"
    assert not any(line[0] == "b" for line in sections["hypervolume"].lines)
    assert main(["compare", str(tmp_path)]) == 0


def rewrite(folder: Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    import hashlib

    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / PER_PROMPT).write_text(text)
    record["per_prompt"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "record.json").write_text(json.dumps(record))


def test_records_that_cannot_be_used_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "good", safety=0.5)
    write_run(tmp_path, "future", schema=99)
    write_run(tmp_path, "halfway", status="running")
    write_run(tmp_path, "lacking", cost=None)
    write_run(tmp_path, "headless", outcome={"reported": "nobody"})
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "record.json").write_text('{"schema": 1, "rows": {')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "record.json").write_text("[]")
    found = collect(tmp_path)
    assert [record["method"] for record in found.records] == ["good"]
    text = "\n".join(found.notes)
    for part in (
        "cut: half-written or damaged", "list: no record but a JSON list", "schema 99, this program reads 1",
        "status 'running'", "no usable cost", "its reported row 'nobody' is not there",
    ):  # fmt: skip
        assert part in text
    assert main(["compare", str(tmp_path)]) == 0
    assert "half-written" in (tmp_path / "compare.md").read_text()
    assert "half-written" in capsys.readouterr().out


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"no record\.json below"):
        collect(tmp_path)
    write_run(tmp_path, schema=99)
    assert main(["compare", str(tmp_path)]) == 2
    assert "schema 99" in capsys.readouterr().err


def test_copies_count_once_and_of_two_that_differ_the_newer(tmp_path: Path) -> None:
    write_run(tmp_path, safety=0.5)
    write_run(tmp_path, safety=0.5, folder="copy")
    assert "counted once: mocan-0-0.2-0.5 is a copy of copy" in notes(tmp_path)
    write_run(tmp_path, safety=0.9, folder="again", created="2026-02-02T00:00:00+00:00")
    found = collect(tmp_path)
    (record,) = found.records
    assert found.folders[record["run_id"]].name == "again"
    assert record["created"].startswith("2026-02")
    assert "differ: the newer" in "\n".join(found.notes)
    assert group(tmp_path).entries[1].slacks["safety"].mean() == pytest.approx(0.7)


def test_one_seed_in_two_runs_of_equal_settings(tmp_path: Path) -> None:
    write_run(tmp_path, safety=0.5)
    write_run(tmp_path, safety=0.9, run_id="other", folder="other", created="2026-02-02T00:00:00+00:00")
    assert "stands in two runs: other is used" in notes(tmp_path)
    assert group(tmp_path).entries[1].seeds == (0,)


def test_versions_that_differ_are_told(tmp_path: Path) -> None:
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", commit="b" * 40, versions={"torch": "3"})
    assert "records of 2 commits: aaaaaaaaaa, bbbbbbbbbb" in notes(tmp_path)
    assert "records of 2 torch versions: 2, 3" in notes(tmp_path)


def test_values_per_prompt_that_are_absent_or_damaged(tmp_path: Path) -> None:
    write_run(tmp_path, "good")
    old = write_run(tmp_path, "old")
    del old["per_prompt"]
    (tmp_path / old["run_id"] / "record.json").write_text(json.dumps(old))
    (tmp_path / write_run(tmp_path, "gone")["run_id"] / PER_PROMPT).unlink()
    path = tmp_path / write_run(tmp_path, "cut")["run_id"] / PER_PROMPT
    path.write_text(path.read_text()[:-40])
    text = notes(tmp_path)
    assert "old-0-0.2-0.5: no values per prompt (made by an earlier version)" in text
    assert f"gone-0-0.2-0.5: {PER_PROMPT} is missing" in text
    assert f"cut-0-0.2-0.5: {PER_PROMPT} is damaged" in text
    assert [e.series for e in group(tmp_path).entries] == [REFERENCE, "good"]


def test_other_prompts_are_another_group(tmp_path: Path) -> None:
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", prompts=30)
    found = groups_of(collect(tmp_path))
    assert [g.prompts for g in found] != [g.prompts for g in reversed(found)]
    assert len({g.name for g in found}) == 2
    assert "2 groups that cannot be compared" in notes(tmp_path)
    assert main(["compare", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("compare-*.md"))) == 2


def test_runs_without_scores_have_what_can_be_had(tmp_path: Path) -> None:
    for method in ("a", "b"):
        record = write_run(tmp_path, method)
        folder = tmp_path / record["run_id"]
        rows = [json.loads(line) for line in (folder / PER_PROMPT).read_text().splitlines()]
        for row in record["rows"].values():
            del row["constraints"], row["metrics"]["reward"], row["metrics"]["safety"]
        rewrite(folder, record, [{k: v for k, v in row.items() if k not in ("reward", "safety")} for row in rows])
    found = group(tmp_path)
    line = cells(next(s for s in sections_of(found) if s.key == "methods"), "a")
    assert (line["reward"], line["safety slack"], line["feasible"]) == ("-", "-", "-")
    assert line["tokens"].estimate.mean == 20.0
    assert main(["compare", str(tmp_path)]) == 0
    assert not (tmp_path / "compare.png").exists()


# ---------------------------------------------------------------- coverage


def test_the_hypervolumes_interval_covers() -> None:
    """Three policies on a front, five seeds, 48 prompts; the true volume is that of the true means."""
    truth = np.array([[0.0, 1.0], [0.5, 0.6], [1.0, 0.0]])
    corner, hits, runs = np.array([-0.5, -0.5]), 0, 1500
    exact = hypervolume(truth, corner)
    rng = np.random.default_rng(11)
    for _ in range(runs):
        of_prompts = 0.5 * rng.normal(size=(2, 1, 48))
        entries = []
        for point in truth:
            x = (
                point[:, None, None]
                + of_prompts
                + 0.08 * rng.normal(size=(2, 5, 1))
                + 0.6 * rng.normal(size=(2, 5, 48))
            )
            values = dict(zip(("reward", "safety"), x, strict=True))
            entries.append(
                Entry("m", "m", (0.0,), 1.0, tuple(range(5)), (), values, {}, {}, {}, {}, (), 1, ())
            )  # fmt: skip
        found = volume(entries, ("reward", "safety"), corner)
        hits += found.low <= exact <= found.high
    assert 0.93 <= hits / runs <= 0.97  # simulation error 0.6 points
