"""The reference, DPO on one objective, and how a method is added."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import MISSING
from tiny_runs import Run, plan, run, shared_tiny

from alignbench.errors import ConfigError
from alignbench.lab import Lab
from alignbench.methods import METHODS, Outcome, find_method, method
from alignbench.problem import Problem


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_tiny(tmp_path_factory)


def test_sft_is_the_reference_alone(tmp_path: Path) -> None:
    _, outcome, evaluations, nodes = plan(tmp_path, "method=sft")
    assert outcome.policies == {"sft": nodes["sft"]}
    assert list(evaluations) == ["sft"]
    assert not any(node.stage.name == "prefer" for node in nodes.values())


def test_sft_does_not_sample_pairs_that_it_does_not_need(tmp_path: Path) -> None:
    _, _, _, nodes = plan(tmp_path, "method=sft")
    assert "label pairs" not in nodes


@pytest.mark.parametrize(
    ("name", "utilities", "objective"),
    [
        ("dpo_helpful", "[safety]", "reward"),
        ("dpo_safe", "[safety]", "safety"),
        ("dpo_safe", "[politeness]", "politeness"),
    ],
)
def test_dpo_on_one_objective(tmp_path: Path, name: str, utilities: str, objective: str) -> None:
    _, outcome, _, nodes = plan(tmp_path, f"method={name}", f"constraint.utilities={utilities}", "constraint.beta=0.3")
    node = nodes[f"prefer {objective}"]
    assert outcome.policies == {name: node}
    assert outcome.reported == name
    assert node.identity.spec.objective == objective
    assert node.identity.spec.beta == 0.3  # null takes the problem's
    assert node.inputs["start"] is node.inputs["reference"] is nodes["sft"]
    _, _, _, own = plan(tmp_path, f"method={name}", f"constraint.utilities={utilities}", "method.beta=0.7")
    assert own[f"prefer {objective}"].identity.spec.beta == 0.7


def test_a_beta_of_zero_is_refused_and_not_taken_for_null(tmp_path: Path) -> None:
    for beta in ("0", "-0.1"):
        with pytest.raises(ConfigError, match=r"method\.beta"):
            run(tmp_path / "store", tmp_path / "out", "method=dpo_safe", f"method.beta={beta}")


def test_dpo_safe_runs_on_its_own_labels(tiny: Run, tmp_path: Path) -> None:
    done = run(tiny.copied(tmp_path / "store"), tmp_path / "out", "method=dpo_safe")
    assert done.built[0] == "prefer safety"
    assert done.weights("prefer safety") != tiny.weights("prefer reward")
    assert list(done.record["rows"]) == ["sft", "dpo_safe"]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_recipe_under_the_planning_lab_touches_no_file(tiny: Run, tmp_path: Path, name: str) -> None:
    store = tiny.copied(tmp_path / "store")

    def listing() -> dict[str, int]:
        return {str(path): path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = listing()
    lab, _, _, _ = plan(store, f"method={name}", "seed=7", "tracking.mode=offline")
    assert listing() == before
    assert any(node.artifact is None for node in lab.nodes.values())
    assert not any(node.built for node in lab.nodes.values())


# ---------------------------------------------------------------- adding one


@dataclass
class TwiceSettings:
    name: str = MISSING
    beta: float = 0.25

    def check(self, config: object) -> None:
        if self.beta <= 0:
            raise ConfigError("beta is not positive", where="method.beta", mend="a positive number")


@pytest.fixture
def twice() -> Iterator[str]:
    """A method as its author would add it, for the time of one test."""
    from alignbench.methods.steps import StepSettings

    step = StepSettings()
    step.train.learning_rate, step.train.epochs, step.train.batch_size = 1e-3, 1, 8

    @method("twice", TwiceSettings)
    def recipe(lab: Lab, problem: Problem, settings: TwiceSettings) -> Outcome:
        """Helpfulness twice, at beta and at half of it."""
        policy, policies = lab.reference(), {}
        for k in (1, 2):
            policy = lab.prefer(
                policy,
                policy,
                lab.pairs(),
                objective="reward",
                beta=settings.beta / k,
                settings=step.prefer(),
                label=f"prefer {k}",
            )
            policies[f"twice {k}"] = policy
        return Outcome(policies, "twice 2", diagnostics={"rounds": 2})

    yield "twice"
    del METHODS["twice"]


def test_a_new_method_is_one_decorated_function(tiny: Run, tmp_path: Path, twice: str) -> None:
    overrides = ("method=sft", f"method.name={twice}", "+method.beta=0.5")
    lab, outcome, evaluations, nodes = plan(tiny.store, *overrides)
    assert list(evaluations) == ["sft", "twice 1", "twice 2"]
    assert [nodes[f"prefer {k}"].identity.spec.beta for k in (1, 2)] == [0.5, 0.25]
    assert outcome.policies["twice 1"].artifact is None
    assert lab.estimates[nodes["prefer 1"].key].trained_tokens > 0
    done = run(tiny.copied(tmp_path / "store"), tmp_path / "out", *overrides)
    assert done.record["method"] == "twice"
    assert done.record["outcome"]["diagnostics"] == {"rounds": 2}
    assert done.folder.name.startswith("twice-handbook-s0-")
    assert done.record["rows"]["twice 2"]["metrics"]["reward"]["n"] == 12


def test_its_own_check_and_its_own_keys_hold(tmp_path: Path, twice: str) -> None:
    with pytest.raises(ConfigError, match="not positive"):
        run(tmp_path / "store", tmp_path / "out", "method=sft", f"method.name={twice}", "+method.beta=-1")
    with pytest.raises(ConfigError, match="its settings are: name, beta"):
        run(tmp_path / "store", tmp_path / "out", "method=sft", f"method.name={twice}", "+method.gamma=1")


def test_a_name_is_registered_once(twice: str) -> None:
    with pytest.raises(ConfigError, match="'twice' is registered twice"):
        method("twice", TwiceSettings)(lambda lab, problem, settings: Outcome({}, ""))
    with pytest.raises(ConfigError, match="'sacpo' is registered twice"):
        method("sacpo", TwiceSettings)(lambda lab, problem, settings: Outcome({}, ""))
    assert find_method("sacpo").settings is not TwiceSettings


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=", ".join(sorted(METHODS))):
        find_method("sacpoo")
