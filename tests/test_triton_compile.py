"""The Triton kernels compiled for sm_90 without a device: registers, spills and tensor cores.

The launchers run as they are on CPU tensors, but a launch only compiles its kernel for a Hopper GPU
with the arguments that it was given. That happens in a process of its own, since another test may
have imported the kernels for Triton's interpreter. The same process prints what any case costs:

    python tests/test_triton_compile.py "Case(BF16, 'relu', 'P', 768, 129, 12608)"
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from driftline.kernels import dispatch  # noqa: E402

if reason := dispatch.no_triton():
    pytest.skip(reason, allow_module_level=True)
import triton  # noqa: E402
from interpreted_kernels import BF16, FP16, FP32, NEEDS, Case, make  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from driftline.kernels import triton_adapter, tuning  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.release]  # a dozen kernels are compiled

FORWARD, ROWS, WEIGHTS, SUM = (
    "adapter_forward",
    "adapter_backward_rows",
    "adapter_backward_weights",
    "adapter_backward_sum",
)
# ViT-B and ViT-S, 64 images of 197 tokens, tile sizes of the table
WIDE = "Case(BF16, 'relu', 'S', 768, 64, 12608)"
NARROW = "Case(BF16, 'relu', 'S', 384, 16, 12608)"
# most registers of a thread; 128 leave room for 16 warps of 32 threads on a multiprocessor
REGISTERS = {
    (WIDE, FORWARD): 128,
    (WIDE, ROWS): 128,
    (WIDE, WEIGHTS): 128,
    (WIDE, SUM): 128,
    (NARROW, FORWARD): 128,
}
# what no other test compiles: optional arguments, padding, narrow types
ODD = (
    "Case(BF16, 'none', 'B', 768, 129, 400, rank_scale='segment', segments=2)",
    "Case(BF16, 'gelu', 'P', 768, 16, 400, norm=True, keep=True)",
    "Case(FP32, 'none', 'B', 67, 5, 33, out=40, bias=False, column_scale=True)",
    "Case(FP16, 'relu', 'P', 40, 5, 19, segments=3, adapters=2, index=(1, 0, 1))",
    "Case(FP32, 'relu', 'N', 64, 20, 33, segments=2, adapters=2, compute=BF16)",
)


class Compiler:
    """Takes the place of the launch; `found` maps a kernel's name to what it costs."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, int]] = {}

    def __call__(
        self, kernel: Any, _: Any, config: tuning.Config, *arguments: Any, **constants: Any
    ) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        signature, fixed, aligned = {}, {}, {}
        for place, name in enumerate(kernel.arg_names):
            value, kind = values[name], "constexpr"
            if isinstance(value, Tensor):
                kind = f"*{TYPES[value.dtype]}"
            elif name not in constants and isinstance(value, int) and value != 1:
                kind = "i32"
            signature[name] = kind
            if kind == "constexpr":
                fixed[(place,)] = value
            elif kind != "i32" or value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
        options = {
            "num_warps": config.warps,
            "num_stages": config.stages,
            "enable_fp_fusion": True,
        }
        source = ASTSource(kernel, signature, fixed, aligned)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        usage = resources(built.asm["cubin"])
        self.found[kernel.__name__] = {
            "registers": usage["REG"],
            "spills": usage["STACK"] + usage["LOCAL"],
            "shared": built.metadata.shared,
            "mma": built.asm["ptx"].count("mma.sync"),
            "wgmma": built.asm["ptx"].count("wgmma"),
        }


TYPES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", torch.int64: "i64"}


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL as `cuobjdump` reads them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def compile_case(case: Case) -> dict[str, dict[str, int]]:
    """What every launch of a case's forward and backward pass costs."""
    triton_adapter._launch = compiler = Compiler()
    arguments, settings, g = make(case)
    triton_adapter.forward(*arguments, **settings)
    if case.index is None:
        triton_adapter.backward(g, *arguments, needs=NEEDS, **settings)
    return compiler.found


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, int]]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", __file__, WIDE, NARROW, *ODD]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode and re.search("ptxas|cuobjdump", done.stderr):
        pytest.skip(f"the assembler cannot run here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("case", "kernel"), list(REGISTERS))
def test_no_spills_few_registers_and_tensor_cores(compiled, case, kernel):
    found = compiled[case][kernel]
    assert found["spills"] == 0
    assert found["registers"] <= REGISTERS[case, kernel]
    assert (found["mma"] > 0) == (kernel != SUM)
    assert found["wgmma"] == 0  # see kernels.tuning.Config
    assert found["shared"] <= 232448 // 2  # bytes of two programs on a multiprocessor


@pytest.mark.parametrize("case", ODD)
def test_optional_arguments_and_padding_compile(compiled, case):
    kernels = {FORWARD} if "index" in case else {FORWARD, ROWS, WEIGHTS, SUM}
    assert compiled[case].keys() == kernels
    for kernel, found in compiled[case].items():
        # two rank tiles of the first backward kernel do not fit 255 registers
        assert found["spills"] <= (128 if kernel == ROWS and "129" in case else 0), kernel


if __name__ == "__main__":
    print(json.dumps({text: compile_case(eval(text)) for text in sys.argv[1:]}))
