"""Times the dual solver at the papers' size (1000 prompts x 128 responses) and keeps the figures.

    python tests/benchmarks/bench_dual.py            # writes tests/benchmarks/results/dual.json

Not collected by pytest. Ratios are printed, no threshold is asserted: wall-clock times belong to their machine.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from alignbench.dual import Bank, Solution, evaluate, solve, solve_path  # noqa: E402
from alignbench.dual_descent import projected_gradient, released_schedule  # noqa: E402
from alignbench.dual_intervals import Reweighted, bootstrap_interval, jackknife_interval  # noqa: E402

PROMPTS, RESPONSES, BETA = 1000, 128, 0.1


def make_bank(m):
    """Scores with the spread of a reward model and utilities that oppose the reward; uniform samples."""
    rng = np.random.default_rng(m)
    reward = 3.0 * rng.normal(size=(PROMPTS, RESPONSES))
    utilities = 2.0 * rng.normal(size=(PROMPTS, RESPONSES, m)) - 0.4 * reward[..., None]
    ids, names = tuple(map(str, range(PROMPTS))), tuple(f"g{j}" for j in range(m))
    return Bank(ids, names, reward, utilities, np.full((PROMPTS, RESPONSES), -np.log(RESPONSES)))


def timed(work, repeat):
    """Best wall seconds of a few runs, and the result of the last."""
    best = np.inf
    for _ in range(repeat):
        begin = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - begin)
    return best, result


def measure(m, repeat):
    """Figures of one number of utilities."""
    margins = np.ones(m)
    # a fresh bank each time: its caches (centred scores, reach) are part of the price
    grid = np.linspace(-1.0, 4.0 if m == 1 else 2.5, 50)[:, None] * margins
    path_s, path = timed(lambda: solve_path(make_bank(m), BETA, grid), repeat)
    make_s, bank = timed(lambda: make_bank(m), repeat)
    solved = [entry for entry in path if isinstance(entry, Solution)]
    evaluate(bank, BETA, margins, margins)
    evaluate_s, _ = timed(lambda: evaluate(bank, BETA, margins, margins), 10 * repeat)
    solve_s, found = timed(lambda: solve(bank, BETA, margins), repeat)
    again = Reweighted(bank, BETA, margins)
    jackknife_s, _ = timed(lambda: jackknife_interval(again), 1)
    bootstrap_s, _ = timed(lambda: bootstrap_interval(again, resamples=200), 1)  # without the jackknife's part
    gradient_s, descent = timed(lambda: projected_gradient(bank, BETA, margins, iterations=200), 1)
    figures = {
        "utilities": m,
        "evaluate_s": evaluate_s,
        "solve_s": solve_s,
        "solve_iterations": found.iterations,
        "solve_kkt_residual": found.kkt_residual,
        "path_50_thresholds_s": path_s - make_s,
        "path_solved": len(solved),
        "path_converged": sum(entry.converged for entry in solved),
        "path_iterations": sum(entry.iterations for entry in solved),
        "jackknife_s": jackknife_s,
        "bootstrap_200_s": bootstrap_s,
        "projected_gradient_200_s": gradient_s,
        "projected_gradient_error": float(np.abs(descent.multipliers[-1] - found.multipliers).max()),
    }
    if m == 1:
        released_s, released = timed(lambda: released_schedule(bank, BETA, 1.0), 1)
        error = None if released is None else abs(released - float(found.multipliers[0]))
        figures |= {"released_schedule_s": released_s, "released_schedule_error": error}
    return figures


def main():
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dual.json")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    runs = [measure(m, options.repeat) for m in (1, 2, 3)]
    record = {
        "size": {"prompts": PROMPTS, "responses": RESPONSES, "beta": BETA},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "command": "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python tests/benchmarks/bench_dual.py",
        "runs": runs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    for run in runs:
        print(json.dumps(run))
        thresholds, one = run["path_50_thresholds_s"] / run["evaluate_s"], run["solve_s"] / run["evaluate_s"]
        print(
            f"  m={run['utilities']}: 50 thresholds cost {thresholds:.0f} evaluations, one solve {one:.0f},"
            f" 200 gradient steps {run['projected_gradient_200_s'] / run['solve_s']:.0f} solves, a bootstrap of 200"
            f" {run['bootstrap_200_s'] / run['solve_s']:.0f} solves"
        )


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
