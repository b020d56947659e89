"""What no data sheet says: how much of a peak kernels and links reach. Each figure with where it comes from.

`constants.json` is written by `python -m benchmarks.plan_published --write` (what is fitted to published runs) and by
`python -m benchmarks.first_light --write` (what was measured on a GPU, which replaces assumptions).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("constants.json")


@dataclass(frozen=True)
class Constants:
    """Shares are of the peak or the stated bandwidth."""

    products_hopper: float
    """Large bf16 matrix products."""
    products_ampere: float
    narrow: float
    """Elements of the inner side at which a product reaches half of that: reading tiles in, writing them out."""
    softmax_hopper: float
    """Of the peak, at long rows: attention's products, those of pairs that a causal mask hides not counted."""
    softmax_ampere: float
    sigmoid_hopper: float
    sigmoid_ampere: float
    state_space: float
    """Of the peak: Mamba-2's scan, by its package's kernels."""
    attention_ramp: float
    """Positions of a row at which attention reaches half of its share."""
    narrow_heads: float
    """Factor for heads of width 64 or less."""
    memory: float
    """Memory-bound kernels, of the memory's bandwidth."""
    recurrences: float
    """The same for nonlinear recurrences, which compute more than they read."""
    unfused: float
    """Bytes that software moves beyond what its layers' streams count, as a factor: casts, dropout, biases."""
    fused: float
    """The same of compiled or fused software."""
    logits: float
    """Bytes moved per logit by head and loss, forward and backward, unfused."""
    contention: float
    """Of the time of messages that hide behind computation, by which they slow it."""
    straggling: float
    """Of a step, per doubling of the nodes: the slowest rank decides."""
    node_link: float
    """Collectives in a node, of NVLink's bandwidth."""
    network_link: float
    """Collectives across nodes, of the ports'."""
    call_us: float
    """A collective's start, in microseconds."""
    node_hop_us: float
    network_hop_us: float
    tensor_messages: float
    """Factor on the time of tensor ranks' messages that lie between the products: they start late, and the products
    after them too."""
    tensor_overlap: float
    """Of that time, what is left where products and messages are cut and overlapped."""
    context_overlap: float
    """Of the time of context ranks' messages, what does not hide."""


@dataclass(frozen=True)
class Origin:
    """Where a constant comes from. kind: "fitted" to published runs, "measured" by a benchmark, "assumed"."""

    value: float
    kind: str
    source: str


def read(path: Path = PATH) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@cache
def origins(software: str | None = None) -> Mapping[str, Origin]:
    """By constant. software: that of published runs, some of whose kernels are not ours; None: this project."""
    table = read()
    known = {name: Origin(**one) for name, one in table["constants"].items()}
    ours = table["software"].get(software or "triptych", {})
    return known | {name: Origin(**one) for name, one in ours.items()}


@cache
def constants(software: str | None = None) -> Constants:
    """Of this project's software, or of that of published runs."""
    known = origins(software)
    return Constants(**{field.name: known[field.name].value for field in dataclasses.fields(Constants)})
