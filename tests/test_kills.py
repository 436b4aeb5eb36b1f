"""A sweep that is killed at random moments ends, repeated, with the undisturbed sweep's numbers and no orphan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from kills import ONE_PROCESS, TWO_RANKS, Sweep, differences, trials


def test_every_value_counts_and_its_place_is_told() -> None:
    one = {"run": {"rows": [{"mean": 0.1, "n": 3}], "key": "a"}}
    other = {"run": {"rows": [{"mean": 0.1, "n": 4}], "key": "a", "more": 1}}
    assert list(differences(one, one)) == []
    assert list(differences(one, other)) == [
        "run.more: only in the disturbed result",
        "run.rows[0].n: 3 became 4",
    ]
    assert list(differences(0.1, 0.1 + 1e-16)) == [": 0.1 became 0.1000000000000001"]


# every stage starts its ranks anew: of the benchmark's two runs the one with fewer stages
SMALLER = replace(TWO_RANKS, overrides=tuple(o.replace("sft,dpo_helpful", "sft") for o in TWO_RANKS.overrides))


@pytest.mark.slow
@pytest.mark.parametrize(("sweep", "count"), [(ONE_PROCESS, 2), (SMALLER, 1)], ids=["one-process", "two-ranks"])
def test_a_killed_sweep_ends_with_the_undisturbed_numbers(tmp_path: Path, sweep: Sweep, count: int) -> None:
    for _, trial in trials(sweep, tmp_path, count, seed=1):
        assert trial.orphans == []
        assert trial.differences == []
        assert trial.repeats <= 1
