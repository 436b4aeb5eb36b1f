"""One run: compose -> validate -> (plan | run) -> record."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from alignbench import lab_scores, nodes, slots, stages
from alignbench import record as records
from alignbench.choose import choose, largest_processes
from alignbench.cli import SWEEP_ENV
from alignbench.config import Config, TrackingConfig, problem_of, recorded, resolve, run_id, validate
from alignbench.engine.runtime import device_of
from alignbench.errors import ConfigError, RankError
from alignbench.jsonio import write_jsonl
from alignbench.lab import Lab, Node
from alignbench.lab_judge import contests, entry
from alignbench.launch import check_devices
from alignbench.methods import Outcome, find_method
from alignbench.mirror import GENERATIONS, mirror
from alignbench.pins import plan_unpinned
from alignbench.plan import PlanLab, check_fits, show
from alignbench.report import certificates as certified
from alignbench.report import judging
from alignbench.report.calibration import calibration_plot
from alignbench.report.measures import measures
from alignbench.report.over_optimisation import over_optimisation
from alignbench.report.plot import trade_off
from alignbench.report.table import markdown_table, terminal_table
from alignbench.report.thresholds import markdown
from alignbench.report.trajectory import trajectory
from alignbench.show import show_data
from alignbench.stopping import SIGNALS
from alignbench.store import Store, explained_disk_errors, versions
from alignbench.tracking import Tracker

log = logging.getLogger(__name__)
_SCORER_PICTURES = {
    "calibration": calibration_plot,
    "over_optimisation": lambda record, path: over_optimisation([record], path),
}


def execute(composed: DictConfig) -> float:
    """Run (or plan) one configuration.

    Returns:
        The reported policy's mean reward (for a sweeper), 0 for a plan or without scores.
    """
    config, settings = resolve(composed)
    missing = plan_unpinned(config, settings) if config.plan else []
    console = Console(width=None if Console().is_terminal else 200)
    settle_hardware(composed, config, settings, console)
    validate(config, settings)
    store = Store(Path(config.store_dir), on_message=lambda message: log.warning("store: %s", message))
    if config.data == "show":
        show_data(config, store, console)
        return 0.0
    tuned_by = _tuning(config.tuned_by, composed)
    identity = run_id(composed)
    tracker = Tracker(
        config.tracking,
        run_id=identity,
        group=config.tracking.group or _sweep_name() or str(config.dataset.name),
        job_type=find_method(settings.name).name,
        config=records.portable(recorded(composed)),
        folder=Path(config.output_dir) / identity,
    )
    planner = planned(config, settings, store, tracker)
    if config.plan:
        show(planner, console)
        if missing:
            console.print(f"to be given before a run: {', '.join(missing)}", highlight=False, soft_wrap=True)
        check_fits(planner)
        return 0.0
    check_fits(planner)
    if nodes.is_helper(config.hardware):
        helped = nodes.helper(nodes.rendezvous(config.hardware), Path(config.store_dir).absolute() / "nodes")
        if helped:
            raise RankError("the first task of this job is gone", where="hardware.nodes", mend="see its log")
        return 0.0
    own = slots.taken(config.hardware, identity) if config.hardware.share_node else nullcontext()
    with SIGNALS.handled(), own, tracker:
        if config.hardware.device == "cuda":
            device_of(config.hardware)  # a GPU that is not there is noticed before anything runs
            check_devices(config.hardware)
        lab = Lab(config, store, tracker)
        outcome, evaluations, certificates = _recipe(lab, config, settings)
        scorers = lab_scores.assessments(lab, settings)
        compared = lab_scores.proxies(lab, evaluations, settings)
        folder = Path(config.output_dir) / identity
        judged, benchmarks = contests(lab, evaluations), _benchmarks(lab, evaluations)
        geometries = _geometries(lab)
        record = records.make_record(
            run_id=identity,
            config=records.portable(recorded(composed)),
            outcome=outcome,
            evaluations=evaluations,
            certificates=certificates,
            scorers=scorers,
            proxies=compared,
            geometries=geometries,
            nodes=lab.nodes,
            versions=versions(),
            tuned_by=tuned_by,
            experiments=records.experiments_of(folder, _experiment()),
        )
        for name, node in benchmarks.items():
            record["rows"][name]["metrics"] |= node.result.json("metrics.json")["metrics"]
        if config.judge is not None:
            ev = config.evaluate
            record["judging"] = entry(config.judge, judged, level=ev.level, resamples=ev.resamples, seed=config.seed)
        with explained_disk_errors(folder):
            record["per_prompt"] = records.write_per_prompt(folder, evaluations)
            record["training"] = records.write_training(folder, lab.nodes)
            path = records.write_record(folder, record)
            _report(record, folder, console)
            _generations(evaluations, folder)
            mirror(record, folder, tracker)
    _say_where(record, path, console)
    reward = record["rows"][outcome.reported]["metrics"].get("reward")
    return 0.0 if reward is None else float(reward["mean"])


def settle_hardware(composed: DictConfig, config: Config, settings: Any, console: Console) -> None:
    """Replace `hardware=auto` by what it chooses, in `config` and, for the record, in `composed`."""
    if not config.hardware.auto:
        return
    config.hardware = largest_processes(config.hardware, config.model, settings)
    validate(config, settings)
    # a plan mirrors nothing
    off = Tracker(TrackingConfig("disabled"), run_id="", group="", job_type="", config={}, folder=Path())
    config.hardware = choose(planned(config, settings, Store(Path(config.store_dir)), off), console)
    OmegaConf.update(composed, "hardware", dataclasses.asdict(config.hardware))


def planned(config: Config, settings: Any, store: Store, tracker: Tracker) -> PlanLab:
    """The whole run under a lab that runs nothing."""
    planner = PlanLab(config, store, tracker)
    _, evaluations, _ = _recipe(planner, config, settings)
    lab_scores.assessments(planner, settings)
    lab_scores.proxies(planner, evaluations, settings)
    contests(planner, evaluations)
    _benchmarks(planner, evaluations)
    _geometries(planner)
    return planner


def _recipe(lab: Lab, config: Config, settings: Any) -> tuple[Outcome, dict[str, Node], dict[str, dict[str, Node]]]:
    """The method, then the evaluation (and certificate) of the reference and of every policy that it names."""
    problem = problem_of(config.constraint)
    outcome = find_method(settings.name).recipe(lab, problem, settings)
    policies = {"sft": lab.reference()} | outcome.policies
    evaluations = {name: lab.evaluate(node, problem, label=name) for name, node in policies.items()}
    certificates = {
        name: lab.certify(node, problem, label=name, multipliers=outcome.duals.get(name))
        for name, node in policies.items()
    }
    return outcome, evaluations, certificates


def _benchmarks(lab: Lab, evaluations: dict[str, Node]) -> dict[str, Node]:
    """The benchmark of each row's policy; empty where none is asked for."""
    policies = {name: node.inputs["logprobs"].source("policy") for name, node in evaluations.items()}
    found = {name: lab.benchmark(policy, label=name) for name, policy in policies.items()}
    return {name: node for name, node in found.items() if node is not None}


def _geometries(lab: Lab) -> list[Node]:
    """What pictures show of every dual that the run has solved."""
    return [lab.dual_geometry(node) for node in list(lab.nodes.values()) if node.stage is stages.DUAL]


def _tuning(path: str | None, composed: DictConfig) -> dict[str, Any] | None:
    """The search behind the settings, to be kept in the record, and whether this run follows its choice."""
    if path is None:
        return None
    try:
        search = json.loads((Path(__file__).resolve().parents[1] / path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tuned_by names {path}, which cannot be read ({type(error).__name__})",
            where="tuned_by",
            mend="tuned_by=null, or the path of a search result in the repository",
        ) from None
    chosen = search.get("chosen", {}).get(composed.method.name, {})
    # a method that the search did not vary follows nothing
    followed = bool(chosen) and all(OmegaConf.select(composed, key) == value for key, value in chosen.items())
    return {"file": records.portable(path), "followed": followed, **search}


def _sweep_name() -> str | None:
    """The W&B group of a multirun, which `cli.main` names by its overrides; None for a single run."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra is None or hydra.mode is None or hydra.mode.name != "MULTIRUN":
        return None
    return os.environ.get(SWEEP_ENV)


def _experiment() -> str | None:
    """The preset that the command line named; None without one."""
    if not HydraConfig.initialized():
        return None
    choice = HydraConfig.get().runtime.choices.get("experiment")
    return None if choice is None else str(choice)


def _report(record: dict[str, Any], folder: Path, console: Console) -> None:
    """Table and pictures of one run, made from its record alone."""
    title = f"{record['method']} on {record['config']['dataset']['name']}, seed {record['seed']}"
    console.print(terminal_table([record], title))
    text = markdown_table([record])
    if any("certificate" in row for row in record["rows"].values()):
        console.print(certified.run_table(record))
        text += f"\n{markdown(*certified.run_cells(record))}\n\n{certified.RUN_CAPTION}\n"
    text += f"\n{measures(record).markdown()}"
    judged = record.get("judging", {})
    if judged.get("contests"):
        console.print(judging.terminal(judged))
        text += f"\n{judging.markdown(judged)}"
        judging.picture(judged, folder / "judging")
    (folder / "table.md").write_text(text, encoding="utf-8")
    utility = record["config"]["constraint"]["utilities"][0]
    if utility in next(iter(record["rows"].values()))["metrics"]:
        trade_off([record], folder / "trade_off", utility=utility)
    trajectory(record, folder / "trajectory")
    for name, draw in _SCORER_PICTURES.items():
        draw(record, folder / name)


def _generations(evaluations: dict[str, Node], folder: Path, count: int = 12) -> None:
    """Answers of every policy to the same prompts, side by side."""
    rows: dict[str, dict[str, Any]] = {}
    for name, node in evaluations.items():
        answers = node.inputs["responses"].result.jsonl("responses.jsonl")
        scores = node.inputs["scores"].result.jsonl("scores.jsonl")
        seen: set[str] = set()
        for answer, score in zip(answers, scores, strict=True):
            if answer["prompt_id"] in seen or len(seen) >= count:
                continue
            seen.add(answer["prompt_id"])
            row = rows.setdefault(answer["prompt_id"], {"prompt": answer["prompt"]})
            row[name] = answer["response"]
            row |= {f"{name} {key}": round(value, 3) for key, value in score.items()}
    write_jsonl(folder / GENERATIONS, rows.values())


def _further_pictures(record_path: Path) -> str:
    named = {name: record_path.with_name(f"{name}.png") for name in ("trajectory", "judging", *_SCORER_PICTURES)}
    return "".join(f"{name + ':':<12} {picture}\n" for name, picture in named.items() if picture.exists())


def _say_where(record: dict[str, Any], path: Path, console: Console) -> None:
    cost = record["cost"]
    picture = path.with_name("trade_off.png")
    console.print(
        f"models: {cost['models_trained']} trained besides the reference, "
        f"{cost['models_in_memory_while_training']:.0f} in memory while training\n"
        f"stages: {cost['stages_built_now']} run, {cost['stages'] - cost['stages_built_now']} found in the store\n"
        f"record:      {path}\n"
        f"table:       {path.with_name('table.md')}\n"
        f"picture:     {picture if picture.exists() else 'none without scores'}\n"
        f"{_further_pictures(path)}"
        f"generations: {path.with_name('generations.jsonl')}\n"
        f"policy:      artifact {record['outcome']['policies'][record['outcome']['reported']]} in the store",
        highlight=False,
        soft_wrap=True,
    )
