"""Run one configuration, or a sweep with -m. `python main.py --help` explains the options."""

import os
import sys

# Before torch is imported: idle OpenMP threads sleep instead of spinning. Alone on a machine this costs a fifth of
# the speed of very small models; beside any other busy process spinning was measured to cost a factor of ten.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from alignbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
