"""How fast packed rows are read from tokenised shards, against webdataset on one member per document.

Both read the same tokens in one run on one core: our side in shuffled order through the index, packed into
rows with targets, weights, segment ids and positions; webdataset sequentially, its documents joined and cut
into rows of the same tensors. What is counted is all there is: the tensors are the ones that a model on the
CPU takes, nothing is left to be made from them later. Figures are CPU time (user + system) of this process,
the best of several passes; the two sides' passes alternate, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.rows.cut_rows import RowReader, Source, open_sources
from data_pipelines.storage.dataset import write_dataset
from data_pipelines.storage.shards import TokenShardWriter, write_tar
from data_pipelines.stream.stream import keep_freed_memory
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from pretrain.json_text import to_json

VOCABULARY = 32_768


def document_lengths(tokens: int, mean: float) -> np.ndarray:
    """Log-normal lengths, as web text has them, with the given mean."""
    spread = 0.9
    center = np.log(mean) - spread**2 / 2
    lengths = np.random.default_rng(0).lognormal(center, spread, int(tokens / mean))
    return np.clip(lengths, 8, 100_000).astype(np.int64)


def write_both(folder: Path, tokens: int, mean: float, webdataset_documents: int) -> int:
    """Write our dataset, and the first documents as a webdataset shard; returns the tokens in the latter."""
    random = np.random.default_rng(1)
    writer = TokenShardWriter(folder / "ours", "train", 2, 64_000_000)
    (folder / "ours").mkdir()
    samples: list[dict[str, Any]] = []
    for number, length in enumerate(document_lengths(tokens, mean).tolist()):
        ids = random.integers(1, VOCABULARY, length, dtype=np.uint16)
        ids[-1] = 0
        writer.write(ids, 4 * length)
        if number < webdataset_documents:
            samples.append({"__key__": f"{number:09d}", "tokens.u16": ids.tobytes()})
    entry = BytesTokenizer().save(folder) | {"vocabulary": VOCABULARY, "eot": 0}
    write_dataset(folder / "ours", {"train": writer.close()}, entry)
    write_tar(folder / "webdataset.tar", samples)
    return sum(len(sample["tokens.u16"]) // 2 for sample in samples)


def read_ours(reader: RowReader, rows_per_batch: int, batches: int) -> None:
    """Read the first batches."""
    for step in range(batches):
        reader.batch(range(step * rows_per_batch, (step + 1) * rows_per_batch))


def read_webdataset(folder: Path, length: int, rows_per_batch: int) -> None:
    """Read every document through webdataset and pack batches of the same tensors as ours."""
    import webdataset

    wanted = rows_per_batch * length + 1
    held: list[np.ndarray] = []
    size = 0
    for sample in webdataset.WebDataset(str(folder / "webdataset.tar"), shardshuffle=False):
        held.append(np.frombuffer(sample["tokens.u16"], np.uint16))
        size += len(held[-1])
        if size >= wanted:
            joined = np.concatenate(held)
            pack_joined(joined[:wanted], [len(part) for part in held], length)
            held = [joined[wanted - 1 :]]
            size = len(held[0])


def pack_joined(tokens: np.ndarray, lengths: list[int], length: int) -> list[torch.Tensor]:
    """Tokens, targets, weights, segment ids and positions from joined documents."""
    count = len(tokens) - 1
    ends = np.cumsum(lengths)
    ends = ends[ends < count]
    cuts = np.union1d(np.arange(0, count, length), ends)
    sizes = np.diff(cuts, append=count)
    weights = np.ones(count, np.bool_)
    weights[ends - 1] = False
    number = np.arange(len(cuts)) - np.searchsorted(cuts, cuts // length * length)
    segments = np.repeat(number.astype(np.int16), sizes)
    positions = np.tile(np.arange(length, dtype=np.int16), count // length)
    positions -= np.repeat((cuts % length).astype(np.int16), sizes)
    wide = tokens.astype(np.int64)
    arrays = (wide[:-1], wide[1:], weights, segments, positions)
    return [torch.from_numpy(array).view(-1, length) for array in arrays]


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU time of this process for `work`."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(options: argparse.Namespace, mean: float) -> dict[str, float]:
    """Million tokens per CPU second with documents of `mean` tokens, and the ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        webdataset_tokens = write_both(folder, int(options.tokens), mean, 5000)
        batches = int(options.tokens * 0.9 / options.rows / options.length)
        keep_freed_memory()  # as `open_stream` does
        reader = RowReader(open_sources([Source(folder / "ours")]), options.length, seed=0)
        first = cpu_seconds(lambda: read_ours(reader, options.rows, batches))
        again, seconds = [], []
        for _ in range(options.passes):
            again.append(cpu_seconds(lambda: read_ours(reader, options.rows, batches)))
            seconds.append(cpu_seconds(lambda: read_webdataset(folder, options.length, options.rows)))
    tokens = batches * options.rows * options.length / 1e6
    theirs = webdataset_tokens / min(seconds) / 1e6
    return {
        "mean_document_tokens": mean,
        "rows_first_pass_with_checksums": round(tokens / first, 1),
        "rows_after_that": round(tokens / min(again), 1),
        "webdataset_member_per_document": round(theirs, 1),
        "ratio": round(tokens / min(again) / theirs, 1),
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--tokens", type=float, default=60e6, help="tokens in the dataset (default 60e6)")
    parser.add_argument("--length", type=int, default=4096, help="row length (default 4096)")
    parser.add_argument("--passes", type=int, default=7, help="passes of each side (default 7)")
    parser.add_argument("--rows", type=int, default=64, help="rows of a batch (default 64)")
    parser.add_argument(
        "--mean", type=float, nargs="+", default=[1200, 400], help="mean document lengths (default 1200 400)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = [measure(options, mean) for mean in options.mean]
    print("million tokens per CPU second")
    for label in measured[0]:
        print(f"  {label:32s}" + "".join(f"{figures[label]:10.1f}" for figures in measured))
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "settings": {"tokens": options.tokens, "length": options.length, "rows": options.rows},
        "million_tokens_per_cpu_second": measured,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(to_json(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
