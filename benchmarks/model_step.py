"""One training step of each model family at equal size, on one device, side by side.

    python -m benchmarks.model_step --out model-step.json          on a GPU: torch and triton are all it needs
    python -m benchmarks.model_step --device cpu --quick           tiny models; exercises the whole program

At 1B as in the ParaRNN paper's Table 3: 2,048 tokens per row, vocabulary 50,432, bf16, 4 input heads. A step is
forward, backward and the update of AdamW; the models take turns, so that what slows the machine slows all of them.
Ratios are to the softmax Transformer with rotary positions. The paper's: ParaGRU 1.22, ParaLSTM 1.50, Mamba-2 1.41.
Correctness first: each model's loss must be finite and fall over the steps on one repeated batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import save
from models import families
from models.initialise import initialise
from models.layers.head import Head
from models.layers.loss import default_chunk_tokens, token_cross_entropy

VOCABULARY, LENGTH = 50432, 2048
BASELINE = "softmax"
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {
        "family": "softmax",
        "layers": 24,
        "heads": 16,
        "positions": "rope",
        "norm": "pre",
        "qk_norm": False,
    },
    "sigmoid": {"family": "sigmoid", "layers": 24, "heads": 16, "positions": "alibi"},
    "gru": {"family": "pararnn", "cell": "gru", "layers": 24, "heads": 4},
    "lstm": {"family": "pararnn", "cell": "lstm", "layers": 24, "heads": 4},
    "mamba2": {"family": "mamba2", "layers": 48, "heads": 64, "state_width": 16},
}
PAPER = {"gru": 1.22, "lstm": 1.50, "mamba2": 1.41}
WANTED = {"gru": 1.20, "lstm": 1.40}


@dataclass(frozen=True)
class Size:
    """The models' width and rows of a batch; `layers` None keeps the model's own number."""

    width: int
    rows: int
    length: int
    vocabulary: int
    layers: int | None = None
    heads: int | None = None


FULL = Size(width=2048, rows=8, length=LENGTH, vocabulary=VOCABULARY)
QUICK = Size(width=64, rows=2, length=96, vocabulary=512, layers=2, heads=4)


class Training:
    """One model, its optimizer and its batch."""

    def __init__(
        self, name: str, size: Size, device: torch.device, dtype: torch.dtype, compile_it: bool
    ) -> None:
        values = dict(MODELS[name])
        family = families[values["family"]]
        for key in ("layers", "heads"):
            if getattr(size, key) is not None:
                values[key] = getattr(size, key)
        if "tied_head" in {field.name for field in dataclasses.fields(family.config)}:
            values["tied_head"] = False
        config = family.config(width=size.width, vocabulary=size.vocabulary, **values)
        config = config.resolved(vocabulary=size.vocabulary, sequence_length=size.length)
        with device:
            self.model = family.build(config)
        initialise(self.model, 0)
        self.model.to(dtype)
        head = self.model.head
        assert isinstance(head, Head)
        self.head = head
        self.body = torch.compile(self.model) if compile_it else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")
        generator = torch.Generator().manual_seed(0)
        sequences = torch.randint(size.vocabulary, (size.rows, size.length + 1), generator=generator).to(
            device
        )
        self.tokens, self.targets = sequences[:, :-1], sequences[:, 1:]
        self.positions = torch.arange(size.length, device=device).repeat(size.rows, 1)
        self.weights = torch.ones_like(self.targets, dtype=torch.bool)
        self.chunk = default_chunk_tokens(size.vocabulary)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> Tensor:
        """Nats per token before the update."""
        hidden = self.body(self.tokens, None, self.positions)
        loss, _ = token_cross_entropy(self.head, hidden, self.targets, self.weights, chunk_tokens=self.chunk)
        loss = loss / self.weights.numel()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def check(name: str, training: Training, steps: int = 4) -> None:
    """Raises RuntimeError if the loss is not finite or does not fall."""
    losses = [float(training.step()) for _ in range(steps)]
    if not all(map(torch.isfinite, map(torch.tensor, losses))) or losses[-1] >= losses[0]:
        raise RuntimeError(f"{name} does not learn its batch by heart: {losses}")


def seconds(training: Training, device: torch.device) -> float:
    """Of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    training.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(
    names: list[str], size: Size, device: torch.device, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Each model beside the baseline, two at a time, for both to fit the memory."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = []
    for name in names:
        pair = {
            key: Training(key, size, device, dtype, arguments.compile)
            for key in dict.fromkeys((BASELINE, name))
        }
        for key, training in pair.items():
            check(key, training)
        times: dict[str, list[float]] = {key: [] for key in pair}
        for _ in range(arguments.steps):
            for key, training in pair.items():
                times[key].append(seconds(training, device))
        median = {key: statistics.median(values) for key, values in times.items()}
        ratio = median[name] / median[BASELINE]
        tokens = size.rows * size.length
        row: dict[str, Any] = {
            "model": name,
            "parameters": pair[name].parameters,
            "step_seconds": median[name],
            "tokens_per_second": tokens / median[name],
            "over_softmax": ratio,
            "wanted": WANTED.get(name),
            "paper": PAPER.get(name),
        }
        found.append(row)
        print(
            f"{name:8s} {row['parameters'] / 1e6:8.1f} M  {1e3 * median[name]:8.1f} ms  "
            f"{row['tokens_per_second']:10,.0f} tokens/s  {ratio:.2f} x softmax"
            + (f"  (wanted {WANTED[name]:.2f}, the paper {PAPER[name]:.2f})" if name in WANTED else ""),
            flush=True,
        )
        del pair
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each model")
    parser.add_argument("--rows", type=int, help="rows of 2,048 tokens per step")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--out", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    if arguments.rows is not None:
        size = dataclasses.replace(size, rows=arguments.rows)
    rows = measure(arguments.models, size, torch.device(arguments.device), arguments)
    save({"size": dataclasses.asdict(size), "results": rows}, arguments.out)


if __name__ == "__main__":
    main()
