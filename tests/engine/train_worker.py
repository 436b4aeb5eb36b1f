"""A training run in a process of its own: python train_worker.py POLICY_FOLDER WORK MODE.

MODE "die": SIGKILL while the second checkpoint is being written, after its weights and before its marker.
MODE "short": two optimiser steps, then print the last loss.
"""

import os
import signal
import sys
from pathlib import Path

import tiny

from alignbench.engine import checkpoint

STEPS, EVERY, LORA = 8, 3, tiny.LORA


def job(folder, work, steps=STEPS):
    goal = tiny.preference("dpo", tiny.load(folder))
    machine = {"checkpoint_every": EVERY}
    return tiny.job(tiny.load(folder, LORA), goal, work, steps=steps, lora=LORA, machine=machine)


def die_at_the_second_marker():
    write, calls = checkpoint.atomic_write_json, []

    def dying(path, value):
        calls.append(path)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)

    checkpoint.atomic_write_json = dying


if __name__ == "__main__":
    folder, work, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if mode == "die":
        die_at_the_second_marker()
    result, _ = tiny.run(job(folder, work, STEPS if mode == "die" else 2))
    print("loss", result.log[-1]["loss"])
