"""Every Triton kernel compiles for the GPUs it is meant for, on a machine without one.

Compiled in a process of its own, where TRITON_INTERPRET is not set: run as a script, this file writes a JSON
object of reports to the path it is given.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}

# Bytes a program may have. sm_80 has 163 KB and sm_90 227 KB, but the smaller NVIDIA GPUs have 99 KB.
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 99 * 1024, "gfx942": 64 * 1024}

# Every tile of the tables at sm_90, a sample of them elsewhere.
ATTENTION = [("sm_90", dtype, head_dim) for dtype in ("bf16", "fp32") for head_dim in (32, 64, 128, 256)]
ATTENTION += [(target, "bf16", 128) for target in ("sm_80", "gfx942")]
ATTENTION += [(target, "fp32", 64) for target in ("sm_80", "gfx942")]
ATTENTION += [("sm_90", "fp16", 40)]
ATTENTION_KERNELS = ("forward", "dq", "dk_dv")

# (target, width, kernel): a fused backward of at most MAX_FUSED_WIDTH, beyond it dx alone.
LAYER_NORM = [("sm_90", 768, "forward"), ("sm_90", 768, "backward"), ("sm_90", 16384, "forward")]
LAYER_NORM += [("sm_90", 8192, "backward"), ("sm_90", 8192, "backward_sums"), ("sm_90", 16384, "backward_dx")]
LAYER_NORM += [(target, 768, kernel) for target in ("sm_80", "gfx942") for kernel in ("forward", "backward")]

KEYS = [
    f"attention-{kernel}-{dtype}-D{d}-{target}"
    for target, dtype, d in ATTENTION
    for kernel in ATTENTION_KERNELS
]
KEYS += [f"attention-delta-bf16-D128-{target}" for target in TARGETS]
KEYS += [f"layer_norm-{kernel}-E{width}-{target}" for target, width, kernel in LAYER_NORM]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__, str(folder / "reports.json")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "reports.json").read_text())


@pytest.mark.parametrize("key", KEYS)
def test_kernel_compiles_within_shared_memory(key: str, reports: dict[str, dict[str, Any]]) -> None:
    assert reports[key]["shared"] <= SHARED_MEMORY[key.rsplit("-", 1)[1]]


@pytest.mark.parametrize("key", [key for key in KEYS if key.endswith("sm_90")])
def test_no_registers_are_spilled_at_sm_90(key: str, reports: dict[str, dict[str, Any]]) -> None:
    assert reports[key]["stack"] == 0
    assert reports[key]["local"] == 0


# At head_dim 256 dk and dv fill the registers, and no tile of the 64 keys that wgmma needs is left.
WITH_WGMMA = [key for key in KEYS if re.fullmatch(r"attention-(forward|dq|dk_dv)-(bf|fp)16-D\d+-sm_90", key)]
WITH_WGMMA.remove("attention-dk_dv-bf16-D256-sm_90")


@pytest.mark.parametrize("key", WITH_WGMMA)
def test_16_bit_products_use_wgmma_at_sm_90(key: str, reports: dict[str, dict[str, Any]]) -> None:
    assert reports[key]["wgmma"]


@pytest.mark.parametrize("key", [key for key in KEYS if "fp32" in key and "sm_" in key])
def test_float32_products_are_not_shortened_to_tf32(key: str, reports: dict[str, dict[str, Any]]) -> None:
    assert not reports[key]["tf32"]


def sources() -> Iterator[tuple[str, str, Any, dict[str, Any], dict[str, str]]]:
    """(key, target, kernel, constants, pointer types), as the launches make them."""
    import torch

    from lmkern.kernels.attention import triton as attention
    from lmkern.kernels.attention import triton_kernels as attention_kernels
    from lmkern.kernels.layer_norm import triton as layer_norm
    from lmkern.kernels.layer_norm import triton_kernels as layer_norm_kernels

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    kernels = {
        "forward": attention_kernels.forward_kernel,
        "dq": attention_kernels.backward_dq_kernel,
        "dk_dv": attention_kernels.backward_dk_dv_kernel,
    }
    statistics = dict.fromkeys(("lse_ptr", "dlse_ptr", "delta_ptr"), "*fp32")
    for target, dtype, head_dim in ATTENTION:
        for name, kernel in kernels.items():
            constants = attention.constants(name, dtypes[dtype], head_dim, causal=True)
            constants |= {arg: 1 for arg in kernel.arg_names if re.fullmatch(r"stride_.d", arg)}
            types = {arg: f"*{dtype}" for arg in kernel.arg_names if arg.endswith("_ptr")} | statistics
            yield f"attention-{name}-{dtype}-D{head_dim}-{target}", target, kernel, constants, types
    for target in TARGETS:
        kernel = attention_kernels.delta_kernel
        constants = attention.delta_constants(128) | {"stride_od": 1, "stride_gd": 1}
        types = {"out_ptr": "*bf16", "dout_ptr": "*bf16"} | statistics
        yield f"attention-delta-bf16-D128-{target}", target, kernel, constants, types
    activations = dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr"), "*bf16")
    for target, width, name in LAYER_NORM:
        kernel = getattr(layer_norm_kernels, f"{name.split('_')[0]}_kernel")
        unwanted = {"backward_dx": ("dweight_ptr", "dbias_ptr"), "backward_sums": ("dx_ptr", "weight_ptr")}
        constants = layer_norm.constants(width) | dict.fromkeys(unwanted.get(name, ()))
        types = {arg: "*fp32" for arg in kernel.arg_names if arg.endswith("_ptr")} | activations
        yield f"layer_norm-{name}-E{width}-{target}", target, kernel, constants, types


def report(target: str, kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """What the compiler says of a kernel whose pointers and strides are multiples of 16, as a model's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name) or ("fp32" if name in ("softmax_scale", "eps") else "i32")
        if name.endswith("_ptr") or name.startswith("stride_") or name == "E":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    found = {"shared": compiled.metadata.shared}
    if "ptx" in compiled.asm:
        found |= {word: word in compiled.asm["ptx"] for word in ("wgmma", "tf32")}
        found |= stack_and_local_bytes(compiled.asm["cubin"])
    return found


def stack_and_local_bytes(cubin: bytes) -> dict[str, int]:
    """Per-thread memory outside the registers: where spilled registers go."""
    import triton

    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    )
    return {
        "stack": max(map(int, re.findall(r"STACK:(\d+)", usage.stdout))),
        "local": max(map(int, re.findall(r"LOCAL:(\d+)", usage.stdout))),
    }


if __name__ == "__main__":
    made = {key: report(*rest) for key, *rest in sources()}
    Path(sys.argv[1]).write_text(json.dumps(made))
