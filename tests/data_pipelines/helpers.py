"""Small real datasets for the tests of this room."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data_pipelines.storage.dataset import write_dataset
from data_pipelines.storage.shards import TokenShardWriter
from data_pipelines.stream.batch import Batch
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.vocabulary import TASKS, Modality, Vocabulary

FIELDS = ("tokens", "targets", "weights", "segment_ids", "positions", "rows")
EOT = 256


def write_documents(folder: Path, split: str, documents: Sequence[np.ndarray], shard_bytes: int) -> list:
    """Write documents (ids without end-of-text) to shards; returns their records."""
    writer = TokenShardWriter(folder, split, 2, shard_bytes)
    for ids in documents:
        writer.write(np.append(ids, EOT).astype(np.uint16), len(ids))
    return writer.close()


def make_dataset(
    folder: Path, lengths: Sequence[int], shard_bytes: int = 10**9, seed: int = 0, validation: int = 0
) -> list[np.ndarray]:
    """A dataset of random documents in the bytes vocabulary; returns the documents of train."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    documents = [random.integers(0, 256, length).astype(np.uint16) for length in lengths]
    splits = {"train": write_documents(folder, "train", documents, shard_bytes)}
    if validation:
        held = [random.integers(0, 256, 20) for _ in range(validation)]
        splits["validation"] = write_documents(folder, "validation", held, shard_bytes)
    write_dataset(folder, splits, BytesTokenizer().save(folder))
    return documents


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """A .jsonl file of documents."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches are equal in every tensor and in the cursor."""
    return a.cursor == b.cursor and all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def joined(batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """The tensors of several batches, one below the other."""
    return {field: torch.cat([getattr(batch, field) for batch in batches]) for field in FIELDS}


VOCABULARY = Vocabulary(
    text=Modality("text", 0, 257, BytesTokenizer.fingerprint),
    eot=EOT,
    image=Modality("image", 257, 8, "patches", grid=(2, 2)),
    audio=Modality("audio", 265, 8, "frames", codebooks=2),
)


def pair(
    task: str, given: Sequence[int], made: Sequence[int], vocabulary: Vocabulary = VOCABULARY
) -> np.ndarray:
    """A document of two parts, from ids."""
    v, (x, y) = vocabulary, TASKS[task]
    parts = [v.task(task), v.begin(x), *given, v.end(x), v.begin(y), *made, v.end(y)]
    return np.asarray(parts, np.uint16)


def make_pairs(
    folder: Path,
    documents: Sequence[np.ndarray],
    shard_bytes: int = 10**9,
    vocabulary: Vocabulary = VOCABULARY,
) -> Path:
    """A dataset of documents that are written as they are, with a vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = TokenShardWriter(folder, "train", 2, shard_bytes)
    for ids in documents:
        writer.write(ids.astype(np.uint16), len(ids))
    vocabulary.save(folder)
    write_dataset(folder, {"train": writer.close()}, BytesTokenizer().save(folder), vocabulary.describe())
    return folder
