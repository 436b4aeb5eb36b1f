"""Judging as part of a run: what stands in record and table, who is asked, and a server that dies midway."""

import json
from collections import Counter

import numpy as np
import pytest
from judge_server import CUT, completion, serving
from tiny_runs import STATED, Run, plan, shared_tiny
from tiny_runs import run as run_with

from alignbench.errors import ConfigError, JudgeError
from alignbench.models import scorers


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Run:
    return shared_tiny(tmp_path_factory)


@pytest.fixture
def store(tiny, tmp_path):
    return tiny.copied(tmp_path / "store")


@pytest.fixture
def _short():
    """A scorer that calls short answers good in every respect: a judge with a bias against length."""
    known = dict(scorers._SCORERS)

    @scorers.register_scorer("short")
    def short(prompts, responses):
        size = np.array([-len(response) for response in responses], dtype=np.float64)
        return {"reward": size, "safety": size}

    yield
    scorers._SCORERS.clear()
    scorers._SCORERS.update(known)


def run(store, out, *overrides):
    """On top of the shared run: nothing but the judging is new."""
    return run_with(store, out, STATED, *overrides)


def contest(done, row, criterion):
    (found,) = [c for c in done.record["judging"]["contests"] if (c["row"], c["criterion"]) == (row, criterion)]
    return found


def own_scores(done, row):
    return done.artifact(f"score {row}").jsonl("scores.jsonl")


def test_without_a_judge_nothing_is_judged(tiny):
    assert "judging" not in tiny.record
    assert not any(stage["stage"] in ("judge", "verdicts") for stage in tiny.record["stages"])


def test_gold_as_judge_gives_the_win_rates_of_the_evaluation(tiny, store, tmp_path):
    done = run(store, tmp_path / "out", "judge=gold", "judge.samples_per_prompt=2")
    for row in ("step reward", "sacpo"):
        for criterion, column in (("helpfulness", "reward"), ("safety", "safety")):
            found = contest(done, row, criterion)
            expected = done.record["rows"][row]["metrics"][f"{column}_win_rate"]
            assert found["win_rate"]["mean"] == pytest.approx(expected["mean"], abs=1e-12)
            assert sum(found[name]["mean"] for name in ("win", "tie", "loss")) == pytest.approx(1)
            assert found["counts"]["judgements_missing"] == {}
    # nothing was trained, sampled or scored again
    assert {label.split()[0] for label in done.built} == {"judge", "verdicts"}
    assert "pairwise" not in (tiny.folder / "table.md").read_text()
    table = (done.folder / "table.md").read_text()
    assert "| step reward | sft | helpfulness |" in table
    assert (done.folder / "judging.png").stat().st_size > 10_000
    json.dumps(done.record)


def test_the_first_samples_are_judged_and_the_others_not(store, tmp_path):
    done = run(store, tmp_path / "out", "judge=gold")
    own, base = own_scores(done, "sacpo"), own_scores(done, "sft")
    rows = done.artifact("sample sacpo").jsonl("responses.jsonl")
    first = [i for i, row in enumerate(rows) if row["sample"] == 0]
    wins = [float(np.sign(own[i]["reward"] - base[i]["reward"])) / 2 + 0.5 for i in first]
    found = contest(done, "sacpo", "helpfulness")
    assert found["counts"]["comparisons"] == len(first) == 6
    assert found["win_rate"]["mean"] == pytest.approx(np.mean(wins))


@pytest.mark.usefixtures("_short")
def test_a_biased_judge_is_found_out_by_gold(store, tmp_path):
    done = run(store, tmp_path / "out", "judge=gold", "judge.scorer=short", "judge.samples_per_prompt=2")
    found = contest(done, "sacpo", "helpfulness")
    assert found["longer_preferred"]["n"] == 0  # the tiny run's answers all have 16 tokens
    responses = {row: done.artifact(f"sample {row}").jsonl("responses.jsonl") for row in ("sacpo", "sft")}
    gold = [
        np.sign(a["reward"] - b["reward"])
        for a, b in zip(own_scores(done, "sacpo"), own_scores(done, "sft"), strict=True)
    ]
    said = [
        np.sign(len(b["response"]) - len(a["response"]))
        for a, b in zip(responses["sacpo"], responses["sft"], strict=True)
    ]
    agreement = [1 - abs(s - g) / 2 for s, g in zip(said, gold, strict=True) if g]
    assert found["gold"]["agreement"]["mean"] == pytest.approx(np.mean(agreement))
    assert found["gold"]["win_rate"]["mean"] == pytest.approx(np.mean(gold) / 2 + 0.5)
    assert "agrees with gold" in (done.folder / "table.md").read_text()


@pytest.mark.usefixtures("_short")
def test_a_defined_scorer_judges_as_its_columns_do(store, tmp_path):
    column = {"kind": "registered", "source": "short", "larger_is": "better"}
    (tmp_path / "conf/scorers").mkdir(parents=True)
    definition = json.dumps({"columns": {"reward": column, "safety": column}})
    (tmp_path / "conf/scorers/mine.yaml").write_text(f"# @package scorers.mine\n{definition}")
    mine = (f"hydra.searchpath=[file://{tmp_path}/conf]", "scorers=mine", "judge.scorer=mine")
    found = [
        contest(run(store, tmp_path / name, "judge=gold", "judge.samples_per_prompt=2", *judge), "sacpo", "safety")
        for name, judge in (("registered", ["judge.scorer=short"]), ("defined", mine))
    ]
    registered, defined = ({key: one[key] for key in one if key not in ("artifact", "cost")} for one in found)
    assert defined == registered
    assert found[0]["artifact"] != found[1]["artifact"]


def test_a_learned_judge_is_trained_and_assessed(store):
    lab, _, _, _ = plan(store, STATED, "judge=gold", "judge.scorer=learned")
    labels = {node.label: node for node in _planned(lab).nodes.values()}
    judged = labels["judge sacpo against sft"]
    trained = {labels["reward model learned for reward"].key, labels["cost model learned for safety"].key}
    assert trained <= {node.key for node in judged.inputs["scores"].inputs.values()}
    assert {"assess learned", "learned against gold: sacpo"} <= set(labels)


def _planned(lab):
    from alignbench.run import planned

    return planned(lab.config, _settings(lab), lab.store, lab.tracker)


def test_all_against_all_and_one_artifact_for_what_is_asked_alike(store):
    lab, _, _, _ = plan(store, STATED, "judge=gold")
    whole = _planned(lab)
    labels = [node.label for node in whole.nodes.values() if node.stage.name == "judge"]
    assert labels == ["judge step reward against sft", "judge sacpo against sft"]
    lab.config.judge.opponents = "all"
    every = _planned(lab)
    assert [node.label for node in every.nodes.values() if node.stage.name == "judge"] == [
        "judge step reward against sft", "judge sacpo against sft", "judge sacpo against step reward",
    ]  # fmt: skip
    lab.config.judge.protocol = "caid"  # a scorer reads no words: only what a tie counts changes
    other = _planned(lab)
    for name, same in (("judge", True), ("verdicts", False)):
        keys = [{key for key, node in one.nodes.items() if node.stage.name == name} for one in (every, other)]
        assert (keys[0] == keys[1]) is same


def _settings(lab):
    from tiny_runs import TINY, compose

    from alignbench.config import resolve

    return resolve(compose(*TINY, STATED))[1]


def server(script, cache, *more):
    return (
        "judge=server", f"judge.server.url={script.url}", "judge.server.model=m", f"judge.cache={cache}",
        "judge.server.retries=0", "judge.server.pause_s=0", "judge.server.concurrency=2", *more,
    )  # fmt: skip


def by_length(body):
    """SACPO's two scores: the longer answer is better, and so is the one shown first."""
    text = body["messages"][1]["content"]
    first, second = (text.split(f"[Answer {x}]\n")[1].split(f"\n[End of answer {x}]")[0] for x in "AB")
    return completion("8 7" if len(first) >= len(second) else "5 9")


def test_a_server_that_dies_midway_then_nonsense_then_the_whole(store, tmp_path):
    served = Counter()

    def dying(number, body):
        if number >= 30:
            return CUT
        served[json.dumps(body["messages"])] += 1
        return by_length(body)

    cache = tmp_path / "answers"
    with serving(dying) as script, pytest.raises(JudgeError, match="the same command goes on from there"):
        run(store, tmp_path / "out", *server(script, cache))

    def healthy(number, body):
        served[json.dumps(body["messages"])] += 1
        return completion("Both are lovely!") if number % 5 == 0 else by_length(body)

    with serving(healthy, script.port) as again:
        done = run(store, tmp_path / "out", *server(again, cache))
        assert len(again.bodies) == 3 * len(served) - 30
        assert set(served.values()) == {3}  # every question its three repeats, and never again
        kept = [json.loads(path.read_text())["text"] for path in cache.rglob("*.json")]
        assert kept.count("Both are lovely!") == len(range(0, len(again.bodies), 5))
        asked = len(again.bodies)
        run(store, tmp_path / "more", *server(again, cache))  # from the store
        assert len(again.bodies) == asked
    found = contest(done, "sacpo", "helpfulness")
    assert found["counts"]["judgements"] == 36
    assert found["order_bias"]["agreement"]["mean"] is not None
    assert found["repeat_std"] is not None
    words = done.artifact("judge sacpo against sft").jsonl("judgements.jsonl")
    assert {row["text"] for row in words} == {"8 7", "5 9", "Both are lovely!"}
    missing = sum(row["text"] == "Both are lovely!" for row in words if row["criterion"] == "helpfulness")
    assert found["counts"]["judgements_missing"] == {"unreadable": missing}
    assert all((row["outcome"] is None) == (row["text"] == "Both are lovely!") for row in words)
    assert "key" not in done.record["judging"]


def test_a_judge_that_never_makes_sense_gives_no_rate_and_says_so(store, tmp_path):
    with serving(lambda number, body: completion("I like trains.")) as script:
        done = run(store, tmp_path / "out", *server(script, tmp_path / "answers", "judge.repeats=1"))
    found = contest(done, "sacpo", "safety")
    assert found["win_rate"]["mean"] is None
    assert found["counts"]["judgements_missing"] == {"unreadable": 12}
    assert done.record["judging"]["ratings"]["safety"]["none"]
    assert "| - |" in (done.folder / "table.md").read_text()


def test_a_local_model_judges_by_probability(tiny, store, tmp_path):
    folder = tiny.artifact("sft").path("policy")
    done = run(
        store, tmp_path / "out", "judge=local", f"judge.local.path={folder}", "judge.local.template=plain",
        "judge.local.read=probability", "judge.local.least_mass=0", "judge.local.max_length=4096",
    )  # fmt: skip
    found = contest(done, "sacpo", "helpfulness")
    assert 0 < found["win_rate"]["mean"] < 1
    assert found["counts"]["judgements"] == 12  # both orders, once
    assert str(folder) not in json.dumps(done.record)


def test_a_local_model_that_is_not_there_is_told_before_anything_runs(store, tmp_path):
    with pytest.raises(Exception, match=r"judge\.local\.path = /nowhere"):
        run(store, tmp_path / "out", "judge=local", "judge.local.path=/nowhere")


def test_a_key_that_is_not_set_is_told(store, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with serving(lambda number, body: CUT) as script, pytest.raises(ConfigError, match="NO_KEY is not set"):
        run(store, tmp_path / "out", *server(script, tmp_path / "answers", "judge.server.key_env=NO_KEY"))
