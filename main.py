"""Run one configuration, or a sweep with -m. `python main.py --help` explains the options."""

import os
import sys

# Before torch is imported: idle OpenMP threads spin for a moment, then sleep. Spinning without end was measured to cost
# a factor of ten beside another busy process; never spinning costs a small model 40 % of its speed on a quiet machine.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from alignbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
