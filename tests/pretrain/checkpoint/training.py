"""A small model, trained by real DeepSpeed engines, for the tests of checkpoints.

Shapes: B batch rows, T time, V vocabulary, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.checkpoint import CheckpointStore, Placement, TrainingState
from pretrain.engine.fragments import before_adam_step, deepspeed_fragments, refresh_weights

VOCABULARY = 61  # divides by no world size
WIDTH = 24
TIME = 12
BATCH = 8


class TinyModel(nn.Module):
    """Embedding, two residual layers, a norm, a head."""

    def __init__(self, tied: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy, in nats."""
        x_BTC = self.embedding(tokens_BT)
        x_BTC = x_BTC + self.down(F.gelu(self.up(x_BTC)))
        logits_BTV = self.head(self.norm(x_BTC))
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())


@dataclass(frozen=True)
class Layout:
    """How the model is trained."""

    zero: int
    bf16: bool = False
    fp32_accumulation: bool = False  # with bf16 and ZeRO 1 this is another optimizer class of DeepSpeed's
    tied: bool = False
    width: int = WIDTH


def plain_model(layout: Layout) -> TinyModel:
    """The model as it starts, the same on every rank."""
    torch.manual_seed(7)
    return TinyModel(layout.tied, layout.width)


def placements_of(model: nn.Module) -> dict[str, Placement]:
    """Placements without tensor parallelism."""
    return {name: Placement.whole(tuple(p.shape)) for name, p in model.named_parameters()}


def make_engine(layout: Layout) -> tuple[Any, dict[str, Placement]]:
    """A DeepSpeed engine with decayed and undecayed parameter groups."""
    import deepspeed

    model = plain_model(layout)
    placements = placements_of(model)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    undecayed = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}],
        lr=3e-3,
        fused=True,
    )
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": layout.zero},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": layout.bf16},
        "data_types": {"grad_accum_dtype": "fp32" if layout.fp32_accumulation else None},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, placements


def train(engine: Any, first_step: int, last_step: int) -> list[float]:
    """Train steps [first_step, last_step); returns the loss of the global batch at each."""
    return [_train_step(engine, step) for step in range(first_step, last_step)]


def _train_step(engine: Any, step: int) -> float:
    generator = torch.Generator().manual_seed(100 + step)
    tokens_BT = torch.randint(VOCABULARY, (BATCH, TIME + 1), generator=generator)
    tokens_BT = torch.cumsum(tokens_BT % 3, dim=1) % VOCABULARY
    rank, size = dist.get_rank(), dist.get_world_size()
    share_BT = tokens_BT[rank * BATCH // size : (rank + 1) * BATCH // size]
    loss = engine(share_BT[:, :-1].contiguous(), share_BT[:, 1:].contiguous())
    engine.backward(loss)
    engine.step()
    total = loss.detach().float().clone()
    dist.all_reduce(total)
    return total.item() / size


def open_store(folder: Path, **options: Any) -> CheckpointStore:
    """A store over a gloo group of its own."""
    options.setdefault("keep_last", 5)
    return CheckpointStore(folder, group=dist.new_group(backend="gloo"), **options)


def save_after(layout: Layout, folder: Path, save_at: int, last_step: int) -> list[float]:
    """Train with an asynchronous save in mid-course; returns all losses."""
    engine, placements = make_engine(layout)
    store = open_store(folder)
    before_adam_step(engine, store.wait_staged)
    losses = train(engine, 0, save_at)
    state = TrainingState(
        deepspeed_fragments(engine, placements), {"step": save_at}, f"rank {dist.get_rank()}".encode()
    )
    store.save(save_at, state)
    losses += train(engine, save_at, last_step)
    store.wait()
    return losses


def save_twice(layout: Layout, folder: Path, save_at: int, last_step: int) -> list[float]:
    """Save step `save_at` synchronously and asynchronously, and train on at once; returns the waits in s."""
    engine, placements = make_engine(layout)
    stores = {name: open_store(folder / name, asynchronous=name == "async") for name in ("sync", "async")}
    waits: list[float] = []
    before_adam_step(engine, lambda: waits.append(stores["async"].wait_staged()))
    train(engine, 0, save_at)
    waits.clear()
    for store in stores.values():
        store.save(save_at, TrainingState(deepspeed_fragments(engine, placements), {"step": save_at}))
    train(engine, save_at, last_step)
    stores["async"].wait()
    return waits


def resume(layout: Layout, folder: Path, last_step: int) -> dict[str, Any]:
    """Load the newest step into a fresh engine and train on; returns losses and what else came back."""
    engine, placements = make_engine(layout)
    store = open_store(folder)
    path = store.latest()
    assert path is not None
    state = TrainingState(deepspeed_fragments(engine, placements))
    meta = store.load(path, state)
    refresh_weights(engine)
    losses = train(engine, meta["step"], last_step)
    steps = {f.name: f.step.item() for f in deepspeed_fragments(engine, placements) if f.length}
    return {"losses": losses, "meta": meta, "rank_bytes": state.rank_bytes, "steps": steps}
