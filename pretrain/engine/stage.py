"""A part of a model as Megatron's schedules drive it, and the parts of all ranks as one model again.

Shape suffixes: B rows, T time, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data_pipelines.stream.batch import Batch
    from pretrain.objectives import LossSum, Objective
    from pretrain.parallel.mesh import Axis
    from pretrain.parallel.stages import Part


class Stage(nn.Module):
    """One part: the schedule sets the hidden states that came from the stage before, then calls it."""

    def __init__(self, part: Part, model_type: Any) -> None:
        super().__init__()
        self.model = part.model
        self.model_type = model_type
        self._is_last = part.is_last
        self._hidden_BTC: Tensor | None = None

    def set_input_tensor(self, received: list[Tensor | None]) -> None:
        (self._hidden_BTC,) = received

    def forward(self, batch: Batch, objective: Objective) -> LossSum | Tensor:
        """The last stage's loss; the others' hidden states (B, T, C)."""
        hidden_BTC, self._hidden_BTC = self._hidden_BTC, None
        continued = Continued(self.model, hidden_BTC)
        if self._is_last:
            return objective(continued, batch)  # type: ignore[arg-type]  # all that an objective asks of a model
        # Transposed under sequence parallelism, and what is sent must not be.
        return continued(*objective.inputs(batch)).contiguous()


class Continued:
    """A part of a model, called as the whole one is: it goes on from these hidden states."""

    def __init__(self, model: nn.Module, hidden_BTC: Tensor | None) -> None:
        self._model = model
        self._hidden_BTC = hidden_BTC
        self.head = model.head

    def __call__(self, tokens_BT: Tensor, segment_ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        out: Tensor = self._model(tokens_BT, segment_ids_BT, positions_BT, hidden_BTC=self._hidden_BTC)
        return out


class StagedModel(nn.Module):
    """All ranks' parts as one model for forward passes without gradients, which all ranks of the pipeline make
    together; each has the hidden states and the logits. One stage works at a time: it is for samples, not for speed.
    """

    def __init__(self, parts: Sequence[Part], pipeline: Axis) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part.model for part in parts)
        self._pipeline = pipeline
        self._ranks = dist.get_process_group_ranks(pipeline.group)
        any_part: Any = parts[0].model
        self.config = any_part.config
        self.constant_state: bool = any_part.constant_state
        self.position_axes: int = getattr(any_part, "position_axes", 1)

    def forward(
        self,
        tokens_BT: Tensor,
        segment_ids_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        state: list[list[Any]] | None = None,
    ) -> Tensor:
        """(B, T, C), as `LanguageModel.forward` without gradients."""
        hidden_BTC: Tensor | None = None
        here, size = self._pipeline.rank, self._pipeline.size
        for stage in range(size * len(self.parts)):
            chunk, owner = divmod(stage, size)
            if owner == here:
                remembered = None if state is None else state[chunk]
                hidden_BTC = self.parts[chunk](
                    tokens_BT, segment_ids_BT, positions_BT, remembered, hidden_BTC=hidden_BTC
                )
            # To all, not only to the next: the last one's are for all, and the shape is known to all then.
            hidden_BTC = self._from(owner, hidden_BTC if owner == here else None)
        assert hidden_BTC is not None
        return hidden_BTC

    def head(self, hidden: Tensor) -> Tensor:
        """(..., C) to logits (..., V)."""
        head: nn.Module | None = self.parts[-1].head  # type: ignore[assignment]
        logits = head(hidden) if self._pipeline.is_last else None  # type: ignore[misc]
        return self._from(self._pipeline.size - 1, logits)

    def new_state(
        self,
        batch: int,
        length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[list[Any]]:
        """What this rank's blocks remember, by part."""
        return [part.new_state(batch, length, device, dtype) for part in self.parts]  # type: ignore[operator]

    def cells(self) -> dict[str, Any]:
        """This rank's recurrences by their modules' names in the plain model."""
        return {name: cell for part in self.parts for name, cell in part.cells().items()}  # type: ignore[operator]

    def _from(self, owner: int, tensor: Tensor | None) -> Tensor:
        """The owner's tensor, on all ranks of the pipeline."""
        some = next(self.parameters())
        source = self._ranks[owner]
        dims = torch.zeros(2, dtype=torch.int64, device=some.device)
        if tensor is not None:
            dims = torch.tensor([tensor.ndim, tensor.dtype == torch.float32], device=some.device)
        dist.broadcast(dims, source, group=self._pipeline.group)
        rank, is_wide = dims.tolist()
        shape = torch.empty(rank, dtype=torch.int64, device=some.device)
        if tensor is not None:
            shape = torch.tensor(tensor.shape, device=some.device)
        dist.broadcast(shape, source, group=self._pipeline.group)
        dtype = torch.float32 if is_wide else some.dtype
        received = torch.empty(shape.tolist(), dtype=dtype, device=some.device)
        if tensor is not None:
            received = tensor.contiguous()
        if received.numel():
            dist.broadcast(received, source, group=self._pipeline.group)
        return received
