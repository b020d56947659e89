"""The compiled CPU form: cpu.c, built on first use by the system's C compiler, called through ctypes.

It walks in time order: on a CPU no form that is parallel in time comes near it. The library lies in a cache
folder under a name made of the source, the flags, the compiler and the processor, so that a change of any
builds anew; it gets there by a rename, so that many ranks may build at once. Without a compiler the torch
loop runs in its place, after one warning.

Shape suffixes: B batch, T time, H input heads, G gates, N channels of a head, D = H N channels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.newton_rnn.newton import keep_of, not_a_number_if
from kernels.newton_rnn.torch_forms import Call, Forward, Gradients

SOURCE = Path(__file__).with_name("cpu.c")
# Not -ffast-math: at link time it would turn on flush-to-zero for the whole process, and it forgets NaN.
FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# In order of preference: a compiler may know neither this processor nor OpenMP.
EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ())
COMPILE_SECONDS = 120


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("batch", "time", "heads", "width", "threads")]


def _pointers(name: str, *fields: str) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [(field, ctypes.c_void_p) for field in fields]})


_Inputs = _pointers("_Inputs", "gates", "recurrent", "peephole", "bias", "state", "keep")
_Outputs = _pointers("_Outputs", "output", "cells", "final_state", "jacobian")
_Adjoint = _pointers(
    "_Adjoint", "output", "cells", "grad", "grad_final", "d_gates", "d_state", "d_parameters"
)


def compiled_forward(library: ctypes.CDLL, call: Call) -> Forward:
    shape, inputs, alive = _arguments(call)
    batch, time, heads, _, channels = call.gates_BTHGN.shape
    output_BTD = _floats(batch, time, heads * channels)
    cells_BTD = torch.empty_like(output_BTD) if call.lstm else None
    final_state = torch.empty_like(call.state)
    jacobian = _floats(library.newton_rnn_tasks(ctypes.byref(shape)))
    outputs = _Outputs(*map(_address, (output_BTD, cells_BTD, final_state, jacobian)))
    library.newton_rnn_forward(ctypes.byref(shape), ctypes.byref(inputs), ctypes.byref(outputs))
    del alive
    norm = jacobian.amax()
    residual, zero = not_a_number_if(final_state, norm), torch.zeros_like(norm)
    numbers = torch.stack([residual, residual, zero, norm, zero])
    dtype = call.gates_BTHGN.dtype
    cells_BTD = None if cells_BTD is None else cells_BTD.to(dtype)
    return Forward(output_BTD.to(dtype), cells_BTD, final_state, numbers)


def compiled_backward(
    library: ctypes.CDLL,
    call: Call,
    output_BTD: Tensor,
    cells_BTD: Tensor | None,
    grad_BTD: Tensor,
    grad_final: Tensor,
) -> Gradients:
    shape, inputs, alive = _arguments(call)
    given = [
        None if x is None else x.float().contiguous() for x in (output_BTD, cells_BTD, grad_BTD, grad_final)
    ]
    d_gates = _floats(*call.gates_BTHGN.shape)
    d_state = torch.empty_like(call.state)
    rows = 8 if call.lstm else 6
    groups = library.newton_rnn_groups(ctypes.byref(shape))
    d_parameters = _floats(groups, rows, call.state.shape[-1]).zero_()
    adjoint = _Adjoint(*map(_address, (*given, d_gates, d_state, d_parameters)))
    library.newton_rnn_backward(ctypes.byref(shape), ctypes.byref(inputs), ctypes.byref(adjoint))
    del alive
    recurrent, bias, peephole = d_parameters.sum(0).split([3, 3, rows - 6])
    parameters = (recurrent, peephole, bias) if call.lstm else (recurrent, bias)
    copies = tuple(parameter.clone() for parameter in parameters)
    return Gradients(d_gates.to(call.gates_BTHGN.dtype), copies, d_state)


def _arguments(call: Call) -> tuple[_Shape, ctypes.Structure, list[Tensor | None]]:
    """The C structures, and the tensors that must live as long as the call."""
    batch, time, heads, _, channels = call.gates_BTHGN.shape
    recurrent, *peephole, bias = call.parameters
    keep_BT = keep_of(call.segment_ids_BT)
    keep_BT = None if keep_BT is None else keep_BT.to(torch.uint8).contiguous()
    gates = call.gates_BTHGN.float().contiguous()
    alive = [gates, recurrent, peephole[0] if peephole else None, bias, call.state, keep_BT]
    threads = torch.get_num_threads()
    return _Shape(batch, time, heads, channels, threads), _Inputs(*map(_address, alive)), alive


def _floats(*shape: int) -> Tensor:
    """What C writes into: fp32 on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    assert tensor.dtype in (torch.float32, torch.uint8)
    return tensor.data_ptr()


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None, with a warning, where it cannot be built."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        _warn("there is no C compiler (cc, gcc or clang; set CC)")
        return None
    complaint = ""
    for folder in _cache_folders():
        for extra in EXTRAS:
            try:
                return _declared(ctypes.CDLL(str(build(compiler, (*FLAGS, *extra), folder))))
            except subprocess.CalledProcessError as error:
                complaint = error.stderr.strip().splitlines()[-1] if error.stderr.strip() else str(error)
            except (OSError, subprocess.TimeoutExpired) as error:
                complaint = str(error)
    _warn(f"{compiler} could not build it ({complaint})")
    return None


def build(compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
    """The library for these flags in `folder`, compiled unless it lies there already."""
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS
    ).stdout
    key = "\n".join([SOURCE.read_text(encoding="utf-8"), *flags, version, _processor()])
    path = folder / f"newton_rnn-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    scratch = Path(name)
    try:
        command = [compiler, *flags, str(SOURCE), "-o", name]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def _cache_folders() -> list[Path]:
    """Where to keep the library: the user's cache, or a folder of the user's own among temporary files."""
    own = Path(tempfile.gettempdir()) / f"triptych-{os.getuid()}"
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return [Path(base) / "triptych", own]
    try:
        return [Path.home() / ".cache" / "triptych", own]
    except RuntimeError:  # a user without a home, as in some containers
        return [own]


def _processor() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(features))])


def _declared(handle: ctypes.CDLL) -> ctypes.CDLL:
    handle.newton_rnn_tasks.restype = handle.newton_rnn_groups.restype = ctypes.c_long
    handle.newton_rnn_forward.restype = handle.newton_rnn_backward.restype = None
    return handle


def _warn(reason: str) -> None:
    warnings.warn(
        f"nonlinear recurrences run in a torch loop, several times slower than compiled: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
