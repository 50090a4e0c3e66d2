"""Python imports this at its start. It swaps this package in when the framework that ``SWAPPED`` names is imported."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType

# For each framework, the module after whose import the swap is made.
_MODULES = {
    "accelerate": "accelerate.accelerator",
    "lightning": "lightning.pytorch.trainer.trainer",
    "transformers": "transformers.trainer",
}


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, framework: str) -> None:
        self._framework = framework

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULES[self._framework]:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._framework)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, framework: str) -> None:
        self._loader = loader
        self._framework = framework

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        swaps = importlib.import_module("framework_swaps")
        getattr(swaps, f"swap_{self._framework}")(module, os.environ["SWAPPED_MODE"])


if "SWAPPED" in os.environ:
    sys.meta_path.insert(0, _Finder(os.environ["SWAPPED"]))
