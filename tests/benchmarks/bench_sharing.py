"""What a sweep saves by sharing stages: a grid run as one sweep, and each of its points alone in an empty store.

    python tests/benchmarks/bench_sharing.py [--out tests/benchmarks/results/sharing.json] [OVERRIDE ...]

The grid that is run is eight methods x two thresholds at `debug=tiny` size; the full one, eight x five at the embedded
size, is planned. The eight are those whose policies depend on the threshold: baselines, which do not, would only make
the sharing look better. Not collected by pytest; the ratio that is asked for (at most 45%) is printed, not asserted.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from alignbench.record import git_commit, read_records  # noqa: E402
from alignbench.sweep import sharing  # noqa: E402

METHODS = "sacpo,p_sacpo,mocan,pecan,mocaid,pecaid,pd_dpo,online_pd_dpo"
SMALL = ("debug=tiny", "hardware.threads=1", "constraint.beta=0.5", "constraint.thresholds=[-0.1],[0.0]")
FULL = ("tracking=disabled", "constraint.thresholds=[0.0],[0.1],[0.2],[0.3],[0.4]")
LIMIT = 0.45


def multirun(*overrides):
    """Run a sweep; its output and wall seconds. A failed point would make the comparison worthless."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "-m", f"method={METHODS}", *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "240"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stdout)
    return done.stdout, time.perf_counter() - begin


def measured(folder, store, overrides):
    """One way of running the grid: seconds inside stages, wall seconds, and how many stages were built."""
    _, wall = multirun(*SMALL, f"output_dir={folder}", f"store_dir={store}", *overrides)
    records = read_records(folder)
    used = sharing(records)
    seconds: dict[str, list[float]] = {}
    for record in records:
        for stage in record["stages"]:
            seconds.setdefault(stage["key"], []).append(stage["cost"].get("seconds", 0.0))
    return {
        "runs": len(records),
        # each artifact once, at the mean of its costs: what sharing would leave of these very runs
        "distinct_stage_seconds": sum(map(statistics.mean, seconds.values())),
        "stage_uses": used["uses"],
        "stages_built": used["built"],
        "stage_seconds": sum(record["cost"]["seconds_now"] for record in records),
        "wall_seconds": wall,
    }


def planned(folder):
    """The full grid's figures, as `plan=true` prints them."""
    text, _ = multirun(*FULL, "plan=true", f"output_dir={folder}/out", f"store_dir={folder}/store")
    uses, distinct, _, seconds = re.search(r"│ all +│ +(\d+) │ +(\d+) │ +(\d+) │ +(\d+) s", text).groups()
    longest, alone = re.search(r"longest path (\d+) s; every run alone in an empty store (\d+) s", text).groups()
    return {
        "runs": int(re.search(r"plan of the sweep: (\d+) run", text)[1]),
        "stage_uses": int(uses),
        "distinct_stages": int(distinct),
        "stage_seconds": int(seconds),
        "alone_stage_seconds": int(alone),
        "longest_path_seconds": int(longest),
        "ratio": int(seconds) / int(alone),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sharing.json")
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "commit": git_commit(),
            "methods": METHODS.split(","),
            "overrides": [*SMALL, *overrides],
            "planned_full_grid": planned(folder / "plan"),
        }
        print(json.dumps(record, indent=2), flush=True)
        record["one_sweep"] = measured(folder / "sweep", folder / "store", overrides)
        print(json.dumps(record["one_sweep"]), flush=True)
        # one process for all points, as above, but each has an empty store of its own
        record["each_alone"] = measured(folder / "alone", f"{folder}/stores/${{hydra:job.num}}", overrides)
    record["ratio"] = record["one_sweep"]["stage_seconds"] / record["each_alone"]["stage_seconds"]
    # the same from the second measurement alone: other work on the machine between the two does not matter
    alone = record["each_alone"]
    record["ratio_within_each_alone"] = alone["distinct_stage_seconds"] / alone["stage_seconds"]
    record["limit"] = LIMIT
    print(json.dumps(record["each_alone"]))
    print(f"stage time of one sweep: {record['ratio']:.1%} of each point alone (limit {LIMIT:.0%})")
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
