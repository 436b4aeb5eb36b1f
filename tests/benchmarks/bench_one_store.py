"""Eight runs on one store that need the same SFT model: who computes it, who waits for whom, and what a kill changes.

    python tests/benchmarks/bench_one_store.py [--runs 8]     # writes tests/benchmarks/results/one_store.json

Eight `main.py` processes start at once, one per learning rate of DPO, so that SFT and all before it is common and the
rest is each run's own. Then the same in another store, where whoever trains SFT is killed (SIGKILL) once it has saved a
checkpoint. Not collected by pytest. What must hold is checked: every stage is built once, each waiting run named the
holder, another one takes over from the checkpoint, and all records equal the undisturbed ones.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_runs import TINY, command, environment, science  # noqa: E402

from alignbench.jsonio import read_json  # noqa: E402
from alignbench.record import git_commit, read_records  # noqa: E402
from alignbench.store import Store  # noqa: E402

# SFT long enough that all eight are there before it ends, and that a kill meets it in the middle
LONG = ("model.sft.epochs=600", "hardware.checkpoint_every=20", "method=dpo_helpful")
WAITING = re.compile(r"waiting for artifact (\w+): stage 'sft' is being built by pid (\d+)")


def started(folder, number):
    """One run, its output in a file."""
    rate = f"method.step.train.learning_rate={(number + 1) * 1e-5:.0e}"
    argv = command(folder / "store", folder / "out", *LONG, rate, base=TINY)
    with open(folder / f"{number}.log", "w") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log, cwd=ROOT, env=environment())


def until(condition, processes, seconds=900):
    """Wait for a condition; give up if it does not come."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end or all(p.poll() is not None for p in processes):
            raise SystemExit("what was waited for did not come")
        time.sleep(0.05)
    return found


def holder_of_sft(store):
    """Who trains SFT now: pid and key of the artifact; None while nobody does."""
    for path in (store / "locks").glob("*.json"):
        try:
            info = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if info["stage"] == "sft":
            return info["pid"], path.stem
    return None


def scene(folder, runs, *, kill):
    """Start all runs at once; with `kill`, end SFT's first builder after its first checkpoint."""
    folder.mkdir()
    begin = time.perf_counter()
    processes = [started(folder, number) for number in range(runs)]
    killed = None
    try:
        if kill:
            pid, key = until(lambda: holder_of_sft(folder / "store"), processes)
            saved = folder / "store" / "building" / key / "work" / "checkpoints" / "COMPLETE.json"
            until(saved.exists, processes)
            # the other seven wait by then
            logs = [folder / f"{n}.log" for n, p in enumerate(processes) if p.pid != pid]
            until(lambda: all(WAITING.search(log.read_text()) for log in logs), processes)
            (killed,) = [number for number, process in enumerate(processes) if process.pid == pid]
            step = read_json(saved)["step"]
            processes[killed].kill()
        codes = [process.wait(900) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    wall = time.perf_counter() - begin
    texts = [(folder / f"{number}.log").read_text() for number in range(runs)]
    records = read_records(folder / "out")
    pids = {process.pid for process in processes}
    stages = [stage for record in records for stage in record["stages"]]
    waited = [WAITING.search(text) for text in texts]
    found = {
        "runs": runs,
        "exit_codes": codes,
        "records": len(records),
        "wall_seconds": wall,
        "artifacts_in_store": sum(1 for _ in Store(folder / "store").artifacts()),
        "distinct_artifacts_of_the_records": len({stage["key"] for stage in stages}),
        "built_by_finished_runs": sum(stage["built"] for stage in stages),
        "sft_started": sum("sft: running" in text for text in texts),
        "sft_built": sum(stage["built"] for stage in stages if stage["stage"] == "sft"),
        "sft_found": sum(not stage["built"] for stage in stages if stage["stage"] == "sft"),
        "runs_that_waited_for_sft": sum(match is not None for match in waited),
        "named_one_of_the_runs": all(int(match[2]) in pids for match in waited if match),
        "damaged": len(list((folder / "store" / "damaged").iterdir())),
    }
    if kill:
        went_on = [re.search(r"continuing at step (\d+) of (\d+)", text) for text in texts]
        found |= {
            "killed_run": killed,
            "checkpoint_at_kill": step,
            "continued": [[int(m[1]), int(m[2])] for m in went_on if m],
        }
    return found, {record["run_id"]: science(record) for record in records}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "one_store.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        calm, first = scene(Path(name) / "calm", options.runs, kill=False)
        print(json.dumps(calm), flush=True)
        killed, second = scene(Path(name) / "killed", options.runs, kill=True)
        print(json.dumps(killed), flush=True)
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "undisturbed": calm,
        "holder_killed": killed,
        "equal_records": sum(first[run] == record for run, record in second.items()),
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    others = options.runs - 1
    must = {
        "all runs of the first scene end well": calm["exit_codes"] == [0] * options.runs,
        "SFT is started and built once": (calm["sft_started"], calm["sft_built"]) == (1, 1),
        "the others name its holder": calm["runs_that_waited_for_sft"] == others and calm["named_one_of_the_runs"],
        "every artifact is built once": calm["built_by_finished_runs"] == calm["artifacts_in_store"],
        "after the kill the other runs end well": sorted(killed["exit_codes"]) == [-9] + [0] * others,
        "one of them takes over": (killed["sft_started"], killed["sft_built"]) == (2, 1),
        "from the checkpoint": [m[0] >= killed["checkpoint_at_kill"] for m in killed["continued"]] == [True],
        "their records are the undisturbed ones": record["equal_records"] == others,
    }
    for what, holds in must.items():
        print(f"{'yes' if holds else 'NO '}  {what}")
    return 0 if all(must.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
