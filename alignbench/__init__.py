"""alignbench: one harness for constrained LLM alignment."""

import os

# Before NumPy is imported. Its own OpenBLAS multiplies small matrices here (the dual, the bootstraps), where threads
# gain nothing; beside another busy process, which a sweep of several jobs is, their waiting for each other was measured
# to cost a factor of 30 (500 bootstrap draws of a dual: 0.36 s became 6 to 16 s). torch's are hardware.threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
