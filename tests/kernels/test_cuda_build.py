"""The CUDA module compiles and holds what it should; a build that fails is told in words."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lmkern.kernels import backends, cuda_call, native, norm_call, norm_cuda
from lmkern.kernels.attention import cuda as attention_cuda

ROOT = Path(__file__).parents[2]
ENTRIES = {f"{op}_{way}" for op in ("attention", "norm") for way in ("forward", "backward")}
BUILD_FILES = ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The module's file, and what the build printed."""
    import pybind11

    folder = tmp_path_factory.mktemp("cuda")
    configure = [
        "cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        "-DLMKERN_MODULES=cuda", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_INSTALL_PREFIX={folder}",
        "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
    ]  # fmt: skip
    output = ""
    for command in (configure, ["cmake", "--build", folder / "build", "--target", "install", "--verbose"]):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        output += done.stdout + done.stderr
        assert done.returncode == 0, output[-4000:]
    (path,) = folder.glob("_cuda*.so")
    return path, output


@pytest.fixture(scope="module")
def module(built: tuple[Path, str]) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("built._cuda", str(built[0]))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def environment(**more: str) -> dict[str, str]:
    """With cmake and ninja of this environment first."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more}


@needs_nvcc
def test_no_kernel_spills_and_none_uses_the_stack(built: tuple[Path, str]) -> None:
    _, output = built
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", output)
    assert {target for _, target in kernels} == {"sm_80", "sm_90", "sm_90a"}
    use = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output)
    assert len(use) >= len(kernels) > 0
    assert set(use) == {("0", "0", "0")}


@needs_nvcc
def test_the_compiler_takes_the_hopper_kernels_as_written(built: tuple[Path, str]) -> None:
    """setmaxnreg ignored; products made one after the other; a wait or a fence put between them."""
    assert not re.findall(r"C7508|C7510|C7517|C7519", built[1])


@needs_nvcc
def test_the_hopper_kernels_use_its_products_and_copies(built: tuple[Path, str]) -> None:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("cuobjdump comes with Triton")
    cuobjdump = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    code = subprocess.run(
        [cuobjdump, "-sass", "-arch", "sm_90a", built[0]], capture_output=True, text=True, check=True
    ).stdout
    functions = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", code, re.DOTALL))
    forward, backward = (
        [text for name, text in functions.items() if f"{way}_kernelI" in name and "4Call" in name]
        for way in ("forward", "backward")
    )
    assert (len(forward), len(backward)) == (6, 6)
    for text in forward + backward:
        assert "HGMMA" in text and "UTMALDG" in text and "USETMAXREG" in text
        # Local memory is where registers go that there is no room for.
        assert "LDL" not in text and "STL" not in text
    for text in backward:
        assert "UBLKRED" in text


def test_no_launcher_waits_or_allocates() -> None:
    """What a CUDA graph cannot capture; memory is torch's."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if "cuda" in path.name or "tile" in path.parts]
    assert len(sources) > 10
    forbidden = r"cuda\w*Synchronize|cudaMalloc|cudaFree\w*\(|cudaMemcpy|cudaStreamCreate|cudaStreamLegacy"
    for path in filter(Path.is_file, sources):
        assert not re.findall(forbidden, path.read_text(encoding="utf-8")), path


@needs_nvcc
def test_module_holds_its_entry_points(module: ModuleType) -> None:
    names = {name for name in dir(module) if not name.startswith("_")}
    assert names == {"driver_version", "runtime_version", *ENTRIES}
    assert module.runtime_version() >= 11080


@needs_nvcc
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not on the PATH")
def test_module_links_neither_torch_nor_a_cuda_library(built: tuple[Path, str]) -> None:
    dynamic = subprocess.run(["readelf", "-d", built[0]], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic)
    assert needed
    assert not [name for name in needed if re.search("torch|c10|cuda|nv", name)]
    symbols = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", built[0]], capture_output=True, text=True, check=True
    ).stdout
    assert "PyInit__cuda" in symbols
    # Bound to torch's CUDA runtime in one direction or the other, if it were there.
    assert not re.findall(r"\bcuda\w+|\b__cuda\w+", symbols)


@needs_nvcc
def test_a_packed_call_of_another_size_is_refused(module: ModuleType) -> None:
    for entry in map(module.__getattribute__, ENTRIES):
        with pytest.raises(ValueError, match="does not match the compiled module; rebuild it"):
            entry(bytes(40))


@needs_nvcc
@no_gpu
def test_an_error_of_the_gpu_names_the_call(module: ModuleType) -> None:
    packed = norm_call.PARAMS.pack(*[0] * 20, 13, 14, 15, 0.5, 0.0, 1.0, 0, 0, 1, 0, 0, 1, 3)
    packed += norm_cuda._MORE.pack(4, 5)
    told = r"layer norm \w+ on \(13, 14\) bfloat16, residual float32, .* float32, CUDA device 4: cudaError"
    for entry in (module.norm_forward, module.norm_backward):
        with pytest.raises(RuntimeError, match=told):
            entry(packed)


def codes_of(fields: str) -> str:
    """The struct codes of a params.hpp's fields."""
    codes = ""
    for declaration in filter(None, map(str.strip, re.sub(r"//.*", "", fields).split(";"))):
        code = "d" if declaration.startswith("double ") else "q"
        assert code == "d" or re.match(r"(const )?void\* |int64_t ", declaration), declaration
        codes += code * (declaration.count(",") + 1)
    return codes


@pytest.mark.parametrize(
    ("header", "name", "packed"),
    [
        ("params.hpp", "NormParams", norm_call.PARAMS),
        ("cuda.hpp", "CudaNormParams", norm_cuda._MORE),
    ],
)
def test_packed_call_mirrors_the_struct(header: str, name: str, packed: struct.Struct) -> None:
    text = (ROOT / "csrc/norm" / header).read_text(encoding="utf-8").replace("    NormParams norm;", "")
    (body,) = re.findall(rf"struct {name} \{{(.*?)\}};", text, re.DOTALL)
    expanded = (code * int(count or 1) for count, code in re.findall(r"(\d*)([qd])", packed.format))
    assert codes_of(body) == "".join(expanded)


@pytest.mark.parametrize(
    "broken", [{"CXX": "/bin/false"}, {"CUDACXX": "/bin/false"}], ids=lambda one: next(iter(one))
)
def test_a_broken_compiler_leaves_the_reason_in_doctor(tmp_path: Path, broken: dict[str, str]) -> None:
    for name in BUILD_FILES:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes() if (ROOT / name).exists() else b"")
    ignore = shutil.ignore_patterns("*.so", "*.txt", "__pycache__")
    shutil.copytree(ROOT / "lmkern", tmp_path / "lmkern", ignore=ignore)
    # Without the CPU's sources its modules fail at once.
    (tmp_path / "csrc").mkdir()
    shutil.copyfile(ROOT / "csrc/cuda.cmake", tmp_path / "csrc/cuda.cmake")
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=environment(LMKERN_CUDA="1", **broken),
        capture_output=True,
        check=True,
    )
    assert (tmp_path / "lmkern/_build_failure_cuda.txt").exists()
    script = (
        "from lmkern.kernels.backends import describe\n"
        "for row in describe(): print(row.op, row.backend, row.usable, row.reason)"
    )
    doctor = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (line,) = (line for line in doctor.splitlines() if line.startswith("layer_norm cuda"))
    assert line.startswith("layer_norm cuda False was not built: ")
    assert "/bin/false" in line
    assert "not been run on a GPU" in line


def test_doctor_says_how_to_build_a_module_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build_failure", lambda kind: None)
    monkeypatch.setitem(sys.modules, "lmkern._cuda", None)
    reason = cuda_call.unavailable.__wrapped__()
    assert "LMKERN_CUDA=1 pip install -e ." in reason
    assert "nvcc" in reason


@needs_nvcc
@no_gpu
def test_doctor_says_that_no_gpu_is_visible(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build_failure", lambda kind: None)
    monkeypatch.setitem(sys.modules, "lmkern._cuda", module)
    assert cuda_call.unavailable.__wrapped__() == "needs an NVIDIA GPU and none is visible"


def test_a_driver_older_than_the_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("lmkern._cuda")
    old.runtime_version, old.driver_version = lambda: 13000, lambda: 12040  # type: ignore[attr-defined]
    monkeypatch.setattr(native, "build_failure", lambda kind: None)
    monkeypatch.setitem(sys.modules, "lmkern._cuda", old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = cuda_call.unavailable.__wrapped__()
    assert "built with CUDA 13.0 and the driver takes CUDA 12.4" in reason


class Usable:
    """A call that could run on the GPU: stands for tensors that this machine may not be able to make."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.bfloat16, width: int = 8) -> None:
        self.dtype, self.shape = dtype, (4, width)


def call(backend: str | None, **tensors: Usable) -> backends.Call:
    return backends.Call("layer_norm", {"x": Usable(), **tensors}, {}, backend)  # type: ignore[dict-item]


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_call, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_call, "_another", lambda device, exactly: None)


@pytest.mark.usefixtures("with_gpu")
def test_kernel_that_has_not_been_run_is_taken_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_cuda, "RUN_ON_HARDWARE", None)
    assert (
        norm_cuda.unsupported(call(None))
        == "has not been run on a GPU yet; ask for backend='cuda' by name to try it"
    )
    assert norm_cuda.unsupported(call("cuda")) is None
    monkeypatch.setattr(norm_cuda, "RUN_ON_HARDWARE", "a GPU")
    assert norm_cuda.unsupported(call(None)) is None


WITH_CUDA = [op for op in backends.op_names() if "cuda" in backends.backend_names(op)]


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize("op", WITH_CUDA)
def test_triton_is_chosen_until_the_kernel_has_been_run(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, triton = backends.load(op, "cuda"), backends.load(op, "triton")
    home = attention_cuda if op == "attention" else norm_cuda
    monkeypatch.setattr(triton, "unsupported", lambda call: None)
    monkeypatch.setattr(home, "RUN_ON_HARDWARE", None)
    monkeypatch.setattr(attention_cuda, "unavailable", lambda: None)
    unknown = backends.Call(op, dict.fromkeys(("q", "k", "x")))
    assert backends.select(unknown) is triton
    (row,) = (row for row in backends.explain(unknown) if row.backend == "cuda")
    assert "has not been run on a GPU yet" in row.reason
    assert "has not been run on a GPU yet" in module.NOTE or home.RUN_ON_HARDWARE
    monkeypatch.setattr(home, "RUN_ON_HARDWARE", "a GPU")
    assert backends.select(unknown) is module


def test_a_kernel_is_said_to_have_run_only_beside_a_result() -> None:
    results = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")]
    timed = {row["op"] for result in results for row in result["rows"] if row["backend"] == "cuda"}
    for home, ops in ((attention_cuda, {"attention"}), (norm_cuda, {*WITH_CUDA} - {"attention"})):
        assert home.RUN_ON_HARDWARE is None or ops <= timed


@pytest.mark.usefixtures("with_gpu")
def test_refused_calls_give_their_reason() -> None:
    reasons = {
        "takes float32, bfloat16 and float16; x is float64": call("cuda", x=Usable(torch.float64)),
        "takes rows of 1 to 2^30 elements; got 0": call("cuda", x=Usable(width=0)),
        "takes weight and bias of one dtype": call("cuda", weight=Usable(torch.float32), bias=Usable()),
    }
    for reason, refused in reasons.items():
        assert (norm_cuda.unsupported(refused) or "").startswith(reason)
    on_cpu = backends.Call("layer_norm", {"x": torch.ones(2, 2)}, {}, "cuda")
    assert norm_cuda.unsupported(on_cpu) == "needs tensors on a GPU; x is on cpu"
