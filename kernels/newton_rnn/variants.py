"""Every kernel as it ships, for compiling without a GPU: which kernel, at which tile, with which constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import kernels.linear_recurrence.op as linear_recurrence
from kernels.offline import Resources, compile_offline

FLOATS = (
    "RECURRENT",
    "PEEPHOLE",
    "BIAS",
    "STATE",
    "FINAL",
    "PARTIALS",
    "NORMS",
    "SUMS",
    "GRAD_FINAL",
    "D_STATE",
)
STORED = ("GATES", "OUTPUT", "CELLS", "GRAD", "D_GATES", "A", "B", "Y")
INTEGERS = ("T", "D", "N", "iterations", "max_iterations")


@dataclass(frozen=True)
class Variant:
    """A kernel with its compile-time constants. `half`: tensors stored in bf16, activations by tanh.approx."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    half: bool
    max_registers: int | None = None

    def compile(self, **more: Any) -> Resources:
        """For sm_90a; `more` constants replace run-time arguments, as a launch does with None and 1."""
        names = self.kernel.arg_names
        types = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(STORED, "*bf16" if self.half else "*fp32")
        types |= dict.fromkeys(INTEGERS, "i32") | {"tolerance": "fp32", "limit": "fp32"}
        types |= {"KEEP": "*u8", "FLAG": "*i32"}
        constants = {name: value for name, value in {**self.constants, **more}.items() if name in names}
        return compile_offline(
            self.kernel,
            types={name: types[name] for name in names if name in types and name not in constants},
            constants=constants,
            num_warps=self.warps,
            max_registers=self.max_registers,
            aligned=tuple(name for name in ("D", "N") if name in names and name not in constants),
        )


def variants(*, half: bool) -> list[Variant]:
    """What ships for tensors of 16 bits, with segments, or of 32, without."""
    return [*_fused(half=half), *_scans(half=half)]


def _fused(*, half: bool) -> list[Variant]:
    from kernels.newton_rnn import tiles, triton_adjoint, triton_newton, triton_sequential

    common: dict[str, Any] = {
        "SEGMENTS": half,
        "ONE_HEAD": True,
        "APPROXIMATE": half,
        "PROJECT": True,
        "PREDICATED": half,
    }
    if not half:
        common |= {"KEEP": None, "FLAG": None}
    found = []
    for cell, lstm in (("gru", False), ("lstm", True)):
        tiled = {
            "newton": (getattr(triton_newton, f"{cell}_newton_kernel"), tiles.NEWTON[lstm]),
            "adjoint": (getattr(triton_adjoint, f"{cell}_adjoint_kernel"), tiles.ADJOINT[lstm]),
        }
        for form, (kernel, pair) in tiled.items():
            for tile in (pair.many, pair.few):
                name = f"{cell} {form} {tile.window}x{tile.channels}"
                constants = {**common, "W": tile.window, "C": tile.channels}
                found.append(Variant(name, kernel, constants, tile.warps, half, tile.max_registers))
        walking = {
            "sequential": (getattr(triton_sequential, f"{cell}_sequential_kernel"), tiles.SEQUENTIAL),
            "sequential adjoint": (
                getattr(triton_sequential, f"{cell}_sequential_adjoint_kernel"),
                tiles.SEQUENTIAL_ADJOINT,
            ),
        }
        for form, (kernel, lanes) in walking.items():
            constants = {**common, "C": lanes.channels, "U": lanes.steps}
            found.append(Variant(f"{cell} {form}", kernel, constants, lanes.warps, half))
    return found


def _scans(*, half: bool) -> list[Variant]:
    from kernels.linear_recurrence import triton_scan

    found = []
    for block, kernel in ((False, triton_scan.diagonal_kernel), (True, triton_scan.block_kernel)):
        tile = linear_recurrence.TILES[block]
        for reverse in (False, True):
            name = f"{'block' if block else 'diagonal'} scan{' reverse' if reverse else ''}"
            constants = {"W": tile.window, "C": tile.channels, "REVERSE": reverse}
            found.append(Variant(name, kernel, constants, tile.warps, half))
    return found
