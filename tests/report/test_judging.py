"""Tables, pictures and common ratings of judged records."""

import copy
import math

import pytest
from pictures import assert_picture
from record_files import folder_of

from alignbench.errors import DataError
from alignbench.judging.ratings import POINTS
from alignbench.lab_judge import rated
from alignbench.report import judging
from alignbench.report.__main__ import main


def value(mean, spread=0.1):
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "n": 10, "clusters": 10, "level": 0.95}


def contest(row, wins, losses, criterion="safety", artifact="", opponent="sft"):
    """Ten prompts, one comparison each, no ties."""
    triples = [[1.0, 0.0, 0.0]] * wins + [[0.0, 0.0, 1.0]] * losses
    rate = wins / (wins + losses)
    return {
        "row": row, "opponent": opponent, "criterion": criterion, "artifact": artifact or f"{row}-{opponent}",
        "cost": {"seconds": 1.0},
        "win_rate": value(rate), "win": value(rate), "tie": value(0.0), "loss": value(1 - rate),
        "repeat_std": None, "order_bias": None, "longer_preferred": value(0.6),
        "counts": {
            "comparisons": len(triples), "comparisons_missing": 0, "judgements": len(triples),
            "judgements_missing": {"unreadable": 2},
        },
        "per_prompt": {
            "prompt_id": [f"p{i}" for i in range(len(triples))], "verdicts": triples, "games": triples,
        },
    }  # fmt: skip


def record(*contests, seed=0, judge="gold", asked=0.2):
    names = dict.fromkeys(["sft", *(c["row"] for c in contests)])
    ratings = {
        criterion: rated(contests, criterion, level=0.95, resamples=200, seed=0, elo=False)
        for criterion in dict.fromkeys(c["criterion"] for c in contests)
    }
    return {
        "run_id": f"{judge}-{seed}",
        "seed": seed,
        "method": "sacpo",
        "config": {
            "dataset": {"name": "handbook"},
            "evaluate": {"level": 0.95},
            "constraint": {"thresholds": [asked]},
        },
        "outcome": {"reported": "sft"},
        "rows": {name: {"policy": f"{name}{seed}".ljust(12, "0")} for name in names},
        "judging": {
            "judge": judge,
            "backend": "scorer",
            "protocol": {"name": "choice", "source": "ours", "rule": "each", "tie": 0.5},
            "contests": list(contests),
            "ratings": ratings,
        },
    }


def test_a_line_per_contest_with_its_rating():
    one = record(contest("a", 6, 4), contest("a", 3, 7, "helpfulness"))["judging"]
    (safe, helpful) = judging.cells(one)
    assert safe[:4] == ["a", "sft", "safety", "0.60 [0.50, 0.70]"]
    assert "2 of 10" in safe
    assert safe[-1].startswith(f"{1000 + POINTS * math.log(1.5):.0f} [")
    assert helpful[-1].startswith(f"{1000 + POINTS * math.log(3 / 7):.0f}")
    assert len(safe) == len(judging.headings(one["contests"]))
    assert "never counted as ties" in judging.markdown(one)


def test_truth_has_columns_where_there_is_truth():
    found = contest("a", 6, 4)
    found["gold"] = {"agreement": value(0.8), "win_rate": value(0.55), "length_bias": value(0.05)}
    one = record(found)["judging"]
    (line,) = judging.cells(one)
    assert line[judging.headings(one["contests"]).index("agrees with gold")] == "0.80 [0.70, 0.90]"
    assert line[judging.headings(one["contests"]).index("length bias")].startswith("+0.05")


def test_nothing_readable_is_a_dash(tmp_path):
    found = contest("a", 6, 4)
    for name in ("win_rate", "win", "tie", "loss", "longer_preferred"):
        found[name] = {**value(0.0), "mean": None, "low": None, "high": None}
    found["per_prompt"] |= {"verdicts": [[0.0] * 3] * 10, "games": [[0.0] * 3] * 10}
    one = record(found, contest("b", 5, 5))
    assert judging.cells(one["judging"])[0][3] == "-"
    assert one["judging"]["ratings"]["safety"]["none"]
    judging.picture(one["judging"], tmp_path / "picture")
    assert_picture(tmp_path / "picture.png")


def test_the_picture(tmp_path, drawn):
    judging.picture(
        record(contest("a", 6, 4), contest("b", 2, 8), contest("a", 5, 5, "helpfulness"))["judging"], tmp_path / "p"
    )
    assert_picture(tmp_path / "p.png")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes[:2]] == ["safety", "helpfulness"]


def test_several_records_have_common_ratings_and_each_contest_once():
    first, second = record(contest("a", 6, 4)), record(contest("a", 6, 4), contest("b", 8, 2))
    found = judging.together([first, second])
    assert [c["label"] for c in found["contests"]] == ["a, seed 0", "b, seed 0"]
    ratings = found["ratings"]["safety"]["bradley_terry"]
    assert ratings["b"]["mean"] == pytest.approx(1000 + POINTS * math.log(4))
    assert ratings["a"]["mean"] == pytest.approx(1000 + POINTS * math.log(1.5))


def test_seeds_of_one_method_have_one_rating():
    runs = [record(contest("a", 6, 4, artifact=f"s{s}") | {}, seed=s) for s in (0, 1)]
    runs[1]["judging"]["contests"][0] = contest("a", 8, 2, artifact="s1")
    found = judging.together(runs)
    assert [c["label"] for c in found["contests"]] == ["a, seed 0", "a, seed 1"]
    assert found["ratings"]["safety"]["bradley_terry"]["a"]["mean"] == pytest.approx(1000 + POINTS * math.log(14 / 6))


def test_two_policies_of_one_name_and_seed_are_told_apart():
    first, second = record(contest("a", 6, 4, artifact="x")), record(contest("a", 8, 2, artifact="y"))
    second["rows"]["a"]["policy"] = "other0000000"
    found = judging.together([first, second])
    assert {c["row"] for c in found["contests"]} == {"a a00000", "a other0"}
    assert len(found["ratings"]["safety"]["bradley_terry"]) == 3


def test_records_of_different_judges_and_none_are_refused():
    other = copy.deepcopy(record(contest("a", 6, 4), judge="server"))
    with pytest.raises(DataError, match="different judges"):
        judging.together([record(contest("a", 6, 4)), other])
    with pytest.raises(DataError, match="no record holds judged answers"):
        judging.together([{"rows": {}}])


def test_the_command(tmp_path, capsys):
    folder_of([record(contest("a", 6, 4), contest("b", 3, 7))], tmp_path)
    assert main(["judging", str(tmp_path)]) == 0
    assert "judging.md" in capsys.readouterr().out
    assert "| a, seed 0 | sft | safety |" in (tmp_path / "judging.md").read_text()
    assert_picture(tmp_path / "judging.png")
    assert main(["judging", str(tmp_path / "nothing")]) == 2
