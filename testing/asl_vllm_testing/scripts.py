"""Modules of scripts/, which is no package."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from asl_vllm_testing import ROOT

SCRIPTS = ROOT / "scripts"


def load(name: str) -> ModuleType:
    """Imports ``scripts/NAME.py``."""
    path = SCRIPTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"asl_script_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module
