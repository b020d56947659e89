"""Fuzzers of `data build` and `data pairs` from end to end."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np

from data_pipelines.prepare.pair_options import PairOptions
from data_pipelines.prepare.pairs import build_pairs
from data_pipelines.prepare.text import BuildOptions, build
from data_pipelines.storage.dataset import Dataset, Shard
from data_pipelines.tokens.document_form import member_documents, token_members
from tests.fuzz.base import Fuzzer, chosen, mutated, refusals_name, require
from tests.fuzz.texts import text_of_words


def _stored(dataset: Dataset, split: str) -> list[np.ndarray]:
    """The ids of every document, as they are stored."""
    found = []
    for record in dataset.splits[split].shards if split in dataset.splits else ():
        opened = Shard(dataset, record).open()
        for member in token_members(opened):
            documents = member_documents(opened, member)
            found += np.split(documents.tokens_N, documents.begin_D[1:])
    return found


def builds(seed: int, folder: Path) -> None:
    """`data build` of a folder of files: its documents are in the dataset, each once, or told."""
    random = np.random.default_rng(seed)
    (folder / "in").mkdir()
    texts = []
    for number in range(int(random.integers(1, 6))):
        text = f"text {number} {text_of_words(random)}"
        name, form = f"{number}", chosen(random, ["txt", "jsonl", "json", "md.gz", "tar"])
        path, line = folder / "in" / f"{name}.{form}", json.dumps({"text": text}).encode()
        if form == "jsonl":
            path.write_bytes(line + b"\n" + line)
            texts.append(text)
        elif form == "tar":
            with tarfile.open(path, "w") as tar:
                item = tarfile.TarInfo("a.json")
                item.size = len(line)
                tar.addfile(item, io.BytesIO(line))
        elif form == "md.gz":
            path.write_bytes(gzip.compress(text.encode(), mtime=0))
        else:
            path.write_bytes(line if form == "json" else text.encode())
        texts.append(text)
    fraction = chosen(random, [0.0, 0.05, 0.5])
    options = BuildOptions(chosen(random, ["bytes", "bpe:300"]), fraction, seed=seed)
    with refusals_name(folder):
        built = build(folder / "in", folder / "out", options)
    ids = [one for split in ("train", "validation") for one in _stored(built.dataset, split)]
    require(all(one[-1] == built.dataset.eot for one in ids), "a document without its end")
    found = Counter(built.tokenizer.decode(one[:-1]) for one in ids)
    if len(texts) == 1 and fraction:  # cut into a part for each split
        require(sum(map(len, found)) == len(texts[0]), f"{found}, wanted {texts}")
        return
    require(found == Counter(texts), f"{found}, wanted {texts}")
    size = sum(split.text_bytes for split in built.dataset.splits.values())
    require(size == sum(len(text.encode()) for text in texts), f"{size} bytes of text")


def pairs(seed: int, folder: Path) -> None:
    """`data pairs` of a folder: each caption is there with its picture as the codec has it, or it is refused."""
    from PIL import Image

    random = np.random.default_rng(seed)
    (folder / "in").mkdir()
    wanted = {}
    for number in range(int(random.integers(2, 7))):
        shape = (4, 4, 3) if random.random() < 0.3 else (4, 4)
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "in" / f"{number}.png")
        caption = f"{number} {text_of_words(random)}".strip()
        wanted[caption] = pixels
        damaged = random.random() < 0.03
        data = caption.encode() if not damaged else mutated(caption.encode(), random)
        (folder / "in" / f"{number}.txt").write_bytes(data)
        if damaged:
            wanted.pop(caption)
            wanted[data.decode("utf-8-sig", "replace").strip()] = pixels
    options = PairOptions("patch:4:2", tokenizer="bytes", tasks=("text-to-image",), seed=seed)
    with refusals_name(folder):
        built = build_pairs(folder / "in", folder / "out", options)
    modalities, dataset = built.modalities, built.datasets["text-to-image"]
    vocabulary, codec = modalities.vocabulary, modalities.image
    assert codec is not None
    colour = any(pixels.ndim == 3 for pixels in wanted.values())
    require(codec.colours == (3 if colour else 1), "the colours are not those of all pictures")  # type: ignore[attr-defined]
    documents = [one for split in ("train", "validation") for one in _stored(dataset, split)]
    require(len(documents) == len(wanted), f"{len(documents)} documents of {len(wanted)} samples")
    for ids in documents:
        places = np.flatnonzero(ids >= vocabulary.first_special)
        caption = modalities.sample("text", ids[2 : places[2]])
        require(caption in wanted, f"{caption!r} is none of {list(wanted)}")
        seen = wanted[caption]
        seen = np.repeat(seen[..., None], 3, 2) if colour and seen.ndim == 2 else seen
        codes = modalities.code_ids("image", codec.encode([seen])[0], "x")
        require(ids[places[3] + 1 : places[4]].tolist() == codes.tolist(), f"another picture for {caption!r}")


FUZZERS = [Fuzzer("builds", builds), Fuzzer("pairs", pairs)]
