"""Which backend serves a call, and the reason when one cannot.

A backend of an op is a module `lmkern.kernels.<op>.<backend>` with

    forward(...), backward(...)          the contract in lmkern/kernels/<op>/__init__.py
    unsupported(call) -> str | None      why this call cannot run there, in words; None when it can
    unavailable() -> str | None          why nothing can run there on this machine; None when it can

and `lmkern/kernels/<op>/__init__.py` lists them in BACKENDS, fastest first. The reference takes every call.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor

from lmkern.kernels import native

# A forked child must not start threads of a pool that stayed in its parent. The CPU modules notice forks once
# they are loaded; that the parent has called none of them does not mean that torch's pool has not run.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=native.cpu_modules)


class UnsupportedBackend(RuntimeError):
    """The backend that was asked for by name cannot run this call here; the message gives the reason."""


@dataclass(slots=True)
class Call:
    """One call of an op, as far as the choice of a backend depends on it.

    Not frozen: that doubles the time it takes to make one, and every call of an op makes one.
    """

    op: str
    tensors: Mapping[str, Tensor | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    backend: str | None = None


@dataclass(frozen=True, slots=True)
class Support:
    """One row of `lmkern doctor`: whether a backend of an op can run on this machine, and why not."""

    op: str
    backend: str
    usable: bool
    reason: str


def select(call: Call) -> ModuleType:
    """The kernel module for this call: the one asked for, or the fastest that can take it."""
    if call.backend is not None:
        module = load(call.op, call.backend)
        if reason := module.unsupported(call):
            others = ", ".join(row.backend for row in explain(call) if row.usable)
            raise UnsupportedBackend(f"{call.op}: backend {call.backend!r} {reason}. Here: {others}")
        return module
    for module in _usable(call.op):
        if not module.unsupported(call):
            return module
    raise AssertionError(f"{call.op}: the reference takes every call")


@cache
def load(op: str, backend: str) -> ModuleType:
    """The module of one backend of an op. ValueError for a name that is none of the op's."""
    names = backend_names(op)
    if backend not in names:
        raise ValueError(f"{op}: no backend {backend!r}; expected one of {', '.join(names)}")
    return importlib.import_module(f"lmkern.kernels.{op}.{backend}")


@cache
def _usable(op: str) -> tuple[ModuleType, ...]:
    """The op's backend modules that can run something on this machine, fastest first."""
    modules = (load(op, backend) for backend in backend_names(op))
    return tuple(module for module in modules if module.unavailable() is None)


def backend_names(op: str) -> tuple[str, ...]:
    """The names of an op's backends, fastest first."""
    names: tuple[str, ...] = importlib.import_module(f"lmkern.kernels.{op}").BACKENDS
    return names


def op_names() -> tuple[str, ...]:
    """Every op of the library: the folders beside this file."""
    package = importlib.import_module("lmkern.kernels")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg))


def explain(call: Call) -> list[Support]:
    """What each backend of the op says to this call, fastest first: the reasons behind `select`."""
    rows = []
    for backend in backend_names(call.op):
        reason = load(call.op, backend).unsupported(call)
        rows.append(Support(call.op, backend, reason is None, reason or ""))
    return rows


def describe() -> list[Support]:
    """Every op x backend on this machine, with the reason for each gap (what `lmkern doctor` prints)."""
    rows = []
    for op in op_names():
        for backend in backend_names(op):
            module = load(op, backend)
            reason = module.unavailable()
            if backend == "cpu":
                # A choice that cannot be met is no gap to pass over: each call raises it.
                reason = reason or native.refusal()
            rows.append(Support(op, backend, reason is None, reason or getattr(module, "NOTE", "")))
    return rows
