"""The dashboard as a file: its numbers are the other reports', its text is harmless, what is missing is said."""

from __future__ import annotations

import hashlib
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from compare_records import write_run
from dashboard_records import HIDDEN, write_one, write_sweep

from alignbench.errors import ConfigError, DataError
from alignbench.report.__main__ import main
from alignbench.report.compare import LEVEL, sections_of
from alignbench.report.dashboard import generations, page, write
from alignbench.report.entries import REFERENCE, groups_of
from alignbench.report.runs import collect
from alignbench.report.stats import Estimate

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1><!--\u2028&lt;b&gt;'\"`${1}"


class Reader(HTMLParser):
    """What a browser would make of the page: its scripts, links, texts and data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.data = ""
        self._in: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._in = (tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._in = ("", {})

    def handle_data(self, data: str) -> None:
        if self._in[1].get("id") == "data":
            self.data += data
        elif not self._in[0]:
            self.text.append(data)

    @property
    def links(self) -> list[str]:
        return [
            str(attributes["href"]) for tag, attributes in self.tags if tag == "a" and attributes["href"] != "#results"
        ]


def made(folder: Path) -> tuple[Path, Reader]:
    path = write(folder, folder / "dashboard.html")
    return path, Reader(path)


def notes(reader: Reader) -> str:
    return "\n".join(reader.text).partition("Skip to the results")[2].partition("Filters")[0]


def close(shown: list[float | None], estimate: Estimate) -> bool:
    expected = [estimate.mean, estimate.low, estimate.high]
    return all(a == pytest.approx(b, rel=1e-4, abs=1e-9) for a, b in zip(shown, expected, strict=True))


# ---------------------------------------------------------------- numbers


def test_every_number_is_that_of_the_comparison(tmp_path: Path) -> None:
    _, reader = made(write_sweep(tmp_path))
    (data,) = json.loads(reader.data)["groups"]
    (group,) = groups_of(collect(tmp_path))
    assert len(data["means"]) == len(group.entries) == 7
    names = [series["name"] for series in data["series"]]
    assert names == [REFERENCE, "mocaid", "mocan", "sacpo"]
    for point, entry in zip(data["means"], group.entries, strict=True):
        assert names[point["s"]] == entry.series
        for name in ("reward", "safety"):
            mean = entry.mean(name)
            assert mean is not None
            assert close(point["v"][name], mean.interval(LEVEL))
        if entry.series != REFERENCE:
            slack = entry.slack("safety")
            assert slack is not None
            assert close(point["d"]["safety"], slack.interval(LEVEL))
            assert point["q"]["safety"] == pytest.approx(entry.requested["safety"])
    # every cell of every table stands in the page as the report writes it
    text = set(reader.text)
    for section in sections_of(group):
        assert {str(cell) for line in section.lines for cell in line} <= text, section.key
        assert section.caption in text


def test_single_runs_are_their_records_own(tmp_path: Path) -> None:
    _, reader = made(write_sweep(tmp_path))
    (data,) = json.loads(reader.data)["groups"]
    runs = {run["id"]: run for run in data["runs"] if "id" in run}
    records = collect(tmp_path).records
    assert len(runs) == len(records) == 18
    for record in records:
        row, run = record["rows"][record["method"]], runs[record["run_id"]]
        for metric in ("reward", "safety"):
            expected = [row["metrics"][metric][end] for end in ("mean", "low", "high")]
            assert run["v"][metric] == pytest.approx(expected, rel=1e-4)
        achieved = row["constraints"]["safety"]["achieved_margin"]
        assert run["a"]["safety"] == pytest.approx([achieved[end] for end in ("mean", "low", "high")], rel=1e-4)
    course = next(run["course"] for run in runs.values() if run["id"].startswith("mocaid"))
    assert [step["i"] for step in course["steps"]] == [1, 2, 3, 4]
    assert course["steps"][0]["b"] == {"safety": "lower"}
    assert course["steps"][1]["s"]["safety"] == pytest.approx([-0.05, -0.1, 0.0], abs=1e-6)


def test_fronts_hold_exactly_the_points_that_no_other_dominates(tmp_path: Path) -> None:
    _, reader = made(write_sweep(tmp_path))
    (data,) = json.loads(reader.data)["groups"]
    for view in ("means|all", "means|1", "runs|0", "2|all"):
        which, threshold = view.split("|")
        points = data["means"] if which == "means" else data["runs"]
        places = {
            (p["v"]["reward"][0], p["v"]["safety"][0])
            for p in points
            if which in ("means", "runs") or str(p["seed"]) == which
            if threshold == "all" or p["t"] == -1 or str(p["t"]) == threshold
        }
        best = {(x, y) for x, y in places if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in places)}
        assert {tuple(place) for place in data["fronts"][f"safety|{view}"]} == best
        assert len(best) < len(places)


def test_a_number_without_an_interval_stays_without(tmp_path: Path) -> None:
    write_run(tmp_path, "mocan", prompts=1)
    _, reader = made(tmp_path)
    (data,) = json.loads(reader.data)["groups"]
    assert all(point["v"]["reward"][1:] == [None, None] for point in data["means"] + data["runs"])


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    path, _ = made(write_sweep(tmp_path / "a"))
    before = path.read_bytes()
    assert made(tmp_path / "a")[0].read_bytes() == before


# ---------------------------------------------------------------- what may be wrong with records


def test_what_is_missing_or_left_out_is_said(tmp_path: Path) -> None:
    write_sweep(tmp_path, methods=("mocan", "sacpo"), thresholds=(0.2,))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "record.json").write_text('{"schema": 1, "run_')
    write_one(tmp_path, "pecan", seed=1, folder="other", schema=99)
    write_run(tmp_path, "mocan", seed=0, reward=9.0, run_id="again", created="2026-02-01", folder="again")
    (tmp_path / "sacpo-1-0.2-0.5" / "record.json").unlink()
    (tmp_path / "sacpo-2-0.2-0.5" / "generations.jsonl").write_text("{")
    _, reader = made(tmp_path)
    text = notes(reader)
    for part in (
        "half-written",
        "schema 99",
        "again is used",
        "sacpo @ 0.2: seed 1 missing",
        "generations.jsonl is damaged",
    ):
        assert part in text
    data = json.loads(reader.data)
    main_group, left_out = data["groups"]
    assert "in no mean" in left_out["title"]
    assert [run["id"] for run in left_out["runs"] if "id" in run] == ["mocan-0-0.2-0.5"]
    sacpo = next(p for p in main_group["means"] if main_group["series"][p["s"]]["name"] == "sacpo")
    assert sacpo["n"] == "seeds 0, 2; missing: 1"


def test_runs_without_values_per_prompt_are_shown_one_by_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = write_one(tmp_path, "mocan", seed=seed)
        (folder / "per_prompt.jsonl").unlink()
    _, reader = made(tmp_path)
    (data,) = json.loads(reader.data)["groups"]
    assert data["means"] == []
    assert len(data["runs"]) == 4  # two runs, two references
    assert notes(reader).count("in no mean: mocan-") == 2
    assert "per_prompt.jsonl is missing" in notes(reader)


def test_a_metric_that_is_no_number_for_one_method(tmp_path: Path) -> None:
    write_sweep(tmp_path, methods=("mocan",), thresholds=(0.2,), seeds=(0,))
    folder = write_one(tmp_path, "sacpo")
    record = json.loads((folder / "record.json").read_text())
    record["rows"]["sacpo"]["metrics"]["reward"] = {"mean": float("nan"), "low": None, "high": None}
    (folder / "record.json").write_text(json.dumps(record))
    _, reader = made(tmp_path)
    (data,) = json.loads(reader.data, parse_constant=pytest.fail)["groups"]
    by_name = {data["series"][point["s"]]["name"]: point for point in data["means"]}
    assert "reward" in by_name["mocan"]["v"]
    assert "reward" not in by_name["sacpo"]["v"]
    assert "no number for reward" in notes(reader)


def test_runs_without_scores(tmp_path: Path) -> None:
    folder = write_one(tmp_path, "mocan")
    record = json.loads((folder / "record.json").read_text())
    for row in record["rows"].values():
        row["metrics"] = {name: value for name, value in row["metrics"].items() if name in ("kl", "length")}
        row["constraints"] = {}
    table = [json.loads(line) for line in (folder / "per_prompt.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in row.items() if k not in ("reward", "safety")}) + "\n" for row in table)
    (folder / "per_prompt.jsonl").write_text(text)
    record["per_prompt"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "record.json").write_text(json.dumps(record))
    _, reader = made(tmp_path)
    (data,) = json.loads(reader.data)["groups"]
    assert data["best"] == []
    assert data["fronts"] == {}
    assert [point["v"] for point in data["means"]] == [{}, {}]
    assert "Methods" in reader.text  # KL and length are there


def test_groups_that_cannot_be_compared_stay_apart(tmp_path: Path) -> None:
    write_one(tmp_path, "mocan")
    write_one(tmp_path, "sacpo", utilities=("safety", "politeness"), asked=(0.2, 0.0))
    _, reader = made(tmp_path)
    first, second = json.loads(reader.data)["groups"]
    assert [first["objectives"], second["objectives"]] == [["reward", "safety"], ["reward", "safety", "politeness"]]
    assert "cannot be compared" in notes(reader)


# ---------------------------------------------------------------- text and links


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    rows = [{"prompt": HOSTILE, "sft": HOSTILE, "mocan": f"{HOSTILE} \ud800"}]
    write_one(tmp_path, "mocan", rows=rows, run_id=HOSTILE, folder="javascript:alert(1)", versions={"torch": HOSTILE})
    path, reader = made(tmp_path)
    scripts = [attributes for tag, attributes in reader.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}, {}]
    assert not [
        tag for tag, attributes in reader.tags if tag == "img" or any(name.startswith("on") for name in attributes)
    ]
    assert HOSTILE in json.loads(reader.data)["texts"]
    assert all(link.startswith("javascript%3Aalert") for link in reader.links)  # a folder's name, not a scheme
    policy = next(a["content"] for tag, a in reader.tags if tag == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in str(policy)
    assert "unsafe-eval" not in str(policy)
    assert str(policy).count("sha256-") == 2
    source = path.read_text()
    assert "src=" not in source.partition("<script")[0]
    assert "pwned=1</script>" not in source


def test_links_lead_to_files_that_are_there(tmp_path: Path) -> None:
    write_one(tmp_path / "runs", "mocan", folder="a name # with & signs?", iterations=2)
    (tmp_path / "store" / "artifacts" / ("f" * 32)).mkdir(parents=True)
    path = write(tmp_path / "runs", tmp_path / "pages" / "dashboard.html", tmp_path / "store")
    links = Reader(path).links
    assert len(links) == 4  # folder, record, generations, artifact
    for link in links:
        assert (path.parent / unquote(link)).exists(), link


def test_texts_keep_to_their_budget_and_every_run_has_the_same_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path, methods=("mocan", "sacpo"), thresholds=(0.2,), answers=9, length=4)
    monkeypatch.setattr(generations, "BUDGET", 8_000)
    monkeypatch.setattr(generations, "LONGEST", 100)
    _, reader = made(tmp_path)
    data = json.loads(reader.data)
    counts = {len(run["g"]) for run in data["groups"][0]["runs"]}
    assert len(counts) == 1
    (count,) = counts
    assert 0 < count < 9
    assert len({answer[0] for run in data["groups"][0]["runs"] for answer in run["g"]}) == count
    assert sum(map(len, data["texts"])) < 8_000
    text = "".join(reader.text)
    assert f"{9 * count} of the 81 answers" in text
    assert "texts are cut after" in text
    assert any(string.endswith("more characters]") for string in data["texts"])


def test_four_hundred_records_stay_below_five_megabytes(tmp_path: Path) -> None:
    methods = [f"method{k:02d}" if k % 4 else f"mocaid{k}" for k in range(16)]
    write_sweep(tmp_path, methods, (0.0, 0.1, 0.2, 0.3, 0.4), range(5), prompts=10, answers=12, length=25)
    path, reader = made(tmp_path)
    data = json.loads(reader.data)
    assert sum("id" in run for run in data["groups"][0]["runs"]) == 400
    assert path.stat().st_size < 5_000_000
    assert HIDDEN in data["texts"][data["groups"][0]["runs"][0]["g"][0][1]]


# ---------------------------------------------------------------- a sweep's own folder, the command


def test_the_folder_of_a_sweep_shows_that_sweep_alone(tmp_path: Path) -> None:
    write_sweep(tmp_path, methods=("mocan", "sacpo"), thresholds=(0.2,), seeds=(0,))
    summary = {
        "runs": ["mocan-0-0.2-0.5", "gone"],
        "failed": [{"overrides": ["method=pecan", "seed=3"], "error": "DataError: no pairs"}],
        "missing": 2,
    }
    (tmp_path / "sweep-1").mkdir()
    (tmp_path / "sweep-1" / "sweep.json").write_text(json.dumps(summary))
    _, reader = made(tmp_path / "sweep-1")
    (data,) = json.loads(reader.data)["groups"]
    assert [series["name"] for series in data["series"]] == [REFERENCE, "mocan"]
    for part in (
        "failed: method=pecan seed=3: DataError",
        "2 of the sweep's jobs never ran",
        "gone: its record is gone",
    ):
        assert part in notes(reader)
    assert "../mocan-0-0.2-0.5/record.json" in reader.links
    (tmp_path / "sweep-1" / "sweep.json").write_text("{}")
    with pytest.raises(DataError, match="no summary of a sweep"):
        made(tmp_path / "sweep-1")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_one(tmp_path, "mocan")
    assert main(["dashboard", str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out == f"dashboard: {tmp_path}/page.html\n"
    assert (tmp_path / "page.html").is_file()
    assert main(["dashboard", str(tmp_path / "nothing")]) == 2
    assert "no record.json" in capsys.readouterr().err


def test_without_the_plotting_library_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_one(tmp_path, "mocan")
    page._library.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ConfigError, match=r"requirements\.txt"):
        write(tmp_path, tmp_path / "page.html")
    page._library.cache_clear()


def test_compare_of_runs_without_values_per_prompt_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write_one(tmp_path, "mocan") / "per_prompt.jsonl").unlink()
    assert main(["compare", str(tmp_path)]) == 2
    assert "values per prompt" in capsys.readouterr().err
