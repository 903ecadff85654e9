"""Every Triton kernel compiles for the GPUs it is meant for, on a machine without one, and is not compiled
again for new lengths and batch sizes.

Compiled in processes of their own, where TRITON_INTERPRET is not set: run as a script, this file writes a
JSON object of reports to the path it is given. LMKERN_COMPILE=all compiles every case for every architecture.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from lmkern.kernels import tuning
from lmkern.kernels.backends import UnsupportedBackend
from lmkern.testing.triton_cases import TritonCase, triton_cases

ARCHITECTURES = ("sm_90", "sm_80", "sm_89", "sm_100", "sm_120", "gfx942")
CASES = triton_cases()
ALL = os.environ.get("LMKERN_COMPILE") == "all"

# Every tuned configuration at sm_90, a sample of them elsewhere.
JOBS = [
    (architecture, case)
    for architecture in ARCHITECTURES
    for case in CASES
    if ALL or case.everywhere or (architecture == "sm_90" and not case.further)
]
KEYS = [f"{architecture}-{case}" for architecture, case in JOBS]
AT_SM_90 = [key for key in KEYS if key.startswith("sm_90")]

COUNTED = [case for case in CASES if ALL or not case.further]

# Tokens and sequences that a case is compiled at; ROUNDS random ones count compilations.
TOKENS, SEQUENCES, ROUNDS = 96, 2, 12

# Where registers are spilled inside a loop at sm_90: kernel and constants that say it, and the reason.
# Every feature at once (biases, mask, soft-cap, dropout, a window) takes more than 255 registers, and tiles
# of under 64 queries could not use wgmma. Each feature alone, and bias, mask and dropout
# together, spill nothing in loops.
EVERYTHING = {"SOFTCAP": True, "HAS_LEFT": True, "HAS_RIGHT": True, "BLOCK_D": 64}
SPILLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("attention.triton_kernels.forward_kernel", EVERYTHING),
    ("attention.triton_kernels.backward_dq_kernel", EVERYTHING),
    ("attention.triton_kernels.backward_dk_dv_kernel", EVERYTHING),
)

# Triton 3.6 keeps 2 to 5 registers of the loop over the heads that share a key in memory, and reads them once
# a head; the loops over queries inside, which have the products, spill nothing (read in SASS). 3.7: nothing.
if triton.__version__.startswith("3.6."):
    in_heads = {"BLOCK_D": 128, "BLOCK_M": 32, "BLOCK_N": 64}
    SPILLS += (("attention.triton_kernels.backward_dk_dv_kernel", in_heads),)

# At head_dim 256 dk and dv fill the registers, and no tile of the 64 keys that wgmma needs is left. The
# queries of a decoding step are fewer rows than the 64 of wgmma, and it is memory that they wait for. So are
# the diagonals that the gradient of a relative bias takes at once.
WITHOUT_WGMMA = (
    ("attention.triton_kernels.backward_dk_dv_kernel", {"BLOCK_D": 256}),
    ("cached_attention.triton_kernels.split_kernel", {"BLOCK_M": 16}),
    ("attention.triton_bias_kernels.backward_drelative_kernel", {}),
)

Reports = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reports]:
    """{"compiled", "keys"} of the script."""
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


@pytest.fixture(scope="module")
def reports(written: dict[str, Reports]) -> Reports:
    return written["compiled"]


def of(reports: Reports, key: str) -> list[dict[str, Any]]:
    """The launches of a case, all of them compiled; skips a case whose options the backend refuses."""
    launches = reports[key]
    if refusals := [launch["refused"] for launch in launches if "refused" in launch]:
        pytest.skip(refusals[0])
    assert launches, "the case launched no kernel"
    for launch in launches:
        assert not launch["error"], f"{launch['kernel']}: {launch['error']}"
    return launches


@pytest.mark.parametrize("key", KEYS)
def test_kernels_compile_within_shared_memory(key: str, reports: Reports) -> None:
    limit = tuning.shared_memory(key.partition("-")[0])
    for launch in of(reports, key):
        assert launch["shared"] <= limit, launch


@pytest.mark.parametrize("key", AT_SM_90)
def test_no_registers_are_spilled_in_loops_at_sm_90(key: str, reports: Reports) -> None:
    for launch in of(reports, key):
        if not listed(launch, SPILLS):
            assert launch["spills_in_loops"] == 0, launch


@pytest.mark.parametrize("key", AT_SM_90)
def test_16_bit_products_use_wgmma_at_sm_90(key: str, reports: Reports) -> None:
    for launch in of(reports, key):
        products = [dot for dot in launch["dots"] if re.search(r": tensor<\S*xb?f16> \*", dot)]
        if products and not listed(launch, WITHOUT_WGMMA):
            assert "wgmma" in launch["instructions"], launch


@pytest.mark.parametrize("key", KEYS)
def test_float32_products_are_not_shortened_to_tf32(key: str, reports: Reports) -> None:
    for launch in of(reports, key):
        for dot in launch["dots"]:
            if re.search(r": tensor<\S*xf32> \*", dot):
                assert not re.search(r"inputPrecision = tf32\b", dot), launch


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_lengths_and_batch_sizes_compile_nothing_anew(case: TritonCase, written: dict[str, Reports]) -> None:
    """One compilation serves every length and batch size, after those of the first step."""
    counts = {row["kernel"]: row for row in of(written["keys"], str(case))}
    for kernel, row in counts.items():
        assert row["keys"] == row["keys_of_one_step"], f"{kernel}: {row}"


def listed(launch: dict[str, Any], exceptions: Any) -> bool:
    """Whether the launch is one of the exceptions, each a kernel and some of its constants."""
    return any(
        launch["kernel"] == kernel and constants.items() <= launch["constants"].items()
        for kernel, constants, *_ in exceptions
    )


def test_the_reports_tell_spills_in_loops_from_others() -> None:
    from lmkern.testing.offline import spills_in_loops

    sass = """
        /*0000*/                   STL [R1], R2 ;
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/              @!P0 LDL.64 R2, [R1] ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   LDL R2, [R1+0x4] ;
        /*0050*/                   BRA 0x50;
    """
    assert spills_in_loops(sass) == 1


def compile_case(architecture: str, name: str) -> list[dict[str, Any]]:
    """The reports of a case's launches, each kernel and configuration once."""
    import torch

    from lmkern.testing.offline import recording, report

    torch.set_num_threads(1)
    (case,) = (case for case in triton_cases() if str(case) == name)
    try:
        with recording(architecture, compiled=True) as launches:
            case.run(SEQUENCES, TOKENS)
    except UnsupportedBackend as error:
        return [{"refused": str(error)}]
    return list({launch.key: report(launch) for launch in launches}.values())


def count_keys(name: str) -> list[dict[str, Any]]:
    """{"kernel", "keys_of_one_step", "keys"} of each kernel of a case: of one call, and of many others."""
    from lmkern.testing.offline import recording

    (case,) = (case for case in triton_cases() if str(case) == name)
    chance = random.Random(0)
    first, every = defaultdict(set), defaultdict(set)
    try:
        for step in range(ROUNDS):
            with recording("sm_90", compiled=False) as launches:
                case.run(chance.randint(1, 6), chance.randint(1, 70))
            for launch in launches:
                every[launch.kernel].add(launch.key)
                if step == 0:
                    first[launch.kernel].add(launch.key)
    except UnsupportedBackend as error:
        return [{"refused": str(error)}]
    return [
        {"kernel": kernel, "error": "", "keys_of_one_step": len(first[kernel]), "keys": len(keys)}
        for kernel, keys in every.items()
    ]


if __name__ == "__main__":
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 16)) as pool:
        compiled = pool.map(compile_case, *zip(*((a, str(case)) for a, case in JOBS), strict=True))
        keys = pool.map(count_keys, map(str, COUNTED))
        reports_of = dict(zip(KEYS, compiled, strict=True))
        keys_of = dict(zip(map(str, COUNTED), keys, strict=True))
    Path(sys.argv[1]).write_text(json.dumps({"compiled": reports_of, "keys": keys_of}, default=str))
