"""Writing datasets of pairs: `<task> <begin X> x <end X> <begin Y> y <end Y>`, one folder for each task."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.storage.dataset import token_bytes, write_dataset
from data_pipelines.storage.shards import MEMBER_TOKENS, ShardRecord, TokenShardWriter
from data_pipelines.tokens.modalities import Modalities
from data_pipelines.tokens.vocabulary import TASKS, Vocabulary


def pair_document(vocabulary: Vocabulary, task: str, given: np.ndarray, made: np.ndarray) -> np.ndarray:
    """The ids of one document, int64.

    Args:
        given, made: ids of the condition and of the target.
    """
    v, (x, y) = vocabulary, TASKS[task]
    head, middle = [v.task(task), v.begin(x)], [v.end(x), v.begin(y)]
    return np.concatenate([head, given, middle, made, [v.end(y)]]).astype(np.int64)


def fill_text(ids: np.ndarray, slot: int | None, eot: int, what: str) -> np.ndarray:
    """A text target: the ids, then end-of-text, once or until `slot` tokens are full.

    The filling is trained on, so that the model learns where a text ends within a slot of fixed length.

    Raises:
        DataError: the text leaves no room for end-of-text.
    """
    if slot is None:
        return np.append(ids, eot)
    if len(ids) >= slot:
        raise DataError(
            f"{what}: its text has {len(ids)} tokens, the slot {slot}, and the slot must be longer. Use --text-slot "
            f"{len(ids) + 1} or more, or shorten the text."
        )
    return np.concatenate([ids, np.full(slot - len(ids), eot)])


class PairWriter:
    """Writes the dataset folder of one task.

    Args:
        folder: an existing empty folder.
        slot: tokens of a text target; None: each as long as it is.
    """

    def __init__(
        self,
        folder: Path,
        task: str,
        modalities: Modalities,
        slot: int | None,
        shard_bytes: int = 256_000_000,
    ) -> None:
        self.folder, self.task, self.modalities, self.slot = folder, task, modalities, slot
        self._width = token_bytes(modalities.vocabulary.size)
        self._shard_bytes = shard_bytes
        self._writers: dict[str, TokenShardWriter] = {}

    def write(self, split: str, given: np.ndarray, made: np.ndarray, text_bytes: int, what: str) -> None:
        """Append a pair of ids; a text target without its end-of-text.

        Args:
            text_bytes: UTF-8 bytes of its text.
            what: names file and row in errors.

        Raises:
            DataError: a side is empty, the text does not fit into the slot, or the pair is too long for a shard.
        """
        vocabulary, (x, y) = self.modalities.vocabulary, TASKS[self.task]
        for name, ids in ((x, given), (y, made)):
            if len(ids) == 0:
                raise DataError(f"{what}: its {name} is empty. Mend it or leave it out.")
        if y == "text":
            made = fill_text(made, self.slot, vocabulary.eot, what)
        document = pair_document(vocabulary, self.task, given, made)
        if len(document) > MEMBER_TOKENS:
            raise DataError(
                f"{what}: a pair of {len(document)} tokens; at most {MEMBER_TOKENS} fit into a shard."
            )
        writer = self._writers.get(split)
        if writer is None:
            writer = TokenShardWriter(self.folder, split, self._width, self._shard_bytes)
            self._writers[split] = writer
        writer.write(document, text_bytes)

    def close(self, splits: tuple[str, ...] = ("train", "validation", "test")) -> None:
        """Finish the shards; write vocabulary, tokenizer, codecs and dataset.json."""
        records: dict[str, list[ShardRecord]] = {
            split: self._writers[split].close() for split in splits if split in self._writers
        }
        assert len(records) == len(self._writers), f"splits {list(self._writers)} are not all of {splits}"
        entry = self.modalities.save(self.folder)
        ranges = self.modalities.vocabulary.describe() | {"task": self.task, "text_slot": self.slot}
        write_dataset(self.folder, records, entry, ranges)
