"""Training compiles nothing: a machine without a C++ compiler trains, and one with it does not wait for it."""

import os
import subprocess
import sys
from pathlib import Path

import train_worker

REPOSITORY = Path(__file__).parents[2]
COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++", "ninja", "nvcc")


def train_two_steps(policy_folder, tmp_path, programs):
    """Two optimiser steps in a new process whose PATH holds only the folder `programs`."""
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "CUDA_HOME")} | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        "PATH": str(programs),
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, train_worker.__file__, str(policy_folder), str(tmp_path / "work"), "short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done, [path for path in extensions.rglob("*") if path.is_file()]


def test_without_a_compiler_training_works_and_nothing_is_compiled(policy_folder, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    done, compiled = train_two_steps(policy_folder, tmp_path, programs)
    assert done.returncode == 0, done.stderr
    assert "loss 0." in done.stdout
    assert compiled == []


def test_with_a_compiler_none_is_called(policy_folder, tmp_path):
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for name in COMPILERS:
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\nexit 1\n')
        (programs / name).chmod(0o755)
    done, compiled = train_two_steps(policy_folder, tmp_path, programs)
    assert done.returncode == 0, done.stderr
    # DeepSpeed asks for versions and for single C functions; building one of its ops would need C++ and a link
    asked = calls.read_text().splitlines() if calls.exists() else []
    assert [line for line in asked if ".cpp" in line or "-shared" in line] == []
    assert compiled == []
