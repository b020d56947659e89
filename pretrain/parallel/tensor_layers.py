"""Layers that ranks share, on Megatron-core's, under the names and shapes of the plain ones.

Megatron's mappings split the first dimension and our tensors are (B, T, C): they are transposed around them, which
moves nothing where a micro-batch has one row.

Shape suffixes: B rows, T positions, C model width, N tokens, V vocabulary (here: this rank's part of it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from models.layers.head import Head
from pretrain.imports import quick_and_quiet
from pretrain.parallel.mesh import Axis

with quick_and_quiet():
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
    )


class Region:
    """Where the ranks' work on their own heads, channels or vocabulary begins.

    Without sequence parallelism the input is whole on every rank, and its gradient is summed over the ranks. With it
    each rank brings its positions and gets all of them, and its gradient is summed and divided again. Row layers and
    the embedding are the other end.

    Positions are divided in training alone: what generates or evaluates reads any number of them.
    """

    def __init__(self, axis: Axis, sequence: bool) -> None:
        self._group = axis.group
        self._sequence = sequence

    def enter(self, x_BTC: Tensor, training: bool) -> Tensor:
        if self._sequence and training:
            whole_TBC = gather_from_sequence_parallel_region(x_BTC.transpose(0, 1), group=self._group)
            return whole_TBC.transpose(0, 1).contiguous()
        x_BTC = copy_to_tensor_model_parallel_region(x_BTC, group=self._group)
        if x_BTC.requires_grad:
            # Megatron sums a copy, and drops it, where the gradient is not contiguous.
            x_BTC.register_hook(_contiguous)
        return x_BTC

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """As a forward pre-hook: the module's first input enters."""
        return (self.enter(inputs[0], module.training), *inputs[1:])

    def after(self, module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """As a forward hook: the module's output enters."""
        return self.enter(output, module.training)


def _contiguous(gradient: Tensor) -> Tensor:
    return gradient.contiguous()


def _config(axis: Axis, dtype: torch.dtype) -> Any:
    # Allocated by us on the default device; drawn by us, whole and by name.
    return ModelParallelConfig(
        tensor_model_parallel_size=axis.size,
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


class ColumnLinear(ColumnParallelLinear):
    """Some of the output features. Its input has entered the `Region` already, once for all layers that read it."""

    def __init__(self, plain: nn.Linear, axis: Axis) -> None:
        super().__init__(
            plain.in_features,
            plain.out_features,
            bias=False,
            config=_config(axis, plain.weight.dtype),
            init_method=nn.init.zeros_,
            disable_grad_reduce=True,
            tp_group=axis.group,
        )
        self.in_features = plain.in_features
        self.out_features = plain.out_features // axis.size

    def _forward_impl(self, input: Tensor, weight: Tensor, **_options: Any) -> Tensor:
        return linear(input, weight)  # Megatron's own form fuses what is not used here

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)[0]
        return out


class RowLinear(RowParallelLinear):
    """Some of the input features; the ranks' outputs are summed, and their positions divided under `sequence`."""

    def __init__(self, plain: nn.Linear, axis: Axis, sequence: bool) -> None:
        super().__init__(
            plain.in_features,
            plain.out_features,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            config=_config(axis, plain.weight.dtype),
            init_method=nn.init.zeros_,
            tp_group=axis.group,
        )
        self.in_features = plain.in_features // axis.size
        self.out_features = plain.out_features
        self._sequence = sequence

    def _forward_impl(self, input: Tensor, weight: Tensor, **_options: Any) -> Tensor:
        return linear(input, weight)

    def forward(self, x_BTC: Tensor) -> Tensor:
        self.sequence_parallel = self._sequence and self.training
        if self.sequence_parallel:
            divided: Tensor = super().forward(x_BTC.transpose(0, 1))[0].transpose(0, 1)
            return divided
        out: Tensor = super().forward(x_BTC)[0]
        return out


class SharedEmbedding(VocabParallelEmbedding):
    """Some of the vocabulary's rows, filled up so that all ranks have as many; the positions divided under
    `sequence`."""

    def __init__(self, plain: nn.Embedding, axis: Axis, sequence: bool) -> None:
        super().__init__(
            padded_vocabulary(plain.num_embeddings, axis.size),
            plain.embedding_dim,
            init_method=nn.init.zeros_,
            config=_config(axis, plain.weight.dtype),
            tp_group=axis.group,
        )
        self._sequence = sequence

    def forward(self, tokens_BT: Tensor) -> Tensor:
        self.reduce_scatter_embeddings = self._sequence and self.training
        out: Tensor = super().forward(tokens_BT)
        return out.transpose(0, 1) if self.reduce_scatter_embeddings else out


class SharedHead(Head):
    """Logits of some of the vocabulary, filled up as the embedding is. What fills it up is never predicted.

    The hidden states have entered the `Region` already. Asked for logits it gives all of them, on every rank.
    """

    def __init__(self, plain: Head, axis: Axis) -> None:
        super().__init__(plain.in_features, plain.out_features)
        columns = padded_vocabulary(plain.out_features, axis.size) // axis.size
        self.weight = nn.Parameter(plain.weight.new_empty(columns, plain.in_features))
        self._axis = axis
        self._columns = columns

    @property
    def columns(self) -> int:
        return self._columns

    def whole(self, logits: Tensor) -> Tensor:
        whole: Tensor = gather_from_tensor_model_parallel_region(logits, group=self._axis.group)
        return whole[..., : self.out_features]

    def losses(
        self, logits_NV: Tensor, targets_N: Tensor, size: int | None, normalisers: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Equal on all ranks."""
        first = self._axis.rank * self._columns
        possible = max(0, min(self._columns, (self.out_features if size is None else size) - first))
        each_N, normalisers_N = _SharedLosses.apply(
            logits_NV.float(), targets_N, first, possible, self._axis.group
        )
        return each_N, normalisers_N if normalisers else None


class _SharedLosses(torch.autograd.Function):
    """Cross-entropies and log-sum-exps of logits that the ranks share, by the steps of Megatron's own function, which
    has no log-sum-exp. Of a rank's columns the first is id `first`, and so many are `possible`. Overwrites the logits,
    which a matrix product's gradient does not need."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        targets_N: Tensor,
        first: int,
        possible: int,
        group: torch.distributed.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        reduce, loss = torch.distributed.all_reduce, VocabParallelCrossEntropy
        logits_NV[:, possible:] = -torch.inf
        logits_NV, maximum_N = loss.calculate_logits_max(logits_NV)
        reduce(maximum_N, torch.distributed.ReduceOp.MAX, group)
        last = first + logits_NV.shape[-1]
        elsewhere_N, columns_N, predicted_N, sums_N, exponentials_NV = loss.calculate_predicted_logits(
            logits_NV, targets_N, maximum_N, first, last
        )
        reduce(predicted_N, group=group)
        reduce(sums_N, group=group)
        shares_NV, each_N = loss.calculate_cross_entropy_loss(exponentials_NV, predicted_N, sums_N)
        ctx.save_for_backward(shares_NV, elsewhere_N, columns_N)
        return each_N, sums_N.log() + maximum_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, each_N: Tensor, normalisers_N: Tensor) -> tuple[Tensor, None, None, None, None]:
        shares_NV, elsewhere_N, columns_N = ctx.saved_tensors
        gradient_NV = shares_NV.mul_((each_N + normalisers_N)[:, None])
        here_N = each_N.masked_fill(elsewhere_N, 0.0)
        gradient_NV.scatter_add_(1, columns_N[:, None], -here_N[:, None])
        return gradient_NV, None, None, None, None


def padded_vocabulary(vocabulary: int, ranks: int) -> int:
    """The next number that divides by the ranks."""
    return -(-vocabulary // ranks) * ranks
