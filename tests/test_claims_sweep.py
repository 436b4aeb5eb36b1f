"""sweeps/claims.sh makes the runs that the claims declare, and each claim finds its roles among them, unmixed."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from tiny_runs import TOP, environment

from alignbench.cli import CONF, register
from alignbench.config import TrackingConfig, recorded, resolve, validate
from alignbench.record import portable
from alignbench.report.claims.declared import CLAIMS, RUNS, Claim
from alignbench.report.claims.selection import Picked, pick, settings
from alignbench.report.runs import Runs
from alignbench.run import planned
from alignbench.store import Store
from alignbench.tracking import Tracker

SCRIPT = TOP / "sweeps" / "claims.sh"
NO_TRACKER = Tracker(TrackingConfig("disabled"), run_id="", group="", job_type="", config={}, folder=Path())


def lines_of_the_script() -> list[list[str]]:
    """The overrides of every run, with the script's own variables filled in."""
    text = re.sub(r"\\\n *", "", SCRIPT.read_text())
    values = dict(re.findall(r"^(\w+)='(.*)'$", text, re.M))
    filled = re.sub(r'"\$(grid|exact|pairs)"', lambda m: f"'{values[m[1]]}'", text)
    return [shlex.split(line)[1:] for line in filled.splitlines() if line.strip().startswith("sweep ")]


def test_the_script_makes_what_the_claims_declare() -> None:
    assert sorted(lines_of_the_script()) == sorted(shlex.split(line) for line in RUNS.values())
    assert "hours" in SCRIPT.read_text()  # its cost stands in its head


@cache
def records(name: str) -> tuple[dict[str, Any], ...]:
    """A line's runs with their configurations as records hold them: composed once, then seeds and thresholds set."""
    overrides = OverridesParser.create().parse_overrides(shlex.split(RUNS[name]))
    choices = {
        override.key_or_group: list(map(str, override.sweep_string_iterator()))
        if override.is_sweep_override()
        else [str(override.get_value_string())]
        for override in overrides
    }
    seeds, asked = choices.pop("seed"), choices.pop("constraint.thresholds", [])
    found = []
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for values in itertools.product(*choices.values()):
            given = [f"{k}={v}" for k, v in zip(choices, values, strict=True)]
            composed = hydra.compose("config", overrides=[*given, *(f"constraint.thresholds={a}" for a in asked[:1])])
            config, own = resolve(composed)
            validate(config, own)
            planned(config, own, Store(Path("nowhere")), NO_TRACKER)  # what plan=true does for every run
            kept = portable(recorded(composed))
            for seed, thresholds in itertools.product(seeds, [json.loads(text) for text in asked] or [None]):
                one = copy.deepcopy(kept)
                if thresholds is not None:
                    one["constraint"]["thresholds"] = thresholds
                run_id = f"{name}-{len(found)}"
                found.append(
                    {"run_id": run_id, "method": one["method"]["name"], "seed": int(seed), "config": one, "rows": {}}
                )
    return tuple(found)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_a_claim_finds_its_runs_in_those_of_all(claim: Claim) -> None:
    """Also among the runs of every other claim: nothing is ambiguous."""
    own = [record for name in claim.runs for record in records(name)]
    every = [record for name in RUNS for record in records(name)]
    for made in (own, every):
        fitting = [one for one in settings(Runs(list(made), {})) if one.constraints == claim.constraints]
        picked = [pick(claim.roles, one, lambda record: {}) for one in fitting]
        (found,) = [one for one in picked if isinstance(one, Picked)]
        assert len(found.seeds) >= 3
        assert not [note for note in found.notes if "left out" in note and "stands in two" not in note]
        assert claim.over != "slope" or len(found.points) > 1


def started(folder: Path, *arguments: str, fails: str = "nothing") -> tuple[int, list[list[str]]]:
    """The script's exit status and what it started, as it came; what has the word `fails` among its arguments fails."""
    stub, log = folder / "python", folder / "log"
    stub.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"sys.exit(1 if {fails!r} in sys.argv else 0)\n"
    )
    stub.chmod(0o755)
    variables = environment(PYTHON=str(stub), OUT=f"{folder}/a sweep")
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=variables, capture_output=True, text=True)
    return done.returncode, [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("options", [["plan=true"], ["debug=tiny", "seed=0"], []])
@pytest.mark.parametrize("fails", ["nothing", "method=p_sacpo", "method=dpo_helpful,dpo_safe"])
def test_the_script_starts_its_runs_and_then_the_page(tmp_path: Path, options: list[str], fails: str) -> None:
    """A failing line stops neither the others nor the page, and is not forgotten; a plan has no page."""
    status, found = started(tmp_path, *options, fails=fails)
    if options != ["plan=true"]:
        assert found.pop() == ["-m", "alignbench.report", "claims", f"{tmp_path}/a sweep"]
    common = [f"output_dir={tmp_path}/a sweep", "hardware.threads=1", "hardware.generation_batch=1024"]
    every = [["main.py", "-m", *common, "tracking=disabled", *line, *options] for line in lines_of_the_script()]
    assert sorted(found) == sorted(every)  # two at a time, in any order
    assert status == (0 if fails == "nothing" else 1)
