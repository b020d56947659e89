"""Mamba-2's state-space recurrence, chunk by chunk, in plain PyTorch, and by the mamba-ssm package's kernels.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t b_t^T        y_t = S_t c_t

per head, with a matrix S of head width by state width, zeros at the beginning of each document.
Source: Dao and Gu, "Transformers are SSMs", section 6 and listing 1.

Shape suffixes: B batch, T time, H heads, P head width, G groups, N state width, K chunks, Q positions of a
chunk (S the second such index).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class SSMInputs:
    """What the recurrence reads.

    x_BTHP: inputs; dt_BTH: positive step sizes; rate_H: the negative A; in_BTGN, out_BTGN: the maps b and c of
    each group of heads; state_BHPN: before position 0, or None for zeros; segment_ids_BT: the documents.
    """

    x_BTHP: Tensor
    dt_BTH: Tensor
    rate_H: Tensor
    in_BTGN: Tensor
    out_BTGN: Tensor
    state_BHPN: Tensor | None = None
    segment_ids_BT: Tensor | None = None


def ssm(inputs: SSMInputs, chunk: int, kernel: str) -> tuple[Tensor, Tensor]:
    """The outputs (B, T, H, P) in x's dtype and the last state (B, H, P, N) in fp32 or wider.

    kernel: "torch", "mamba_ssm", or "auto", which takes mamba_ssm on a GPU where it is installed. Raises
    ValueError if mamba_ssm is named and is not to be had.
    """
    on_gpu = inputs.x_BTHP.is_cuda
    installed = find_spec("mamba_ssm") is not None
    if kernel == "mamba_ssm" and not (on_gpu and installed):
        raise ValueError(
            "kernel: mamba_ssm needs a GPU and the mamba-ssm package; install it, or set kernel: torch"
        )
    if kernel != "torch" and on_gpu and installed:
        return _packaged(inputs, chunk)
    return chunked(inputs, chunk)


def chunked(inputs: SSMInputs, chunk: int) -> tuple[Tensor, Tensor]:
    """As `ssm`, by matrix products within chunks and a short walk over the chunks. fp32 or wider inside."""
    dtype, time = inputs.x_BTHP.dtype, inputs.x_BTHP.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    heads, group = inputs.x_BTHP.shape[2], inputs.x_BTHP.shape[2] // inputs.in_BTGN.shape[2]
    chunk = min(chunk, time)
    x_BKQHP = _in_chunks(inputs.x_BTHP.to(wide) * inputs.dt_BTH.to(wide)[..., None], chunk)
    in_BKQHN = _in_chunks(inputs.in_BTGN.to(wide), chunk).repeat_interleave(group, 3)
    out_BKQHN = _in_chunks(inputs.out_BTGN.to(wide), chunk).repeat_interleave(group, 3)
    decay_BKQH = _in_chunks(inputs.dt_BTH.to(wide) * inputs.rate_H.to(wide), chunk).cumsum(2)
    document_BKQ = _documents(inputs.segment_ids_BT, x_BKQHP, time, chunk)

    mask_BKQS = document_BKQ[..., :, None] == document_BKQ[..., None, :]
    mask_BKQS = mask_BKQS & torch.ones_like(mask_BKQS[0, 0]).tril()
    log_BKHQS = (decay_BKQH[:, :, :, None] - decay_BKQH[:, :, None]).movedim(-1, 2)
    weight_BKHQS = log_BKHQS.masked_fill(~mask_BKQS[:, :, None], float("-inf")).exp()
    scores_BKHQS = torch.einsum("bkqhn,bkshn->bkhqs", out_BKQHN, in_BKQHN) * weight_BKHQS
    y_BKQHP = torch.einsum("bkhqs,bkshp->bkqhp", scores_BKHQS, x_BKQHP)

    to_end_BKQH = (decay_BKQH[:, :, -1:] - decay_BKQH).exp()
    to_end_BKQH = to_end_BKQH * (document_BKQ == document_BKQ[:, :, -1:])[..., None]
    added_BKHPN = torch.einsum("bkqhp,bkqh,bkqhn->bkhpn", x_BKQHP, to_end_BKQH, in_BKQHN)
    before_BKHPN, last_BHPN = _walk(added_BKHPN, decay_BKQH, document_BKQ, inputs.state_BHPN)
    from_before_BKQH = decay_BKQH.exp() * (document_BKQ == _document_before(document_BKQ))[..., None]
    y_BKQHP = y_BKQHP + torch.einsum("bkqhn,bkhpn,bkqh->bkqhp", out_BKQHN, before_BKHPN, from_before_BKQH)
    return y_BKQHP.flatten(1, 2)[:, :time].reshape(-1, time, heads, x_BKQHP.shape[-1]).to(dtype), last_BHPN


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, T, ...) to (B, K, Q, ...), filled up with zeros: no input, and a decay of exp(0)."""
    missing = -x.shape[1] % chunk
    if missing:
        x = functional.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, chunk))


def _documents(segment_ids_BT: Tensor | None, like: Tensor, time: int, chunk: int) -> Tensor:
    """(B, K, Q) the number of documents begun so far; what fills the last chunk up belongs to the last one."""
    begun_BT = torch.zeros(like.shape[0], time, dtype=torch.long, device=like.device)
    if segment_ids_BT is not None:
        begun_BT[:, 1:] = (segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]).cumsum(1)
    missing = -time % chunk
    begun_BT = torch.cat((begun_BT, begun_BT[:, -1:].expand(-1, missing)), dim=1)
    return begun_BT.unflatten(1, (-1, chunk))


def _document_before(document_BKQ: Tensor) -> Tensor:
    """(B, K, 1) the document of the position before each chunk; before the first, that of position 0."""
    last_BK1 = document_BKQ[:, :, -1:]
    return torch.cat((document_BKQ[:, :1, :1], last_BK1[:, :-1]), dim=1)


def _walk(
    added_BKHPN: Tensor, decay_BKQH: Tensor, document_BKQ: Tensor, state_BHPN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk (B, K, H, P, N), and the one after the last."""
    unbroken_BK1 = document_BKQ[:, :, -1:] == _document_before(document_BKQ)
    factor_BKH = decay_BKQH[:, :, -1].exp() * unbroken_BK1
    state = torch.zeros_like(added_BKHPN[:, 0]) if state_BHPN is None else state_BHPN.to(added_BKHPN.dtype)
    before = []
    for chunk in range(added_BKHPN.shape[1]):
        before.append(state)
        state = state * factor_BKH[:, chunk, :, None, None] + added_BKHPN[:, chunk]
    return torch.stack(before, 1), state


@cache
def _packaged_scan() -> Callable[..., Any]:
    scan: Callable[..., Any] = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return scan


def _packaged(inputs: SSMInputs, chunk: int) -> tuple[Tensor, Tensor]:
    segments = inputs.segment_ids_BT
    documents = None
    if segments is not None:
        documents = _documents(segments, inputs.x_BTHP, segments.shape[1], segments.shape[1])
        documents = documents.flatten(1).to(torch.int32)
    y_BTHP, state_BHPN = _packaged_scan()(
        inputs.x_BTHP,
        inputs.dt_BTH,
        inputs.rate_H,
        inputs.in_BTGN,
        inputs.out_BTGN,
        chunk,
        seq_idx=documents,
        initial_states=inputs.state_BHPN,
        return_final_states=True,
    )
    return y_BTHP, state_BHPN
