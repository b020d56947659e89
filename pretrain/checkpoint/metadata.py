"""DCP's `.metadata` read without running anything: it is a pickle, and whoever made the checkpoint chose its bytes.

A pickle names what it is made of. Here each name of a short list becomes a stand-in that only remembers what it was
given, every other name is an error, and DCP's own classes are made afterwards, from values that were looked at.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from pretrain.errors import CheckpointError

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_DCP = "torch.distributed.checkpoint.metadata"
RECORDS = (
    (_DCP, "Metadata"),
    (_DCP, "MetadataIndex"),
    (_DCP, "TensorStorageMetadata"),
    (_DCP, "BytesStorageMetadata"),
    (_DCP, "TensorProperties"),
    (_DCP, "ChunkStorageMetadata"),
    (_DCP, "StorageMeta"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
)
"""Classes of which only the attributes are kept."""
VALUES = (
    (_DCP, "_MEM_FORMAT_ENCODING"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
)
"""What is called with plain values, of which these are kept."""


def read_metadata(path: Path, files: Collection[str]) -> Metadata:
    """The metadata in the file `path`, whose tensors lie in `files` of the same folder.

    Raises:
        CheckpointError: the file cannot be read, holds anything but DCP's metadata, or names another file.
    """
    try:
        return _metadata(_unpickled(path.read_bytes()), files)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name} is not trusted: {error}") from None
    except Exception as error:  # what a pickle of foreign bytes raises is anything
        raise CheckpointError(f"{path.name} cannot be read: {type(error).__name__}: {error}") from None


# ------------------------------------------------------------------------------------------------ the pickle


class _Record:
    """Stands for an object of one of RECORDS. `values` is the state it was pickled with."""

    def __init__(self) -> None:
        self.values: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.values = state


def _plain(*values: Any) -> Any:
    """Stands for one of VALUES."""
    return values[0] if len(values) == 1 else values


def _unpickled(content: bytes) -> _Record:
    """The stand-in for the whole. Of each file anew, so that nothing a pickle does to a stand-in outlives it."""
    known: dict[tuple[str, str], Any] = {key: type(key[1], (_Record,), {}) for key in RECORDS}
    known |= {key: _function() for key in VALUES}
    known |= {("torch", name): name for name in DTYPES}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            try:
                return known[module, name]
            except KeyError:
                raise CheckpointError(
                    f"it names {module}.{name}, which no checkpoint of this project needs; its author may have meant "
                    "to run code here. Nothing of it was run. Take a copy from a source that you trust"
                ) from None

    found = Unpickler(io.BytesIO(content)).load()
    if not isinstance(found, _Record):
        raise CheckpointError(f"it holds a {type(found).__name__}, not DCP's metadata")
    return found


def _function() -> Callable[..., Any]:
    """`_plain`, but an object of its own: a pickle may set a function's attributes."""
    return lambda *values: _plain(*values)


# ------------------------------------------------------------------------------------------------ its values


def _metadata(found: _Record, files: Collection[str]) -> Metadata:
    values = _values(found, "Metadata")
    return Metadata(
        state_dict_metadata={
            _text(name): _entry(name, entry)
            for name, entry in _mapping(values, "state_dict_metadata").items()
        },
        storage_data={
            _index(index): _storage(info, files) for index, info in _mapping(values, "storage_data").items()
        },
        storage_meta=StorageMeta(),
    )


def _entry(name: str, found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(found).__name__ == "BytesStorageMetadata" and isinstance(found, _Record):
        return BytesStorageMetadata()
    values = _values(found, "TensorStorageMetadata")
    size = _size(values["size"], f"the size of {name}")
    properties = values["properties"]
    state = properties.values if isinstance(properties, _Record) else None
    dtype = state[0] if isinstance(state, tuple) and len(state) == 5 else None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{name} is of no type of tensors: {dtype!r}")
    chunks = values["chunks"]
    if not isinstance(chunks, list):
        raise CheckpointError(f"the chunks of {name} are a {type(chunks).__name__}")
    return TensorStorageMetadata(
        TensorProperties(dtype=getattr(torch, dtype)), size, [_chunk(name, size, chunk) for chunk in chunks]
    )


def _chunk(name: str, size: torch.Size, found: Any) -> ChunkStorageMetadata:
    values = _values(found, "ChunkStorageMetadata")
    offsets = _size(values["offsets"], f"an offset of {name}")
    sizes = _size(values["sizes"], f"the size of a chunk of {name}")
    inside = len(offsets) == len(sizes) == len(size) and all(
        offset + length <= whole for offset, length, whole in zip(offsets, sizes, size, strict=True)
    )
    if not inside:
        raise CheckpointError(
            f"a chunk of {name} at {tuple(offsets)} of {tuple(sizes)} is not in {tuple(size)}"
        )
    return ChunkStorageMetadata(offsets, sizes)


def _index(found: Any) -> MetadataIndex:
    values = _values(found, "MetadataIndex")
    name, offset, index = _text(values["fqn"]), values.get("offset"), values.get("index")
    if index is not None and type(index) is not int:
        raise CheckpointError(f"the index of {name} is {index!r}")
    return MetadataIndex(name, None if offset is None else _size(offset, f"an offset of {name}"), index)


def _storage(found: Any, files: Collection[str]) -> _StorageInfo:
    values = _values(found, "_StorageInfo")
    name, numbers = values["relative_path"], (values["offset"], values["length"])
    if not isinstance(name, str) or name not in files:
        raise CheckpointError(f"it names the file {name!r}, which the manifest does not have")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError(f"in {name} it names the bytes {numbers}")
    if values.get("transform_descriptors"):
        raise CheckpointError(
            f"what it names in {name} is transformed, which no checkpoint of this project is"
        )
    return _StorageInfo(name, *numbers)


def _values(found: Any, kind: str) -> Mapping[str, Any]:
    """The attributes of a stand-in for `kind`."""
    if not isinstance(found, _Record) or type(found).__name__ != kind or not isinstance(found.values, dict):
        raise CheckpointError(f"it holds a {type(found).__name__} where a {kind} belongs")
    return found.values


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[Any, Any]:
    found = values[key]
    if not isinstance(found, dict):
        raise CheckpointError(f"its {key} is a {type(found).__name__}")
    return found


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise CheckpointError(f"it holds {type(found).__name__} where a name belongs")
    return found


def _size(found: Any, what: str) -> torch.Size:
    if not isinstance(found, list | tuple) or any(type(n) is not int or not 0 <= n < 2**62 for n in found):
        raise CheckpointError(f"{what} is not a size")
    return torch.Size(found)
