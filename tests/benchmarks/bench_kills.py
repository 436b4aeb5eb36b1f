"""kill -9 at random moments of a small sweep: does repeating the command end with the undisturbed sweep's numbers?

    python tests/benchmarks/bench_kills.py [--one 20] [--two 10]     # writes tests/benchmarks/results/kills.json

What a trial is stands in tests/kills.py. The file is written anew after every trial, so that a run that is stopped
keeps what it has found; "finished" says whether all trials are in it. Exit status 1 if a process survived or a value
differs. Not collected by pytest (tests/test_kills.py does a few trials).
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kills import LEFT_OUT, ONE_PROCESS, TWO_RANKS, trials  # noqa: E402

from alignbench.record import git_commit  # noqa: E402


def summary(facts, found):
    """One sweep's trials in figures."""
    return facts | {
        "trials": len(found),
        "equal": sum(not trial.differences for trial in found),
        "with_orphans": sum(bool(trial.orphans) for trial in found),
        "slowest_end_seconds": max(round(trial.gone_after, 1) for trial in found),
        "killed_during_a_stage": sum(bool(trial.stages) for trial in found),
        "killed_with_a_checkpoint": sum(trial.checkpoint for trial in found),
        "resumed_from_a_checkpoint": sum(bool(trial.resumed) for trial in found),
        "most_repeats": max(trial.repeats for trial in found),
        "victims": {who: sum(trial.victim == who for trial in found) for who in sorted({t.victim for t in found})},
        "trial": [dataclasses.asdict(trial) for trial in found],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", type=int, default=20, help="trials with one process")
    parser.add_argument("--two", type=int, default=10, help="trials with two ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kills.json")
    options = parser.parse_args()
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "python": platform.python_version(),
        "commit": git_commit(),
        "seed": options.seed,
        "not_compared": LEFT_OUT,
        "finished": False,
    }
    good = True
    with tempfile.TemporaryDirectory(prefix="kills-", ignore_cleanup_errors=True) as folder:
        for sweep, count in ((ONE_PROCESS, options.one), (TWO_RANKS, options.two)):
            if not count:
                continue
            found = []
            for facts, trial in trials(sweep, Path(folder) / sweep.name.replace(" ", "-"), count, options.seed):
                found.append(trial)
                good = good and trial.good
                record[sweep.name] = {"overrides": list(sweep.overrides), **summary(facts, found)}
                options.out.write_text(json.dumps(record, indent=2) + "\n")
                print(sweep.name, len(found), json.dumps(dataclasses.asdict(trial)), flush=True)
    options.out.write_text(json.dumps(record | {"finished": True}, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
