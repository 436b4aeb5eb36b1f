"""Times the reports of a sweep of 400 records: the comparison, the dashboard, and how soon a browser has drawn it.

    python tests/benchmarks/bench_dashboard.py      # writes tests/benchmarks/results/dashboard.json

16 methods, 5 thresholds, 5 seeds, 128 prompts, 12 answers a run; records are made up. Each time is that of a whole
process, as a user waits for it. A page counts as open when all plots, tables and responses are drawn. Not collected by
pytest; needs Chromium (README). No threshold is asserted: wall-clock times belong to their machine.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "report")]

from browser import READY, executable  # noqa: E402
from dashboard_records import write_sweep  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

METHODS = [f"method{k:02d}" if k % 4 else f"mocaid{k:02d}" for k in range(16)]
THRESHOLDS, SEEDS = (0.0, 0.1, 0.2, 0.3, 0.4), range(5)
DRAWN = "performance.getEntriesByName('ready')[0].startTime / 1000"
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"


def seconds(*arguments):
    """Wall seconds of one report."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "alignbench.report", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - begin


def opening(page, width, repeat):
    """Seconds from the address to the first text and to the last drawing, best of a few fresh profiles."""
    found = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        for _ in range(repeat):
            context = browser.new_context(viewport={"width": width, "height": 900})
            tab = context.new_page()
            tab.goto(page.as_uri())
            tab.wait_for_selector(READY)
            found.append((tab.evaluate(DRAWN), tab.evaluate(PAINTED)))
            context.close()
        version = browser.version
        browser.close()
    return {"width": width, "drawn_s": min(d for d, _ in found), "first_text_s": min(p for _, p in found)}, version


def main():
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/benchmarks/results/dashboard.json")
    options = parser.parse_args()
    if executable() is None:
        sys.exit("no browser: apt-get install chromium")
    with tempfile.TemporaryDirectory() as name:
        folder = write_sweep(Path(name) / "sweep", METHODS, THRESHOLDS, SEEDS, prompts=128, answers=12, length=12)
        compare_s = min(seconds("compare", folder) for _ in range(options.repeat))
        dashboard_s = min(seconds("dashboard", folder) for _ in range(options.repeat))
        page = folder / "dashboard.html"
        size = page.stat().st_size
        (desktop, version), (phone, _) = (opening(page, width, options.repeat) for width in (1280, 375))
    found = {
        "records": len(METHODS) * len(THRESHOLDS) * len(SEEDS),
        "compare_s": compare_s,
        "dashboard_s": dashboard_s,
        "bytes": size,
        "opening": [desktop, phone],
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), "chromium": version},
        "command": "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python tests/benchmarks/bench_dashboard.py",
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
