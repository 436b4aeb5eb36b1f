"""Methods by name: one file per paper, each recipe a plain function over the lab's verbs.

A recipe is `(lab, problem, settings) -> Outcome`. Importing this package registers the methods below; a new
one is a new file here, a new YAML in conf/method and nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil

from alignbench.methods.recipe import METHODS, Method, Outcome, find_method, method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Method", "Outcome", "find_method", "method"]
