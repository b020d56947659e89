"""Compiles Triton kernels for Hopper without a GPU, and reads off what the compiler made of them.

What a test or a report can know before a GPU is at hand: registers, spills, shared memory, and whether the
tensor cores' own instructions are used. It says nothing of speed or of right results.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HOPPER = 90
SHARED_BYTES = 227 * 1024
"""Shared memory that one thread block can have on compute capability 9.0."""
REGISTERS = 65536
"""Registers of one multiprocessor."""

# Counted in the machine code. HGMMA is a Hopper matrix product, HMMA the slower one of Ampere; UTMALDG and
# UTMASTG are bulk tensor copies; LDL and STL are registers spilled to memory.
INSTRUCTIONS = (
    "HGMMA",
    "HMMA",
    "UTMALDG",
    "UTMASTG",
    "MUFU.EX2",
    "MUFU.RCP",
    "MUFU.TANH",
    "FFMA",
    "FMUL",
    "FADD",
    "SHFL",
    "LDL",
    "STL",
)


@dataclass(frozen=True)
class Resources:
    """What one thread block of a compiled kernel takes."""

    registers: int  # per thread
    threads: int
    stack_bytes: int  # per thread
    spill_bytes: int  # stored and loaded again, per thread
    shared_bytes: int  # per block
    instructions: Mapping[str, int]  # in the machine code, of each of INSTRUCTIONS
    target: str

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.instructions.items() if count)
        return (
            f"{self.registers} registers x {self.threads} threads, spills {self.spill_bytes} B, "
            f"shared {self.shared_bytes} B, {counts}"
        )


def compile_offline(
    kernel: Any,
    *,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    max_registers: int | None = None,
    aligned: tuple[str, ...] = (),
) -> Resources:
    """Compile a `@triton.jit` kernel for sm_90a.

    Args:
        types: each run-time argument's type, as "*bf16", "i32" or "fp32", or
            "tensordesc<bf16[128, 64]>" for a tensor descriptor made on the host.
        constants: the `tl.constexpr` arguments.
        max_registers: the limit per thread that the kernel is launched with (`maxnreg`); None for the compiler's
            own choice.
        aligned: integer arguments that are multiples of 16, as strides are at run time. Pointers always are.

    Raises ValueError if an argument of the kernel is in neither, and whatever the compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    missing = [name for name in names if name not in types and name not in constants]
    if missing:
        raise ValueError(f"{kernel.__name__}: no type and no constant for {', '.join(missing)}")
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    divisible = [name for name in names if signature[name].startswith("*") or name in aligned]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if max_registers is not None:
        options["maxnreg"] = max_registers
    compiled = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
    return _resources(compiled)


def complaints(resources: Resources, *, matrix_products: bool) -> list[str]:
    """What must not be in a kernel that ships; empty if all is well.

    matrix_products: whether the kernel multiplies matrices, and so must use Hopper's instructions for it.
    """
    found = []
    if resources.target != "sm_90a":
        found.append(f"compiled for {resources.target}, not sm_90a")
    counts = resources.instructions
    if matrix_products and (not counts["HGMMA"] or counts["HMMA"]):
        found.append(f"{counts['HGMMA']} HGMMA and {counts['HMMA']} HMMA instructions")
    if resources.spill_bytes or resources.stack_bytes or counts["LDL"] or counts["STL"]:
        found.append(f"spills {resources.spill_bytes} B, stack {resources.stack_bytes} B")
    if resources.shared_bytes > SHARED_BYTES:
        found.append(f"{resources.shared_bytes} B of shared memory, and a block has {SHARED_BYTES}")
    if resources.registers * resources.threads > REGISTERS:
        found.append(f"{resources.registers} registers x {resources.threads} threads pass {REGISTERS}")
    return found


def _resources(compiled: Any) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        code = _run("nvdisasm", "-c", "-ndf", str(cubin))  # without the data flow, which takes half the time
    spills = [int(bits or 32) // 8 for bits in re.findall(r"\b(?:LDL|STL)\b(?:\.LU)?(?:\.(64|128))?", code)]
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    assert target is not None
    return Resources(
        registers=_number(r"REG:(\d+)", usage),
        threads=32 * compiled.metadata.num_warps,
        stack_bytes=_number(r"STACK:(\d+)", usage),
        spill_bytes=sum(spills),
        shared_bytes=compiled.metadata.shared,
        instructions={name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in INSTRUCTIONS},
        target=target[1],
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} not in {text!r}"
    return int(found[1])


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


@cache
def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
