"""The layer rule of DESIGN.md, read from syntax trees and includes."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmkern.kernels import backends

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lmkern"
CSRC = ROOT / "csrc"

# From left to right; testing stands beside them, for tests and benchmarks, and common files under them all.
LAYERS = (
    "kernels", "ops", "nn", "models", "patching", "huggingface", "data", "generation", "evaluation",
    "training", "report", "jobs", "cli",
)  # fmt: skip
BESIDE = {"testing"}
COMMON = {"ceiling", "files", "machine", "memory"}

# Packages that take long to import or that not every machine has: imported inside functions.
HEAVY = {"matplotlib", "triton", "transformers"}

# Ops that are one kernel family in C++.
FAMILIES = {"layer_norm": "norm", "rms_norm": "norm", "add_norm": "norm"}

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
CSRC_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".cpp", ".hpp", ".cu", ".cuh", ".h"})
PACKAGES = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


def layer_of(path: Path) -> str:
    """The folder under lmkern/; for a file that lies there itself, its name."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """The full names of the modules (and of the names in them) that a tree imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parts[:-1])


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_imports_come_from_layers_to_the_left(path: Path) -> None:
    layer = layer_of(path)
    if layer not in LAYERS:
        return
    for name in imported(ast.parse(path.read_text(encoding="utf-8")), package_of(path)):
        parts = name.split(".")
        if parts[0] != "lmkern" or len(parts) == 1:
            continue
        if parts[1] in LAYERS:
            right = LAYERS.index(parts[1]) > LAYERS.index(layer)
            assert not right, f"{relative(path)} imports {name}: {parts[1]} lies to the right of {layer}"
        else:
            assert parts[1] not in BESIDE, f"{relative(path)} imports {name}: for tests and benchmarks only"


@pytest.mark.parametrize("name", sorted(COMMON))
def test_what_any_layer_may_import_imports_no_layer(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    assert not [found for found in imported(tree, "lmkern") if found.split(".")[0] == "lmkern"]


def test_every_folder_is_a_layer() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= {*LAYERS, *BESIDE}


@pytest.mark.parametrize("path", sorted((PACKAGE / "testing").rglob("*.py")), ids=relative)
def test_testing_imports_no_more_than_ops(path: Path) -> None:
    for name in imported(ast.parse(path.read_text(encoding="utf-8")), package_of(path)):
        parts = name.split(".")
        if parts[0] == "lmkern" and len(parts) > 1:
            assert parts[1] not in LAYERS[2:], f"{relative(path)} imports {name}"


# One op's reference may be built on another's.
KERNEL_FILES = sorted(p for p in (PACKAGE / "kernels").rglob("*.py") if p.name != "reference.py")


@pytest.mark.parametrize("path", KERNEL_FILES, ids=relative)
def test_optimised_kernels_never_import_a_reference(path: Path) -> None:
    names = list(imported(ast.parse(path.read_text(encoding="utf-8")), package_of(path)))
    assert not any("reference" in name.split(".") for name in names)


@pytest.mark.parametrize("path", CSRC_FILES, ids=relative)
def test_no_torch_in_csrc(path: Path) -> None:
    for include in re.findall(r'#\s*include\s*[<"]([^">]+)', path.read_text(encoding="utf-8")):
        assert not re.match(r"(torch|ATen|c10|caffe2)\b", include), f"{relative(path)} includes {include}"


@pytest.mark.parametrize("path", CSRC_FILES, ids=relative)
def test_only_the_module_files_know_python(path: Path) -> None:
    includes = re.findall(r'#\s*include\s*[<"]([^">]+)', path.read_text(encoding="utf-8"))
    knows = any(include.startswith(("pybind11", "Python.h")) for include in includes)
    assert knows == path.name.endswith("_module.cpp")


@pytest.mark.parametrize("path", CSRC_FILES, ids=relative)
def test_csrc_includes_files_that_exist(path: Path) -> None:
    for include in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8")):
        assert (CSRC / include).is_file(), f"{relative(path)} includes {include}"


@pytest.mark.parametrize("op", backends.op_names())
def test_an_op_has_the_same_name_in_every_layer(op: str) -> None:
    assert (PACKAGE / "ops" / f"{op}.py").is_file()
    assert (CSRC / FAMILIES.get(op, op) / "params.hpp").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()
    public, ops = importlib.import_module("lmkern"), importlib.import_module("lmkern.ops")
    names = getattr(importlib.import_module(f"lmkern.kernels.{op}"), "PUBLIC", (op,))
    assert names
    for name in names:
        assert getattr(public, name) is getattr(ops, name)
        assert name in public.__all__


@pytest.mark.parametrize("op", backends.op_names())
def test_listed_backends_are_files_with_the_contract(op: str) -> None:
    folder = PACKAGE / "kernels" / op
    names = backends.backend_names(op)
    passes = getattr(importlib.import_module(f"lmkern.kernels.{op}"), "PASSES", ("forward", "backward"))
    assert names[-1] == "reference"
    assert len(set(names)) == len(names)
    for backend in names:
        assert (folder / f"{backend}.py").is_file()
        module = backends.load(op, backend)
        for function in (*passes, "unsupported", "unavailable"):
            assert callable(getattr(module, function)), f"{op} {backend}: {function}"


@pytest.mark.parametrize("package", PACKAGES, ids=relative)
def test_packages_list_their_public_names_by_hand(package: Path) -> None:
    module = importlib.import_module(package.relative_to(ROOT).as_posix().replace("/", "."))
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    brought = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    if not brought:
        return
    assert len(set(module.__all__)) == len(module.__all__)
    assert brought <= {*module.__all__}, f"{relative(package)}: imported and not in __all__"
    for name in module.__all__:
        assert hasattr(module, name)


@pytest.mark.parametrize("package", PACKAGES, ids=relative)
def test_packages_do_nothing_but_import(package: Path) -> None:
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        constant = isinstance(node, ast.Assign | ast.AnnAssign) and not any(
            isinstance(inside, ast.Call) for inside in ast.walk(node)
        )
        allowed = isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.If) or docstring
        assert allowed or constant, f"{relative(package)}/__init__.py, line {node.lineno}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    # What Triton compiles, and what launches it: imported at the first launch.
    if re.fullmatch(r"triton_(\w+_)?(kernels|parts|launch)\.py", path.name):
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = (
            set(imported(node, package_of(path))) if isinstance(node, ast.Import | ast.ImportFrom) else set()
        )
        heavy = {name for name in names if name.split(".")[0] in HEAVY}
        assert not heavy, f"{relative(path)}, line {node.lineno}: {heavy}"
