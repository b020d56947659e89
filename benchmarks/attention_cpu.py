"""Sigmoid attention on the CPU against torch's softmax attention: forward and backward time.

    OMP_NUM_THREADS=2 python -m benchmarks.attention_cpu [--out results.json] [--repeats 20]

Each case is checked against the float64 definition before it is timed. The contestants take turns, so that
a disturbance of the machine meets all of them, and the lower quartiles are compared, which it touches least.

Shape suffixes: B batch, T time, H heads, D head width.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.sigmoid_attention import sigmoid_attention, sigmoid_attention_reference
from pretrain.json_text import to_json

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape. `documents` per row, of equal length, are packed; 0 means no segment ids."""

    name: str
    batch: int
    time: int
    heads: int
    width: int
    dtype: torch.dtype = torch.float32
    documents: int = 0
    alibi: bool = False


CASES = (
    Case("T1024", 2, 1024, 8, 64),
    Case("T1024 ALiBi", 2, 1024, 8, 64, alibi=True),
    Case("T1024, 8 documents", 2, 1024, 8, 64, documents=8),
    Case("T1024 bf16", 2, 1024, 8, 64, dtype=torch.bfloat16),
    Case("T256", 16, 256, 6, 64),
    Case("T64", 12, 64, 4, 32),
)


def contestants(case: Case) -> dict[str, Attention]:
    """Torch's softmax attention (with a mask where documents ask for one), the plain form, and ours."""
    bias = -math.log(case.time)
    ids_BT = None
    if case.documents:
        ids_BT = (torch.arange(case.time) * case.documents // case.time).expand(case.batch, -1)
    slopes = torch.linspace(0.5, 0.01, case.heads) if case.alibi else None
    later = torch.ones(case.time, case.time, dtype=torch.bool).triu(1)
    hidden = later if ids_BT is None else later | (ids_BT[0][:, None] != ids_BT[0][None, :])

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if ids_BT is None else ~hidden
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3) * case.width**-0.5 + bias
        return (scores.masked_fill(hidden, -math.inf).sigmoid() @ v).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sigmoid_attention(q, k, v, bias=bias, alibi_slopes=slopes, segment_ids=ids_BT)

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sigmoid_attention_reference(q, k, v, bias=bias, alibi_slopes=slopes, segment_ids=ids_BT)

    return {"softmax (torch)": softmax, "explicit sigmoid": explicit, "ours": ours, "definition": definition}


def forward_and_backward(attention: Attention, qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = attention(*qkv)
    return [out, *torch.autograd.grad(out, qkv, grad)]


def check(case: Case, attentions: dict[str, Attention], qkv: list[Tensor], grad: Tensor) -> float:
    """Greatest relative error (norms) of our output and gradients; raises if it is too large."""
    ours = forward_and_backward(attentions["ours"], qkv, grad)
    doubles = [x.detach().double().requires_grad_() for x in qkv]
    right = forward_and_backward(attentions["definition"], doubles, grad.double())
    errors = [float(((a.double() - b).norm() / b.norm()).detach()) for a, b in zip(ours, right, strict=True)]
    limit = 1e-2 if case.dtype == torch.bfloat16 else 1e-5
    if max(errors) > limit:
        raise SystemExit(f"{case.name}: wrong by {max(errors):.1e}, more than {limit:.0e}; nothing is timed")
    return max(errors)


def measure(case: Case, repeats: int) -> dict[str, object]:
    """Lower-quartile milliseconds of each contestant and the ratios of ours to them."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.time, case.heads, case.width)
    *qkv, grad = (torch.randn(shape, generator=generator).to(case.dtype) for _ in range(4))
    qkv = [x.requires_grad_() for x in qkv]
    attentions = contestants(case)
    error = check(case, attentions, qkv, grad)
    del attentions["definition"]
    times: dict[str, list[float]] = {name: [] for name in attentions}
    for turn in range(repeats + 2):
        for name, attention in attentions.items():
            start = time.perf_counter()
            forward_and_backward(attention, qkv, grad)
            if turn >= 2:  # the first turns warm up
                times[name].append(1000 * (time.perf_counter() - start))
    quartiles = {name: statistics.quantiles(values, n=4)[0] for name, values in times.items()}
    settings = {**asdict(case), "dtype": str(case.dtype)}
    ratios = {name: quartiles["ours"] / value for name, value in quartiles.items()}
    return {"case": settings, "error": error, "milliseconds": quartiles, "ratio_of_ours_to": ratios}


def line(result: dict[str, object]) -> str:
    case, times, ratios = result["case"], result["milliseconds"], result["ratio_of_ours_to"]
    assert isinstance(case, dict) and isinstance(times, dict) and isinstance(ratios, dict)
    columns = [f"{times[name]:9.2f} ({ratios[name]:.2f})" for name in times if name != "ours"]
    return f"{case['name']:<20}{'  '.join(columns)}  {times['ours']:9.2f}   {result['error']:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    print(f"forward + backward, ms (ratio of ours), {torch.get_num_threads()} threads")
    print(f"{'':<20}{'softmax (torch)':>16}{'explicit sigmoid':>18}{'ours':>11}   error")
    results = []
    for case in CASES:
        results.append(measure(case, arguments.repeats))
        print(line(results[-1]), flush=True)
    if arguments.out is not None:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine,
            "results": results,
        }
        arguments.out.write_text(to_json(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
