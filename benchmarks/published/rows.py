"""Rows of published training runs, read and checked.

The columns, with units, are told in README.md beside this file.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

HERE = Path(__file__).parent
RUNS, COLLECTIVES = HERE / "runs.csv", HERE / "collectives.csv"
GPUS = ("h100", "h100_500w", "h200", "a100_80", "a100_40")


class RowsError(ValueError):
    """The file cannot be used."""


class Row(BaseModel):
    """One measurement."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    source: str
    gpu: Literal["h100", "h100_500w", "h200", "a100_80", "a100_40"]
    gpus: int = Field(ge=1)
    gpus_per_node: int = Field(ge=1)
    nic_gb_s: float = Field(gt=0)
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    mlp: int = Field(ge=1)
    gated: bool
    vocab: int = Field(ge=1)
    tied: bool
    seq: int = Field(ge=1)
    engine: Literal["fsdp", "megatron", "xla"]
    shard: Literal["zero3", "zero2", "hsdp", "zero1", "ddp"]
    tp: int = Field(ge=1)
    sp: bool
    cp: int = Field(ge=1)
    pp: int = Field(ge=1)
    vpp: int = Field(ge=1)
    micro: int = Field(ge=1)
    accum: int = Field(ge=1)
    gbs: int = Field(ge=1)
    reduce_bytes: int = Field(ge=1, le=8)
    ckpt: Literal["none", "full", "half_layers", "third_layers", "sel_op", "attn_core", "custom"]
    compile: bool
    attn: Literal["flash", "unfused"]
    tp_overlap: bool
    dp_overlap: bool
    precision: Literal["bf16"]
    tok_s_gpu: float = Field(gt=0)
    quality: Literal["A", "A-", "B", "C"]

    @property
    def model(self) -> tuple[int, int, int, bool]:
        """What makes two rows the same model."""
        return self.layers, self.width, self.mlp, self.gated

    @property
    def replicas(self) -> int:
        """Ranks with the same weights."""
        return self.gpus // (self.tp * self.pp)

    @model_validator(mode="after")
    def _divides(self) -> Row:
        ranks = self.tp * self.cp * self.pp
        checks = {
            f"width {self.width} does not divide by {self.heads} heads": self.width % self.heads,
            f"{self.heads} heads do not divide by {self.kv_heads} kv_heads": self.heads % self.kv_heads,
            f"{self.gpus} gpus do not divide by tp x cp x pp = {ranks}": self.gpus % ranks,
            f"{self.heads} heads do not divide by tp = {self.tp}": self.heads % self.tp,
            f"{self.layers} layers are fewer than pp x vpp = {self.pp * self.vpp}": self.layers
            < self.pp * self.vpp,
            f"seq {self.seq} does not divide by cp = {self.cp}": self.seq % self.cp,
        }
        if wrong := [message for message, remainder in checks.items() if remainder]:
            raise ValueError("; ".join(wrong))
        rows = self.micro * self.accum * self.gpus // ranks
        if rows != self.gbs:
            message = f"micro x accum x replicas = {rows} rows per step, not gbs = {self.gbs}"
            raise ValueError(message)
        return self


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows, and of those left out why: "line 7 (some-id): gpu: ...".

    Raises RowsError for a file that cannot be read, has no header or lacks columns, naming them.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RowsError(f"{path}: cannot be read as CSV: {error}") from None
    missing = [name for name in Row.model_fields if name not in columns]
    if missing:
        raise RowsError(
            f"{path}: lacks the columns {', '.join(missing)}; benchmarks/published/README.md tells them"
        )
    rows, left_out = [], []
    for number, line in enumerate(lines, start=2):
        try:
            rows.append(Row.model_validate(line))
        except ValidationError as error:
            left_out.append(f"line {number} ({line['id'] or 'no id'}): {'; '.join(_messages(error))}")
    if not rows:
        raise RowsError(f"{path}: no row can be used: {left_out[0] if left_out else 'it has none'}")
    return rows, left_out


def _messages(error: ValidationError) -> Iterator[str]:
    for one in error.errors():
        where = ".".join(map(str, one["loc"]))
        yield f"{where} {one['input']!r}: {one['msg']}" if where else one["msg"].removeprefix("Value error, ")
