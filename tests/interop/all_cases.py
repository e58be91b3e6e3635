"""Every case of every family."""

from __future__ import annotations

import importlib
import pkgutil

import cases
from transformers_oracle import Case

CASES: list[Case] = [
    case
    for module in sorted(pkgutil.iter_modules(cases.__path__), key=lambda module: module.name)
    for case in importlib.import_module(f"cases.{module.name}").CASES
]
