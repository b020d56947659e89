"""A published run as a job of the planner: what its slowest rank computes and sends in a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.published.rows import Row
from models.layers.work import AttentionLayer, Fused, Stream, Work
from pretrain.hardware import ACCELERATORS, Accelerator
from pretrain.plan.constants import Constants
from pretrain.plan.kernels import Load, Recomputed
from pretrain.plan.network import Group
from pretrain.plan.timing import Beside, Job, Message, step_time

BF16 = 2
PORT = {"h100": "h100", "h100_500w": "h100", "h200": "h200", "a100_80": "a100", "a100_40": "a100_40"}
CAPPED = {"memory_gb_s": 2400.0, "sustained": 0.83, "memory_gib": 96.0}
"""Of the H100 with 96 GB of HBM2e and 500 W in place of 700 W: 500 / 700 watts give 0.83 to 0.87 of the clock."""
RECOMPUTED: Mapping[str, Recomputed] = {
    "none": Recomputed(),
    "full": Recomputed(1, 1, 1),
    "half_layers": Recomputed(0.5, 0.5, 0.5),
    "third_layers": Recomputed(1 / 3, 1 / 3, 1 / 3),
    "sel_op": Recomputed(products=0.5, streams=1),
    "attn_core": Recomputed(fused=1),
    "custom": Recomputed(0.5, 0.5, 0.5),
}
FUSED_ENGINES = ("megatron", "xla")
"""Their elementwise kernels are fused without torch.compile."""


def tokens_per_second(row: Row, constants: Constants) -> float:
    """Per GPU, as the planner predicts it."""
    seconds = step_time(job(row, constants), accelerator(row), constants).total
    return row.gbs * row.seq / seconds / row.gpus


def accelerator(row: Row) -> Accelerator:
    known = ACCELERATORS[PORT[row.gpu]]
    if row.gpu == "h100_500w":
        known = replace(known, **CAPPED)  # type: ignore[arg-type]  # numbers all
    return replace(
        known,
        gpus_per_node=row.gpus_per_node,
        ports=row.gpus_per_node,
        port_gb_s=row.nic_gb_s,
        # The maker's boards of four GPUs join each pair directly.
        has_switch=row.gpus_per_node > 4,
    )


def job(row: Row, constants: Constants) -> Job:
    parameters = _parameters(row)
    load = Load(
        layers={_layer(row): row.layers / row.pp},
        positions=row.micro * row.seq / row.cp,
        sequence_length=row.seq,
        width=row.width,
        vocabulary=row.vocab,
        # Of a pipeline only the last stage has a head; the others wait for it.
        tensor=row.tp,
        sequence=row.sp,
        fused=row.compile or row.engine in FUSED_ENGINES,
        recomputed=RECOMPUTED[row.ckpt],
    )
    shards = row.gpus_per_node // row.tp if row.shard == "hsdp" else row.replicas
    share = parameters / (1 if row.shard == "ddp" else shards)
    # Gradient, master and two moments are read in fp32, the last three written, and the weight.
    update = 32 * share / (accelerator(row).memory_gb_s * 1e9 * constants.memory)
    return Job(
        load=load,
        exchange=[*_tensor(row, constants), *_context(row, constants), *_pipeline(row)],
        between=_replicas(row, parameters),
        micro_batches=row.accum,
        update=update,
        world=row.gpus,
        pipeline=row.pp,
        chunks=row.vpp,
    )


def _parameters(row: Row) -> float:
    """Of a rank, before the replicas divide them."""
    keys = row.width // row.heads * row.kv_heads
    layer = 2 * row.width**2 + 2 * row.width * keys + (3 if row.gated else 2) * row.width * row.mlp
    ends = row.width * row.vocab * (1 if row.tied or row.pp > 1 else 2)
    return (layer * row.layers / row.pp + ends) / row.tp


def _layer(row: Row) -> Work:
    layer = AttentionLayer(
        kernel="softmax attention",
        width=row.width,
        heads=row.heads,
        key_heads=row.kv_heads,
        hidden=row.mlp,
        gated=row.gated,
    ).work()
    if row.attn == "flash":
        return layer
    # All pairs by plain products, and the scores read and written: mask, softmax and dropout.
    (attention,) = layer.fused
    products = Fused(attention.kernel, per_key=attention.per_key, head_width=128, causal=False, backward=2.0)
    scores = row.heads * row.seq
    return Work(
        layer.products,
        (products,),
        (*layer.streams, Stream("scores", 6 * scores, 9 * scores, 6 * scores, 9 * scores)),
    )


def _tensor(row: Row, constants: Constants) -> list[Message]:
    """Per layer two sums over the ranks in each pass, or as many gatherings and scatterings; gathered once more for the
    gradients of the two products that gathered inputs go into."""
    if row.tp == 1:
        return []
    size = row.micro * row.seq / row.cp * row.width * BF16
    kind, calls = ("allgather", 4 + 4 + 2) if row.sp else ("allreduce", 2 + 2)
    if row.ckpt == "full":
        calls += calls * 2 // 5 if row.sp else 2
    each = calls * row.layers / row.pp
    factor = constants.tensor_messages * (constants.tensor_overlap if row.tp_overlap else 1.0)
    return [Message("tensor", kind, each * size, Group(row.tp, 1, row.gpus), calls=each, factor=factor)]


def _context(row: Row, constants: Constants) -> list[Message]:
    """Keys and values go around, and their gradients too."""
    if row.cp == 1:
        return []
    keys = row.width // row.heads * row.kv_heads / row.tp
    size = row.micro * row.seq * 2 * keys * BF16
    calls = 3 * row.layers / row.pp
    group = Group(row.cp, row.tp, row.gpus)
    return [Message("context", "allgather", calls * size, group, calls, factor=constants.context_overlap)]


def _pipeline(row: Row) -> list[Message]:
    if row.pp == 1:
        return []
    size = row.micro * row.seq / row.cp * row.width * BF16 / (row.tp if row.sp else 1)
    calls = 2 * row.vpp
    return [Message("pipeline", "send", calls * size, Group(row.pp, row.gpus // row.pp), calls)]


def _replicas(row: Row, parameters: float) -> list[Message]:
    gathered, reduced = BF16 * parameters, row.reduce_bytes * parameters
    group, layers = Group(row.replicas, row.tp, row.gpus), row.layers / row.pp
    beside: tuple[Beside, Beside] = ("forward", "backward") if row.dp_overlap else (None, None)
    if row.shard in ("zero3", "zero2", "hsdp"):
        within = Group(row.gpus_per_node // row.tp, row.tp) if row.shard == "hsdp" else group
        found = [
            Message("replicas", "allgather", gathered, within, layers, beside[0]),
            Message("replicas", "reduce_scatter", reduced, within, layers, beside[1]),
        ]
        if row.shard != "zero2":
            found.append(Message("replicas", "allgather", gathered, within, layers, beside[1]))
        if row.shard == "hsdp":
            across = Group(row.replicas // within.ranks, row.gpus_per_node)
            found.append(Message("replicas", "allreduce", reduced / within.ranks, across, layers, beside[1]))
        return found
    if row.shard == "zero1":
        return [
            Message("replicas", "allgather", gathered, group, layers, beside[0], "step"),
            Message("replicas", "reduce_scatter", reduced, group, layers, beside[1], "step"),
        ]
    return [Message("replicas", "allreduce", reduced, group, layers, beside[1], "step")]
