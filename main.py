"""Run one configuration, or a sweep with -m. `python main.py --help` explains the options."""

import sys

from alignbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
