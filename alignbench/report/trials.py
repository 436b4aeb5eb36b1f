"""What a hyper-parameter search found: a table of its trials, a picture, and the result as `tuned_by` reads it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignbench.errors import DataError
from alignbench.jsonio import atomic_write_json
from alignbench.report.plot import COLOURS, named, pyplot, save

# of the search itself, not of the run that is reported
_OF_THE_SEARCH = ("evaluate.split", "tuned_by")


@dataclass(frozen=True)
class Measured:
    """What a search reads in a record.

    Attributes:
        reward: Mean reward of the reported policy.
        violations: Requested minus achieved margin by utility, in its units; met where not positive.
        met: yes (every one with confidence), likely (every point estimate) or no.
        commit: Of the code that made it.
    """

    reward: float
    violations: dict[str, float]
    met: str
    commit: str


@dataclass(frozen=True)
class Trial:
    """One point of a search.

    Attributes:
        number: From 0, in the order in which the sampler proposed them.
        overrides: KEY=VALUE of what was searched over.
        measured: What came out; None for a failed or interrupted one.
        run_id: Its run; "" as above.
        error: Why it failed; "" otherwise.
    """

    number: int
    overrides: tuple[str, ...]
    measured: Measured | None
    run_id: str
    error: str

    @property
    def violation(self) -> float:
        """The largest of any utility; infinite where nothing was measured."""
        return max(self.measured.violations.values()) if self.measured else math.inf

    @property
    def feasible(self) -> bool:
        """Whether every margin is met, by its point estimate on validation prompts."""
        return self.violation <= 0


def measured(record: Mapping[str, Any]) -> Measured:
    """Reward and violations of the policy that a record reports.

    Raises:
        DataError: they were not measured, are no numbers, or come from test prompts.
    """
    row, where = record["rows"][record["outcome"]["reported"]], f"record of {record['run_id']}"
    if record["config"]["evaluate"]["split"] != "validation":
        raise DataError("evaluated on prompts that results are of", where=where, mend="evaluate.split=validation")
    reward = row["metrics"].get("reward", {}).get("mean")
    constraints = row.get("constraints", {})
    violations = {u: c["requested_margin"] - c["achieved_margin"]["mean"] for u, c in constraints.items()}
    if reward is None or not violations or not all(map(math.isfinite, (reward, *violations.values()))):
        raise DataError(
            f"reward {reward}, violations {violations}: nothing to search by",
            where=where,
            mend="choose an evaluation with scores (evaluate=gold) and a constraint",
        )
    sure = all(c["satisfied_with_confidence"] for c in constraints.values())
    met = "yes" if sure else "likely" if max(violations.values()) <= 0 else "no"
    return Measured(float(reward), violations, met, str(record["commit"]))


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The feasible trial of the largest reward, the earliest of equals; None if none is feasible."""
    feasible = [trial for trial in trials if trial.feasible]
    return max(feasible, key=lambda trial: trial.measured.reward if trial.measured else -math.inf, default=None)


def report(
    trials: Sequence[Trial],
    folder: Path,
    *,
    fixed: Sequence[str],
    wanted: int,
    compose: Callable[[Sequence[str]], DictConfig],
) -> None:
    """Print the trials and the command that runs the best on test prompts; write search.json and the picture.

    Args:
        trials: Every point; at least one was measured.
        folder: Where the files go.
        fixed: The overrides that all trials share.
        wanted: How many trials were asked for.
        compose: The configuration of a list of overrides.
    """
    console = Console(width=None if Console().is_terminal else 160)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    best = best_of(trials)
    path = folder / "search.json"
    atomic_write_json(path, summary(trials, best, fixed, compose))
    picture(trials, folder / "search")
    console.print(table(trials, best))
    finished = sum(trial.measured is not None for trial in trials)
    say(f"search: {finished} of {wanted} trial(s) finished, {sum(trial.feasible for trial in trials)} feasible")
    for trial in trials:
        if trial.measured is None:
            say(f"failed: trial {trial.number}: {' '.join(trial.overrides)}\n  {trial.error or 'interrupted'}")
    if finished < len(trials):
        say("the same command runs them again")
    if best is None:
        nearest = min(trials, key=lambda trial: trial.violation)
        say(
            f"no trial meets every margin: trial {nearest.number} misses by {nearest.violation:.3g}; widen the search, "
            "raise hydra.sweeper.n_trials, or ask for less"
        )
    else:
        kept = [word for word in fixed if word.split("=")[0].lstrip("+") not in _OF_THE_SEARCH]
        words = [*kept, *best.overrides, "evaluate.split=test", f"tuned_by={path}"]
        say(f"the best, trial {best.number}, on test prompts: python main.py {shlex.join(words)}")
    say(f"result:  {path}\npicture: {named(folder / 'search', '.png')}")


def summary(
    trials: Sequence[Trial],
    best: Trial | None,
    fixed: Sequence[str],
    compose: Callable[[Sequence[str]], DictConfig],
) -> dict[str, Any]:
    """The result as `tuned_by` reads it: what was searched, what was chosen, every trial, best first."""
    chosen = {}
    if best is not None:
        composed = compose([*fixed, *best.overrides])
        values = {key: OmegaConf.select(composed, key) for key, _ in _settings(best)}
        chosen[str(composed.method.name)] = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in values.items()
            if not OmegaConf.is_dict(value)  # a group, such as the method itself
        }

    def rank(trial: Trial) -> tuple[bool, float]:
        return not trial.feasible, -trial.measured.reward if trial.feasible and trial.measured else trial.violation

    return {
        "what": "validation results of a hyper-parameter search: largest reward with every margin met; a violation is "
        "requested minus achieved margin",
        "commits": sorted({trial.measured.commit for trial in trials if trial.measured}),
        "fixed": [word for word in fixed if not word.startswith(("output_dir=", "store_dir="))],
        "chosen": chosen,
        "rows": [
            {
                "trial": trial.number,
                "run_id": trial.run_id,
                "settings": dict(_settings(trial)),
                **(
                    {
                        "reward": round(trial.measured.reward, 4),
                        "violations": {name: round(value, 4) for name, value in trial.measured.violations.items()},
                        "met": trial.measured.met,
                    }
                    if trial.measured
                    else {"error": trial.error or "interrupted"}
                ),
            }
            for trial in sorted(trials, key=rank)
        ],
    }


def _settings(trial: Trial) -> list[tuple[str, str]]:
    return [(key, value) for key, _, value in (word.partition("=") for word in trial.overrides)]


def table(trials: Sequence[Trial], best: Trial | None) -> Table:
    """Every trial in a row, the best in bold."""
    found = Table(
        title=f"search: {len(trials)} trial(s)",
        caption="validation prompts; violation: requested - achieved margin, met where not positive; met: yes = with "
        "confidence, likely = the point estimate only; * the best that is met",
    )
    keys = [key for key, _ in _settings(trials[0])]
    utilities = next(list(trial.measured.violations) for trial in trials if trial.measured)
    for heading in ("trial", *(escape(key.removeprefix("method.")) for key in keys), "reward"):
        found.add_column(heading, justify="right", overflow="fold")
    for utility in utilities:
        found.add_column("violation" if len(utilities) == 1 else f"{utility} violation", justify="right")
    found.add_column("met")
    for trial in trials:
        made = trial.measured
        values = [f"{made.reward:.3f}", *(f"{made.violations[u]:.3f}" for u in utilities), made.met] if made else None
        found.add_row(
            f"{trial.number} *" if trial is best else str(trial.number),
            *(escape(value) for _, value in _settings(trial)),
            *(values or ["-", *("-" for _ in utilities), "failed"]),
            style="bold" if trial is best else "",
        )
    return found


def picture(trials: Sequence[Trial], path: Path) -> None:
    """Reward by trial with the best so far, and reward against violation; a .png and a .pdf.

    Args:
        trials: Failed ones are left out.
        path: Base name.
    """
    plt = pyplot()
    figure, (history, plane) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained", sharey=True)
    blue, orange = COLOURS[5], COLOURS[1]
    for name, colour, marker, met in (("met", blue, "o", True), ("not met", orange, "X", False)):
        some = [(t.number, t.violation, t.measured.reward) for t in trials if t.measured and t.feasible is met]
        for axes, column in ((history, 0), (plane, 1)):
            axes.plot(
                [row[column] for row in some], [row[2] for row in some], marker, color=colour, markersize=7, label=name
            )
    bests = [best_of(trials[: end + 1]) for end in range(len(trials))]
    steps = [(t.number, b) for t, b in zip(trials, bests, strict=True) if b]
    if steps:
        rewards = [b.measured.reward for _, b in steps if b.measured]
        history.step([number for number, _ in steps], rewards, where="post", color="0.4", lw=1, label="best so far")
        plane.plot(steps[-1][1].violation, rewards[-1], "o", color="0.2", markersize=14, markerfacecolor="none")
    plane.axvline(0, color="0.6", linestyle="--", linewidth=1, zorder=0)
    history.set_xlabel("trial")
    history.set_ylabel("reward (mean per response, larger is better)")
    plane.set_xlabel("violation (requested - achieved margin; met left of 0)")
    figure.suptitle("hyper-parameter search, validation prompts", fontsize=11)
    figure.legend(*history.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    for axes in (history, plane):
        axes.margins(0.08)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
