"""Hyper-parameter search: `python main.py -m hydra/sweeper=optuna ... KEY=interval(a,b) KEY=choice(x,y)`.

Optuna's TPE maximises the reported policy's mean reward under one constraint per utility, requested minus achieved
margin at most 0; a trial that misses its margin is never preferred to one that meets it. Both are read from the trial's
record, which must be of validation prompts: results are reported on test prompts, and the search ends with the command
for that.

The study is a file in the search's folder, written after every trial. The same command continues it: trials that
failed or were killed run again, then the missing ones. A proposal depends on the trial's number and on what finished
before it alone, so with one trial at a time a search that was killed and continued makes the trials of one that was
not.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from alignbench.config import run_id, scientific
from alignbench.errors import AlignbenchError, ConfigError, DataError
from alignbench.jsonio import canonical, read_json
from alignbench.report.trials import Measured, Trial, measured, report

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)
#: What states the problem, or how it is measured: trials that differ in these are not comparable.
STATED = ("constraint", "dataset", "evaluate", "seed", "plan", "output_dir", "store_dir", "tracking", "hardware")


@dataclass(frozen=True)
class Options:
    """The fields of `hydra.sweeper`; see `hydra_plugins.alignbench_sweepers.SearchConf`."""

    n_trials: int
    n_jobs: int
    startup_trials: int
    seed: int


def search(
    config: DictConfig,
    arguments: Sequence[str],
    options: Options,
    *,
    root: Path,
    launch: Callable[[Sequence[Sequence[str]]], Sequence[JobReturn]],
    compose: Callable[[Sequence[str]], DictConfig],
) -> None:
    """Run what is missing of a search, and report all of it.

    Args:
        config: The configuration, fixed overrides applied.
        arguments: Overrides; intervals and choices are searched over, the others fixed.
        options: Numbers of trials and the sampler's seed.
        root: Where the search's folder is.
        launch: Runs jobs, each a list of overrides.
        compose: The configuration of such a job.

    Raises:
        ConfigError: nothing to search over, or settings that no search may choose, or on prompts that none may see.
        DataError: no trial finished.
    """
    space, fixed = space_of(arguments)
    _check(config, space, options)
    if config.plan:
        # where the sampler will go is unknown; random points have the same costs
        launch([_job(trial.params, fixed) for trial in _drawn(space, options)])
        return
    folder = root.resolve() / f"search-{_identity(config, space, options)}"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        study = _study(folder)
        left = _left(study, options)
        log.info("search: %d of %d trial(s) to run, study %s", left, options.n_trials, folder / "study.db")
        while left > 0:
            count = min(left, options.n_jobs)
            _batch(study, space, fixed, options, count, launch, compose)
            left -= count
        trials = _trials(study)
    if not any(trial.measured for trial in trials):
        last = next((trial.error for trial in reversed(trials) if trial.error), "none was run")
        raise DataError(
            f"none of {len(trials)} trial(s) finished; the last one's error: {last}",
            where=str(folder),
            mend="mend that, then repeat the command: it runs them again",
        )
    report(trials, folder, fixed=fixed, wanted=options.n_trials, compose=compose)


def space_of(arguments: Sequence[str]) -> tuple[dict[str, optuna.distributions.BaseDistribution], list[str]]:
    """What is searched over, by key, and the overrides that are fixed.

    Raises:
        ConfigError: a range, whose order no sampler of choices would know.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space: dict[str, optuna.distributions.BaseDistribution] = {}
    fixed = []
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        value = override.value()
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
        elif isinstance(value, IntervalSweep):
            logarithmic = "log" in value.tags
            if isinstance(value.start, int) and isinstance(value.end, int):
                space[_key(override)] = IntDistribution(value.start, value.end, log=logarithmic)
            else:
                space[_key(override)] = FloatDistribution(float(value.start), float(value.end), log=logarithmic)
        elif isinstance(value, RangeSweep):
            raise ConfigError(
                "a search takes no range",
                where=f"override {override.input_line}",
                mend="interval(a, b), tag(log, interval(a, b)), int(interval(a, b)), or choice(a, b, c)",
            )
        else:
            space[_key(override)] = CategoricalDistribution(tuple(override.sweep_string_iterator()))
    return space, fixed


def _key(override: Override) -> str:
    return str(override.get_key_element())


def _check(config: DictConfig, space: dict[str, Any], options: Options) -> None:
    if not space:
        raise ConfigError(
            "nothing to search over",
            where="hydra/sweeper=optuna",
            mend="give some key a range, for instance method.step.train.learning_rate=tag(log,interval(3e-5,1e-3)) or "
            "method.step.train.epochs=1,2",
        )
    stated = [key for key in space if key.split(".")[0].split("/")[0].lstrip("+") in STATED]
    if stated:
        raise ConfigError(
            f"a search may not choose {', '.join(stated)}: its trials would not be comparable",
            where="hydra/sweeper=optuna",
            mend="search over keys of method or model; fix this one, or run a sweep over it",
        )
    if config.evaluate.split != "validation":
        raise ConfigError(
            f"a search on {config.evaluate.split} prompts would choose settings by the prompts that results are of",
            where="evaluate.split",
            mend="evaluate.split=validation",
        )
    if min(options.n_trials, options.n_jobs) < 1 or options.startup_trials < 0:
        raise ConfigError(
            f"n_trials {options.n_trials}, n_jobs {options.n_jobs}, startup_trials {options.startup_trials}",
            where="hydra.sweeper",
            mend="n_trials and n_jobs are at least 1, startup_trials is not negative",
        )


def _identity(config: DictConfig, space: dict[str, Any], options: Options) -> str:
    """A name that changes with everything but the number of trials, and how and where they run."""
    what = {
        "fixed": scientific(config),
        "space": {key: repr(distribution) for key, distribution in space.items()},
        "sampler": [options.startup_trials, options.seed],
    }
    return hashlib.sha256(canonical(what).encode()).hexdigest()[:10]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(folder / "search.lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(
            "another process runs this very search",
            where=str(folder),
            mend="wait for it; for more trials at a time give it hydra.sweeper.n_jobs and a launcher that runs several",
        ) from None
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------- the study


def _study(folder: Path) -> optuna.Study:
    """The search's study; SQLite writes a trial whole or not at all."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = f"sqlite:///{folder / 'study.db'}"
    return optuna.create_study(study_name="search", storage=url, direction="maximize", load_if_exists=True)


def _drawn(space: dict[str, Any], options: Options) -> list[optuna.Trial]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=options.seed))
    return [study.ask(space) for _ in range(options.n_trials)]


def _points(study: optuna.Study) -> dict[int, optuna.trial.FrozenTrial]:
    """The latest trial of each point; Optuna's own numbers also count attempts."""
    return {trial.user_attrs["point"]: trial for trial in study.trials if "point" in trial.user_attrs}


def _left(study: optuna.Study, options: Options) -> int:
    """How many trials this call has to run; what an earlier one did not finish is put first in the queue."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # of a call that was killed: nobody else has the lock
    points = _points(study)
    again = [point for point, trial in sorted(points.items()) if trial.state is TrialState.FAIL]
    for point in again:
        study.enqueue_trial(points[point].params, user_attrs={"point": point})
    queued = [trial for trial in points.values() if trial.state is TrialState.WAITING]
    return len(again) + len(queued) + max(0, options.n_trials - _next_point(study))


def _next_point(study: optuna.Study) -> int:
    return max(_points(study), default=-1) + 1


def _ask(study: optuna.Study, space: dict[str, Any], options: Options) -> optuna.Trial:
    import optuna

    point = _next_point(study)
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=options.startup_trials, seed=options.seed * 1_000_003 + point
    )
    trial = study.ask(space)
    if "point" not in trial.user_attrs:
        trial.set_user_attr("point", point)
    return trial


def _job(params: dict[str, Any], fixed: Sequence[str]) -> tuple[str, ...]:
    """The overrides of a trial. Four digits of a float are enough to search, and can be read and typed."""
    chosen = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]
    return (*fixed, *chosen)


def _batch(
    study: optuna.Study,
    space: dict[str, Any],
    fixed: Sequence[str],
    options: Options,
    count: int,
    launch: Callable[[Sequence[Sequence[str]]], Sequence[JobReturn]],
    compose: Callable[[Sequence[str]], DictConfig],
) -> None:
    """Ask for some trials, run them together, and tell the study how they ended."""
    from optuna.trial import TrialState

    trials = [_ask(study, space, options) for _ in range(count)]
    jobs = [_job(trial.params, fixed) for trial in trials]
    results: Sequence[JobReturn | None] = [None] * count
    broken = ""
    try:
        results = launch(jobs)
    except Exception as error:  # a launcher's: submitit raises for a job that was killed
        log.exception("the launcher failed; what its jobs left is counted, and the search goes on")
        broken = f"{type(error).__name__}: {error}"
    for trial, job, result in zip(trials, jobs, results, strict=True):
        try:
            identity, found = _outcome(job, result, compose)
        except (AlignbenchError, OSError) as error:
            text = broken or str(error)
            trial.set_user_attr("error", text)
            study.tell(trial, state=TrialState.FAIL)
            log.warning("search: trial %d failed: %s", trial.user_attrs["point"], text)
            continue
        for utility, value in found.violations.items():
            trial.set_constraint(utility, value)
        trial.set_user_attr("run", {"id": identity, "met": found.met, "commit": found.commit})
        study.tell(trial, found.reward)


def _outcome(
    job: Sequence[str], result: JobReturn | None, compose: Callable[[Sequence[str]], DictConfig]
) -> tuple[str, Measured]:
    """A trial's run, and what its record says; None as the result of a launcher that broke off."""
    if result is not None and result.status is not JobStatus.COMPLETED:
        error = result._return_value  # `return_value` raises it
        raise DataError(f"{type(error).__name__}: {error}")
    config = compose(job)
    identity = run_id(config)
    return identity, measured(read_json(Path(str(config.output_dir)) / identity / "record.json"))


def _trials(study: optuna.Study) -> list[Trial]:
    """Every point of the study as plain data."""
    from optuna.trial import TrialState

    found = []
    for point, trial in sorted(_points(study).items()):
        made, run = None, trial.user_attrs.get("run", {"id": ""})
        if trial.state is TrialState.COMPLETE and trial.value is not None:
            made = Measured(trial.value, dict(trial.constraints), run["met"], run["commit"])
        found.append(Trial(point, _job(trial.params, ()), made, run["id"], trial.user_attrs.get("error", "")))
    return found
