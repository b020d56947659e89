"""Peak memory of the masked-diffusion loss, beside the form that holds all logits.

Both compute the cross-entropy of the same masked places of one row from its hidden states, forward and backward, head
gradient included. Full: logits of every place of the row, then a mask; or of the masked places alone, unchunked. Ours:
hidden states gathered first, logits made and dropped chunk by chunk. On a GPU the allocator counts; on a CPU
the plan's tracker.

    python -m benchmarks.diffusion_loss
    python -m benchmarks.diffusion_loss --vocabulary 131072 --masked 8192 --out benchmarks/results/diffusion-loss.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.common import save
from models.layers.head import Head
from models.layers.loss import default_chunk_tokens, each_cross_entropy
from pretrain.plan.tracker import TensorTracker

GIB = 1 << 30


def full_row(head: Head, hidden_NC: Tensor, targets_N: Tensor, places: Tensor) -> Tensor:
    """Logits of every place, as most code does it."""
    each = cross_entropy(head(hidden_NC).float(), targets_N, reduction="none")
    weights = torch.zeros_like(each).index_fill_(0, places, 1.0)
    return (each * weights).sum()


def full_masked(head: Head, hidden_NC: Tensor, targets_N: Tensor, places: Tensor) -> Tensor:
    """Logits of the masked places, all at once."""
    logits = head(hidden_NC.index_select(0, places)).float()
    return cross_entropy(logits, targets_N.index_select(0, places), reduction="none").sum()


def ours(head: Head, hidden_NC: Tensor, targets_N: Tensor, places: Tensor) -> Tensor:
    """As `MaskedDiffusion` does it."""
    each = each_cross_entropy(
        head,
        hidden_NC.index_select(0, places),
        targets_N.index_select(0, places),
        chunk_tokens=default_chunk_tokens(head.columns),
    )
    return each.sum()


FORMS: dict[str, Callable[[Head, Tensor, Tensor, Tensor], Tensor]] = {
    "full, every place": full_row,
    "full, masked places": full_masked,
    "gathered and chunked": ours,
}


def measure(form: str, sizes: dict[str, int], device: torch.device) -> dict[str, Any]:
    """Peak bytes beyond inputs, weights and their gradients, seconds, and the loss."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = Head(sizes["width"], sizes["vocabulary"]).to(device, dtype)
    torch.nn.init.normal_(head.weight, std=0.02)
    places = torch.arange(0, sizes["masked"], device=device) * sizes["tokens"] // sizes["masked"]
    hidden = torch.randn(sizes["tokens"], sizes["width"], device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(sizes["vocabulary"], (sizes["tokens"],), device=device)
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)
    began = time.perf_counter()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        loss = FORMS[form](head, hidden, targets, places)
        loss.backward()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with TensorTracker() as tracker:
            loss = FORMS[form](head, hidden, targets, places)
            loss.backward()
        peak = tracker.peak
    return {
        "peak_bytes": peak,
        "seconds": time.perf_counter() - began,
        "loss": loss.item(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--masked", type=int, default=8192, help="masked places")
    parser.add_argument("--tokens", type=int, default=None, help="places of the batch; default: as many")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="write JSON here")
    arguments = parser.parse_args()
    sizes = {
        "vocabulary": arguments.vocabulary,
        "masked": arguments.masked,
        "tokens": arguments.tokens or arguments.masked,
        "width": arguments.width,
    }
    results = {}
    for form in FORMS:
        results[form] = measure(form, sizes, torch.device(arguments.device))
        found = results[form]
        print(f"{form:22s}  peak {found['peak_bytes'] / GIB:7.3f} GiB  {found['seconds']:6.2f} s", flush=True)
    losses = [result["loss"] for result in results.values()]
    assert max(losses) - min(losses) < 1e-3 * max(losses), f"the forms differ: {losses}"
    ratio = results["gathered and chunked"]["peak_bytes"] / results["full, masked places"]["peak_bytes"]
    print(f"gathered and chunked over full logits: 1/{1 / ratio:.1f}")
    save({**sizes, "device": arguments.device, "forms": results, "over_full": ratio}, arguments.out)


if __name__ == "__main__":
    main()
