"""How the decoder's weights split over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping

from models.sharding import Column, Row, Shared, Split, Vocab

DECODER_SHARDING: Mapping[str, Split] = {
    "blocks.*.attention.qkv": Column(by="heads"),
    "blocks.*.attention.q_norm": Shared(),
    "blocks.*.attention.k_norm": Shared(),
    "blocks.*.attention.out": Row(),
    "blocks.*.mlp.gate": Column(),
    "blocks.*.mlp.up": Column(),
    "blocks.*.mlp.down": Row(),
    "embedding": Vocab(),
    "head": Vocab(),
}
