"""Rounds of a fraction of an epoch: together they see every pair, and training on the same part again is no round."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny_runs import plan

from alignbench.engine.objectives import SftObjective


@dataclass
class Watched(SftObjective):
    """Remembers which examples a step asked for."""

    seen: list[int] = field(default_factory=list)

    def weights(self, indices: np.ndarray) -> np.ndarray:
        self.seen.extend(map(int, indices))
        return super().weights(indices)


def seen(tmp_path: Path, which: int, examples: int = 32, steps: int = 2) -> list[int]:
    goal = Watched(tiny.rows(examples, 0))
    tiny.run(tiny.job(tiny.llama(), goal, tmp_path / str(which), steps=steps, batch_size=8, round=which))
    return goal.seen


def test_two_half_rounds_see_every_example_once(tmp_path: Path) -> None:
    first, second = seen(tmp_path, 0), seen(tmp_path, 1)
    assert len(first) == len(second) == 16
    assert sorted(first + second) == list(range(32))


def test_the_first_two_halves_are_the_order_of_one_whole_round(tmp_path: Path) -> None:
    whole = seen(tmp_path / "whole", 0, steps=4)
    assert seen(tmp_path, 0) + seen(tmp_path, 1) == whole


@pytest.mark.parametrize(("method", "label"), [("mocaid", "prefer mocaid {}"), ("pd_dpo", "prefer safety, pd_dpo {}")])
def test_every_iteration_of_a_method_is_a_round_of_its_own(tmp_path: Path, method: str, label: str) -> None:
    _, _, _, nodes = plan(tmp_path, f"method={method}")
    rounds = [node.identity.spec.round for name, node in nodes.items() if name.startswith(label.format("").strip())]
    assert rounds == list(range(len(rounds)))
    assert len(rounds) == (4 if method == "mocaid" else 3)
    assert nodes[label.format(2)].identity.spec.round == 1
