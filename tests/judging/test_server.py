"""A judge behind a real HTTP server on this machine: one that answers, fails, talks nonsense, hurries off and dies."""

import json
import threading
from collections import Counter
from dataclasses import replace

import pytest
from judge_server import CUT, completion, scores, serving

from alignbench.errors import JudgeError
from alignbench.judging.asking import AnswerCache, Comparison, questions
from alignbench.judging.protocols import find_protocol
from alignbench.judging.server import ServerClient, ServerJudge, upper_tokens
from alignbench.judging.settings import ServerJudgeConfig

MANNERS = ServerJudgeConfig(timeout_s=20.0, retries=2, pause_s=0.0, concurrency=3)


def asked(count=4, protocol="sacpo"):
    pairs = [Comparison(f"p{i}", 0, f"question {i}", f"own {i}", f"other {i}") for i in range(count)]
    return questions(find_protocol(protocol), ("helpfulness",), pairs)


def ask(script, cache, questions_asked=None, **changes):
    client = ServerClient(ServerJudge(script.url, "judge-1"), replace(MANNERS, **changes))
    return client.ask(questions_asked or asked(), AnswerCache(cache), "judge")


def key_of(body):
    return json.dumps(body["messages"])


def test_every_question_is_sent_as_it_is_and_its_raw_text_comes_back(tmp_path):
    wanted = asked()
    with serving(lambda number, body: completion(f"7 {number % 10}")) as script:
        answers = ask(script, tmp_path)
    assert len(answers) == len(wanted) == len(script.bodies) == 24
    assert {json.dumps(b, sort_keys=True) for b in script.bodies} == {
        json.dumps({"model": "judge-1", "messages": q.messages, "temperature": 0.7, "max_tokens": 8}, sort_keys=True)
        for q in wanted
    }
    assert {h["path"] for h in script.headers} == {"/v1/chat/completions"}
    assert all(answer.text.startswith("7 ") and answer.tokens == 104 for answer in answers)
    assert script.most_under_way <= 3


def test_repeats_of_one_question_are_asked_each(tmp_path):
    with serving(scores) as script:
        ask(script, tmp_path, asked(1))
    assert sorted(Counter(map(key_of, script.bodies)).values()) == [3, 3]


def test_what_is_in_the_cache_is_never_asked_again(tmp_path):
    with serving(lambda number, body: completion(f"5 {number % 10}")) as script:
        first = ask(script, tmp_path)
        second = ask(script, tmp_path)
        assert first == second
        assert len(script.bodies) == 24
        ask(script, tmp_path, asked(5))  # one comparison more: its six questions
        assert len(script.bodies) == 30


def test_a_damaged_answer_is_asked_again(tmp_path):
    with serving(scores) as script:
        ask(script, tmp_path, asked(1))
        victim = next(tmp_path.rglob("*.json"))
        victim.write_text('{"text": "8')
        ask(script, tmp_path, asked(1))
    assert len(script.bodies) == 7


@pytest.mark.parametrize(
    "fault",
    [
        (500, "down", {}),
        (503, "busy", {"Retry-After": "0"}),
        (429, {"error": "slow down"}, {"Retry-After": "0.01"}),
        (200, "<html>no JSON</html>", {}),
        (200, {"choices": []}, {}),
        (200, ["a list"], {}),
        CUT,
    ],
    ids=["500", "503", "429", "html", "no choices", "a list", "cut"],
)
def test_passing_faults_are_tried_again(tmp_path, fault):
    seen = Counter()

    def behave(number, body):
        seen[key_of(body)] += 1
        return fault if seen[key_of(body)] == 1 else completion("8 6")

    one_each = asked(protocol="can")
    with serving(behave) as script:
        answers = ask(script, tmp_path, one_each)
    assert [a.text for a in answers] == ["8 6"] * len(one_each)
    assert set(seen.values()) == {2}


def test_pauses_double_and_follow_the_server_s_wish(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: waited.append(timeout))
    client = ServerClient(ServerJudge("http://127.0.0.1:9", "m"), replace(MANNERS, retries=4, pause_s=8.0))
    replies = iter([None, None, 3.5, None])

    def post(body):
        from alignbench.judging.server import _FaultError

        pause = next(replies, "end")
        if pause == "end":
            return "8 6", {}
        raise _FaultError("busy", pause)

    monkeypatch.setattr(client, "_post", post)
    from alignbench.judging import server

    stop = threading.Event()
    client._answer(asked(1)[0], server._Purse(None), server._Gate(0.0), stop)
    assert 4 <= waited[0] <= 8
    assert 8 <= waited[1] <= 16
    assert waited[2] == 3.5
    assert 30 <= waited[3] <= 60  # never above a minute


def test_a_server_that_stays_down_says_so_and_what_is_kept(tmp_path):
    with (
        serving(lambda number, body: (500, "out of order", {})) as script,
        pytest.raises(JudgeError, match=r"no answer in 3 tries \(status 500: out of order\); 0 of 24 answers are kept"),
    ):
        ask(script, tmp_path)


def test_a_server_that_is_not_there(tmp_path):
    with serving(scores) as script:
        pass
    with pytest.raises(JudgeError, match="no answer in 3 tries"):
        ask(script, tmp_path)


def test_a_refusal_is_not_tried_again(tmp_path):
    def behave(number, body):
        return 401, {"error": {"message": "wrong key"}}, {}

    with serving(behave) as script, pytest.raises(JudgeError, match=r"status 401.*wrong key"):
        ask(script, tmp_path, concurrency=1)
    assert len(script.bodies) == 1


def test_nonsense_is_kept_as_it_came_and_is_no_fault(tmp_path):
    texts = ["I would rather not say.", "", "9", "12 3", "8 6 \n fine"]
    with serving(lambda number, body: completion(texts[number % 5])) as script:
        answers = ask(script, tmp_path)
    assert Counter(a.text for a in answers).keys() == set(texts)
    assert len(script.bodies) == 24
    readings = [find_protocol("sacpo").read("helpfulness", a.text) for a in answers]
    assert sum(r is not None for r in readings) == sum(a.text == texts[4] for a in answers)


def test_a_null_content_is_an_empty_answer(tmp_path):
    with serving(lambda number, body: completion(None)) as script:
        assert {a.text for a in ask(script, tmp_path, asked(1))} == {""}


def test_a_server_that_dies_midway_is_resumed_and_nothing_is_judged_twice(tmp_path):
    served = Counter()

    def dying(number, body):
        if number >= 10:
            return CUT
        served[key_of(body)] += 1
        return completion("8 6")

    with serving(dying) as script, pytest.raises(JudgeError, match="of 24 answers are kept") as caught:
        ask(script, tmp_path, retries=0)
    assert "10 of 24" in str(caught.value)
    port = script.port

    def healthy(number, body):
        served[key_of(body)] += 1
        return completion("8 6")

    with serving(healthy, port) as again:  # the same address: the same judge
        answers = ask(again, tmp_path)
        assert len(again.bodies) == 14
    assert len(answers) == 24
    assert set(served.values()) == {3}  # each order of each comparison: its three repeats and no more


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    with serving(scores) as script:
        ask(script, tmp_path, asked(1), key_env="JUDGE_KEY")
    assert {h["Authorization"] for h in script.headers} == {"Bearer s3cret"}
    assert not any("s3cret" in path.read_text() for path in tmp_path.rglob("*.json"))


def test_extra_fields_are_sent_and_null_takes_one_out(tmp_path):
    judge = '{"seed": 42, "max_tokens": null, "max_completion_tokens": 9}'
    with serving(scores) as script:
        ServerClient(ServerJudge(script.url, "m", judge), MANNERS).ask(asked(1), AnswerCache(tmp_path), "judge")
    assert {(b["seed"], b["max_completion_tokens"], "max_tokens" in b) for b in script.bodies} == {(42, 9, False)}


def test_the_rate_limit_spaces_requests(tmp_path):
    # a bound from below on time is safe: the limit may only ever make it slower
    with serving(scores) as script:
        ask(script, tmp_path, asked(1), requests_per_minute=1200.0)
    assert max(script.times) - min(script.times) >= 4 * 60 / 1200


def test_the_cost_cap_stops_before_it_is_passed_and_keeps_what_was_paid_for(tmp_path):
    wanted = asked()
    prices = {"input_price": 1e4, "output_price": 5e4}  # per million: 1.0 + 0.2 per answer as the server counts it
    bound = max(upper_tokens(q) for q in wanted) * 1e-2 + 8 * 5e-2
    cap = bound + 6 * 1.2
    with serving(scores) as script:
        with pytest.raises(JudgeError, match=r"might exceed judge.server.most_cost.*of 24 answers are kept"):
            ask(script, tmp_path, most_cost=cap, concurrency=1, **prices)
        spent = 1.2 * len(script.bodies)
        assert 0 < spent <= cap
        assert spent + bound > cap - 1.2  # and not long before
        before = len(script.bodies)
        # the money of the earlier attempt counts
        with pytest.raises(JudgeError):
            ask(script, tmp_path, most_cost=cap, concurrency=1, **prices)
        assert len(script.bodies) == before
        answers = ask(script, tmp_path, most_cost=24 * 1.2 + bound, concurrency=1, **prices)
    assert len(script.bodies) == 24
    assert sum(a.paid for a in answers) == pytest.approx(24 * 1.2)


def test_with_several_under_way_the_cap_holds_too(tmp_path):
    prices = {"input_price": 1e4, "output_price": 5e4}
    cap = 3.0 * (max(upper_tokens(q) for q in asked()) * 1e-2 + 0.4)
    with serving(scores) as script, pytest.raises(JudgeError, match="most_cost"):
        ask(script, tmp_path, most_cost=cap, concurrency=8, **prices)
    assert 1.2 * len(script.bodies) <= cap


def test_a_server_that_counts_nothing_is_charged_the_most_it_may_have_used(tmp_path):
    reply = {"choices": [{"message": {"content": "8 6"}}]}
    (one, *_) = asked(1)
    with serving(lambda number, body: (200, reply, {})) as script:
        (answer,) = ask(script, tmp_path, [one], input_price=1e6, output_price=1e6)
    assert answer.paid == upper_tokens(one) + 8


def test_one_answer_that_fails_after_others_keeps_the_others(tmp_path):
    poison = asked()[7]

    def behave(number, body):
        return (400, "too long", {}) if body["messages"] == poison.messages else completion("8 6")

    with serving(behave) as script, pytest.raises(JudgeError, match="status 400"):
        ask(script, tmp_path, concurrency=1)
    assert len(list(tmp_path.rglob("*.json"))) == len(script.bodies) - 1 == 6
