"""What a DeepSpeed engine owns of each parameter, as fragments for the checkpoint; private fields of 0.19.8.

Reading them needs no collective and no copy, in any ZeRO stage. DeepSpeed's own accessors (safe_get_*) are
not used: they are collectives per tensor, return None in stage 0, and deadlock in stages 1 and 2 when there
are several parameter groups, since the moments of all but the first group are never linked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.checkpoint.fragments import Fragment, Placement
from pretrain.engine.optimizer import after_step, before_step
from pretrain.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_fragments(engine: Any, placements: Mapping[str, Placement], prefix: str = "") -> list[Fragment]:
    """The ranges of all parameters that this rank owns, as views of the engine's memory.

    Adam's states are created where the engine has not taken a step yet, so that there is something to load
    into. After loading into the fragments call `refresh_weights`.

    Args:
        engine: what `deepspeed.initialize` returned, over a client torch Adam or AdamW: ZeRO 0 in float32, or
            1, 2, 3 in float32 or bfloat16.
        placements: by the parameters' names in the plain model.
        prefix: what the engine's parameter names have in front of the plain model's, such as "_orig_mod.".

    Returns:
        Fragments in the order of `named_parameters`; parameters of which this rank owns nothing are left out,
        and tied parameters appear once, under their first name.

    Raises:
        CheckpointError: an optimizer that is not Adam, a frozen parameter, or an engine this cannot read.
    """
    optimizer = engine.optimizer
    adam = _adam_of(optimizer)
    create_states(adam, _masters(optimizer, adam))
    parameters = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            raise CheckpointError(f"{name} is frozen: no optimizer holds it, so it would not be saved")
        plain_name = name.removeprefix(prefix)
        assert plain_name in placements, f"no placement for parameter {plain_name}"
        parameters.append((plain_name, parameter, placements[plain_name]))
    if _is_stage3(optimizer):
        return list(_fragments_of_stage3(optimizer, adam, parameters))
    if _flat_partitions(optimizer) is not None:
        return list(_fragments_of_partitions(optimizer, adam, parameters))
    return list(_fragments_of_plain_adam(adam, parameters))


def refresh_weights(engine: Any) -> None:
    """Copy the float32 masters to the model's weights, after a load. Collective over the data ranks."""
    optimizer = engine.optimizer
    if _is_stage3(optimizer):
        optimizer.invalidate_secondary_tensor()  # a node's own copy, if there is one
        with torch.no_grad():
            for group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
                optimizer.fp16_partitioned_groups_flat[group].copy_(master)
                optimizer._unflatten_partitioned_parameters(group)
        persistent = optimizer.persistent_parameters
        if persistent:  # small parameters that every rank keeps whole: drop the old values, gather the new
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    elif _flat_partitions(optimizer) is not None:
        optimizer.update_lp_params()
    # else: ZeRO 0 in float32, where the master is the weight


def before_adam_step(engine: Any, callback: Callable[[], object]) -> None:
    """Call `callback` before each step of the torch optimizer: once per parameter group under ZeRO.

    Between two loads nothing but that step writes to what the fragments show. Scaling and clipping change the
    gradients; what ZeRO does after the step reads the masters.
    """
    before_step(_adam_of(engine.optimizer), callback)


def after_adam_step(engine: Any, callback: Callable[[], object]) -> None:
    """Call `callback` after each step of the torch optimizer: once per parameter group under ZeRO, and before
    ZeRO copies the masters to the model's weights."""
    after_step(_adam_of(engine.optimizer), callback)


_Parameters = list[tuple[str, Any, Placement]]


def _adam_of(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's, or itself in ZeRO 0 float32."""
    adam = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
        raise CheckpointError(
            f"checkpoints hold Adam's moments; the engine has {type(adam).__name__}, not torch.optim.AdamW"
        )
    if any(group.get("amsgrad") for group in adam.param_groups):
        raise CheckpointError("checkpoints do not hold AMSGrad's maxima; set amsgrad=False")
    if adam is not optimizer and not _is_stage3(optimizer) and _flat_partitions(optimizer) is None:
        raise CheckpointError(
            f"{type(optimizer).__name__} (bf16 without ZeRO) is not supported: "
            "use parallel.zero=1, also on one GPU"
        )
    return adam


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _flat_partitions(optimizer: Any) -> list[Tensor] | None:
    """Stages 1 and 2: a flat float32 partition per group; BF16_Optimizer has another name for it."""
    for field in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, field):
            return getattr(optimizer, field)
    return None


def _masters(optimizer: Any, adam: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that Adam steps, which its state is keyed by."""
    if _is_stage3(optimizer):
        return list(optimizer.fp32_partitioned_groups_flat)
    partitions = _flat_partitions(optimizer)
    if partitions is not None:
        return list(partitions)
    return [parameter for group in adam.param_groups for parameter in group["params"]]


def create_states(adam: torch.optim.Optimizer, masters: list[Tensor]) -> None:
    """Adam's state of each tensor that it steps, as it is before the first step, where there is none."""
    # torch keeps the counter on the device only where its kernel reads it there
    on_device = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
    for master in masters:
        state = adam.state[master]
        if "exp_avg" not in state:
            device = master.device if on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(master, memory_format=torch.preserve_format)


def _fragments_of_plain_adam(adam: torch.optim.Optimizer, parameters: _Parameters) -> Iterator[Fragment]:
    """ZeRO 0 in float32: the optimizer steps the model's own parameters, whole on every rank."""
    for name, parameter, placement in parameters:
        tensors = views_of(adam, parameter, 0, parameter.numel())
        yield Fragment(name, tuple(parameter.shape), 0, tensors, adam.state[parameter]["step"], placement)


def _fragments_of_partitions(
    optimizer: Any, adam: torch.optim.Optimizer, parameters: _Parameters
) -> Iterator[Fragment]:
    """ZeRO 1 and 2: each group is one flat tensor, cut in equal parts wherever the cut falls.

    DeepSpeed notes on each parameter which range of it lies where in this rank's part.
    """
    partitions = _flat_partitions(optimizer)
    assert partitions is not None
    for name, parameter, placement in parameters:
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        master = partitions[mapping.param_group_index]
        address = mapping.hp_fragment_address
        tensors = views_of(adam, master, address.start, address.numel)
        start = mapping.lp_fragment_address.start
        yield Fragment(name, tuple(parameter.shape), start, tensors, adam.state[master]["step"], placement)


def _fragments_of_stage3(
    optimizer: Any, adam: torch.optim.Optimizer, parameters: _Parameters
) -> Iterator[Fragment]:
    """ZeRO 3: each parameter is cut by itself in equal parts, the last one padded."""
    for name, parameter, placement in parameters:
        group, offset, elements = optimizer.grad_position[optimizer.get_param_id(parameter)]
        master = optimizer.fp32_partitioned_groups_flat[group]
        rank = dist.get_rank(group=optimizer._get_param_partition_group(parameter))
        tensors = views_of(adam, master, offset, elements)
        local_shape = tuple(parameter.ds_shape)
        yield Fragment(name, local_shape, rank * elements, tensors, adam.state[master]["step"], placement)


def views_of(adam: torch.optim.Optimizer, master: Tensor, start: int, length: int) -> dict[str, Tensor]:
    """A range of a flattened master and of its moments, as a fragment's tensors."""
    state = adam.state[master]
    whole = {"master": master, **{moment: state[moment] for moment in MOMENTS}}
    return {kind: tensor.detach().view(-1).narrow(0, start, length) for kind, tensor in whole.items()}
