"""Sigmoid attention beside softmax attention: forward and backward, in TFLOP/s.

    python -m benchmarks.attention --out attention.json          on a GPU: torch and triton are all it needs
    python -m benchmarks.attention --tune --out tiles.json       measures block shapes and prints new tables
    python -m benchmarks.attention --offline --out tiles.json    what Hopper's compiler makes of the shipped ones,
                                                                 without a GPU; with --tune, of all candidates too
    python -m benchmarks.attention --device cpu --quick          exercises the whole program in a minute

Correctness first: output and gradients against the definition in float64; nothing is timed if one is wrong.
Then each contestant at 16k tokens in all (from 16k positions on: one row), 2048 features, bf16.

FLOPs counted are those of the pairs that may meet: 4 D per pair and head forward (two matrix products), 10 D
backward (five), whatever a kernel computes beyond. A causal row of n has n (n + 1) / 2 pairs; packed documents
have those of each document. Packed softmax attention is the unpacked causal kernel: it skips nothing.

Contestants: `sdpa-flash` and `sdpa-cudnn` are torch's softmax attention by those backends, `triton-sigmoid`
the package of that name, if installed, and `blocked` our form in plain torch, at short lengths.

Shape suffixes: B batch, T time, H heads, D head width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_cases import FEATURES, TOKENS, Case, Mask, document_ids, draw, flops, milliseconds
from benchmarks.common import save
from kernels.sigmoid_attention import sigmoid_attention, sigmoid_attention_reference
from kernels.sigmoid_attention.blocked import blocked_backward, blocked_forward
from kernels.sigmoid_attention.problem import problem_of

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BLOCKED_LONGEST = 4096


def cases(quick: bool) -> Iterator[Case]:
    lengths = (128,) if quick else tuple(1024 * 2**power for power in range(7))
    tokens, features = (256, 128) if quick else (TOKENS, FEATURES)
    masks: tuple[Mask, ...] = ("full", "causal", "packed")
    for mask in masks:
        for width in (64, 128):
            for length in lengths:
                yield Case(mask, width, length, max(1, tokens // length), features // width)


def contestants(case: Case, device: torch.device) -> dict[str, Attention]:
    bias = -math.log(case.time)
    causal = case.mask != "full"
    ids = document_ids(case, device) if case.mask == "packed" else None
    ours = partial(sigmoid_attention, bias=bias, causal=causal, segment_ids=ids)
    chosen: dict[str, Attention] = {"ours": ours}
    backends = {"sdpa-flash": SDPBackend.FLASH_ATTENTION}
    if device.type == "cuda":
        backends["sdpa-cudnn"] = SDPBackend.CUDNN_ATTENTION
    for name, backend in backends.items():
        chosen[name] = partial(softmax, backend=backend, causal=causal)
    if case.mask != "packed" and find_spec("triton_sigmoid") is not None and device.type == "cuda":
        package = import_module("triton_sigmoid")
        chosen["triton-sigmoid"] = partial(package.sigmoid_attention, is_causal=causal, sigmoid_bias=bias)
    if case.time <= BLOCKED_LONGEST:
        chosen["blocked"] = partial(by_blocks, bias=bias, causal=causal, ids=ids)
    return chosen


def softmax(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        q_first, k_first, v_first = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q_first, k_first, v_first, is_causal=causal).transpose(1, 2)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.problem = problem
        return blocked_forward(q, k, v, problem)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        return *blocked_backward(grad, q, k, v, ctx.problem)[:3], None


def by_blocks(q: Tensor, k: Tensor, v: Tensor, *, bias: float, causal: bool, ids: Tensor | None) -> Tensor:
    constants, band = (bias, q.shape[3] ** -0.5), (-1, 0 if causal else -1, 0)
    problem = problem_of(q, k, constants, band, segments=(ids, ids))
    out: Tensor = _Blocked.apply(q, k, v, problem)
    return out


def check(mask: Mask, width: int, device: torch.device, dtype: torch.dtype, time_: int) -> float:
    """Greatest relative error (norms) of our output and gradients; raises SystemExit if it is too large."""
    case = Case(mask, width, time_, 2, 2)
    qkv, grad = draw(case, device, dtype)
    chosen: dict[str, Any] = {"bias": -math.log(case.time), "causal": mask != "full"}
    if mask == "packed":
        chosen["segment_ids"] = document_ids(case, device)
    out = sigmoid_attention(*qkv, **chosen)
    ours = [out, *torch.autograd.grad(out, qkv, grad)]
    doubles = [x.detach().double().requires_grad_() for x in qkv]
    right = sigmoid_attention_reference(*doubles, **chosen)
    exact = [right, *torch.autograd.grad(right, doubles, grad.double())]
    errors = [
        float((a.detach().double() - b.detach()).norm() / b.detach().norm())
        for a, b in zip(ours, exact, strict=True)
    ]
    if not max(errors) < 1e-2:
        raise SystemExit(
            f"{case.name}: wrong by {max(errors):.1e} (output, dq, dk, dv: {errors}); nothing is timed"
        )
    return max(errors)


def measure(case: Case, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of every contestant. One that refuses the shape is left out, with its reason."""
    qkv, grad = draw(case, device, dtype)
    work = flops(case)
    measured: dict[str, Any] = {}
    for name, attention in contestants(case, device).items():
        try:
            with torch.no_grad():
                forward = milliseconds(lambda a=attention: a(*qkv), device, repeats)  # type: ignore[misc]
            out = attention(*qkv)
            backward = milliseconds(
                lambda o=out: torch.autograd.grad(o, qkv, grad, retain_graph=True),  # type: ignore[misc]
                device,
                repeats,
            )
        except Exception as error:  # what backends and compilers raise for a shape has no common type
            if name == "ours":
                raise
            measured[name] = {"refused": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        times = {"forward": forward, "backward": backward}
        measured[name] = {
            "milliseconds": times,
            "tflops": {way: work[way] / times[way] / 1e9 for way in times},
        }
    return {"case": asdict(case), "flops": work, "contestants": measured}


def decode(device: torch.device, dtype: torch.dtype, quick: bool, repeats: int) -> list[dict[str, Any]]:
    """One query per row against a cache: milliseconds, and GB/s of keys and values read."""
    results = []
    for batch, keys in ((1, 16384), (1, 65536), (32, 4096)) if not quick else ((1, 256),):
        random = torch.Generator().manual_seed(0)
        q = torch.randn(batch, 1, 16, 128, generator=random).to(device, dtype)
        k, v = (torch.randn(batch, keys, 4, 128, generator=random).to(device, dtype) for _ in range(2))
        bias = -math.log(keys)
        right = sigmoid_attention_reference(q.double(), k.double(), v.double(), bias=bias)
        error = float((sigmoid_attention(q, k, v, bias=bias).double() - right).norm() / right.norm())
        if not error < 1e-2:
            raise SystemExit(f"decoding over {keys} keys: wrong by {error:.1e}; nothing is timed")
        taken = milliseconds(partial(sigmoid_attention, q, k, v, bias=bias), device, repeats)
        rate = 2 * k.numel() * k.element_size() / taken / 1e6
        results.append({"batch": batch, "keys": keys, "milliseconds": taken, "gigabytes_per_second": rate})
        print(f"decode B{batch} S{keys}, 16 heads on 4: {taken:.3f} ms, {rate:.0f} GB/s, error {error:.0e}")
    return results


def line(result: dict[str, Any]) -> str:
    case = Case(**result["case"])
    columns = []
    for name, values in result["contestants"].items():
        if "refused" in values:
            columns.append(f"{name} refused")
        else:
            columns.append(f"{name} {values['tflops']['forward']:.3g} / {values['tflops']['backward']:.3g}")
    return f"{case.name:<20}" + "   ".join(columns)


def packed_speedup(results: list[dict[str, Any]]) -> None:
    """How much faster packed rows of 16k are than unpacked ones; 5 is the aim."""
    times = {
        Case(**result["case"]): result["contestants"]["ours"]["milliseconds"]
        for result in results
        if result["case"]["time"] == TOKENS
    }
    for case, packed in times.items():
        if case.mask == "packed":
            causal = times[Case("causal", case.width, case.time, case.batch, case.heads)]
            ratios = ", ".join(f"{way} {causal[way] / packed[way]:.1f}x" for way in packed)
            print(f"packed over unpacked causal, D{case.width}, T{case.time}: {ratios}")


def goals(results: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that the kernels aim at, at D128 and from 2k positions on, printed beside their aims."""
    found = {
        (Case(**x["case"]).mask, x["case"]["width"], x["case"]["time"]): x["contestants"] for x in results
    }
    reached: dict[str, tuple[float, float]] = {}
    full, causal = (found.get((mask, 128, TOKENS)) for mask in ("full", "causal"))
    if full and causal:
        rate = full["ours"]["tflops"]
        reached["forward D128 T16384 full, TFLOP/s"] = rate["forward"], 540
        reached["backward D128 T16384 full, TFLOP/s"] = rate["backward"], 400
        reached["causal forward over full"] = causal["ours"]["tflops"]["forward"] / rate["forward"], 0.9
    for way, aim in (("forward", 1.25), ("backward", 1.1)):
        ratios = [
            x["ours"]["tflops"][way] / x["sdpa-flash"]["tflops"][way]
            for (mask, _, length), x in found.items()
            if mask != "packed" and length >= 2048 and "tflops" in x["sdpa-flash"]
        ]
        if ratios:
            reached[f"least {way} over sdpa-flash, full and causal from T2048"] = min(ratios), aim
    for name, (value, aim) in reached.items():
        print(f"{name}: {value:.3g} (aim {aim}){'' if value >= aim else ', missed'}")
    return {name: value for name, (value, _) in reached.items()}


def run(device: torch.device, quick: bool, repeats: int) -> dict[str, Any]:
    dtype = torch.bfloat16
    masks: tuple[Mask, ...] = ("full", "causal", "packed")
    length = 130 if quick else 2100  # no multiple of a block
    errors = {f"{m} D{w}": check(m, w, device, dtype, length) for m in masks for w in (64, 128)}
    print("relative errors against float64:", ", ".join(f"{name} {e:.0e}" for name, e in errors.items()))
    print("TFLOP/s, forward / backward")
    results = []
    for case in cases(quick):
        results.append(measure(case, device, dtype, repeats))
        print(line(results[-1]), flush=True)
    packed_speedup(results)
    reached = goals(results) if device.type == "cuda" else {}
    decoded = decode(device, dtype, quick, repeats)
    return {"errors": errors, "results": results, "goals": reached, "decode": decoded}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: to see that all of it runs")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="measure block shapes instead")
    parser.add_argument("--offline", action="store_true", help="compile block shapes for Hopper instead")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    device, repeats = torch.device(arguments.device), 2 if arguments.quick else arguments.repeats
    if arguments.offline:
        from benchmarks.attention_tiles import offline

        results = offline(arguments.quick, candidates_too=arguments.tune)
    elif arguments.tune:
        from benchmarks.attention_tiles import tune

        results = tune(device, arguments.quick, repeats)
    else:
        results = run(device, arguments.quick, repeats)
    save(results, arguments.out)


if __name__ == "__main__":
    main()
