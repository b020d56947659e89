"""Fuzzers of files of text: JSON lines, tars, folders of samples, captions.

Where a format has checksums, a changed fact is a finding; where it has none, what is read must at least be what the
changed file says, or be refused with the file's name.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.raw.documents import file_documents
from data_pipelines.raw.files import find_source
from data_pipelines.raw.report import Report, Tally
from data_pipelines.raw.samples import read_samples
from tests.fuzz.base import Fuzzer, chosen, mutated, refusals_name, require
from tests.fuzz.texts import DEEP, HALF, text_of_words


def jsonl(seed: int, folder: Path) -> None:
    """JSON lines against Python's own reader, line by line."""
    random = np.random.default_rng(seed)
    lines = [_json_line(random) for _ in range(int(random.integers(1, 8)))]
    data = b"\n".join(lines)
    if random.random() < 0.3:
        data = b"\xef\xbb\xbf" + data
    if random.random() < 0.3:
        data = data.replace(b"\n", b"\r\n")
    if random.random() < 0.2:
        data = mutated(data, random)
    packed = random.random() < 0.3
    path = folder / chosen(random, ["a.jsonl", "A.JSONL", "b.NdJson"])
    if packed:
        path = path.with_name(path.name + chosen(random, [".gz", ".GZ"]))
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    report = Report()
    with refusals_name(path):
        found = list(file_documents(path, report))
    wanted = _wanted_texts(data)
    require(found == [text for text in wanted if text.strip()], f"{found} of {data[:500]!r}")
    empty = sum(not text.strip() for text in wanted) if wanted else 1  # the file itself
    require(
        report.left_out.counts.get("empty", 0) == empty, f"{empty} empty ones, told {report.left_out.counts}"
    )


def _json_line(random: np.random.Generator) -> bytes:
    text = text_of_words(random, half=True)
    record: dict[str, Any] = {"text": text, "id": int(random.integers(9))}
    line = json.dumps(record, ensure_ascii=bool(random.integers(2)) or HALF in text)
    match int(random.integers(40)):
        case 0:
            return b""
        case 1:
            return f'{{"x": {DEEP}, "text": "a"}}'.encode()
        case 2:
            return b'{"text": "one", "text": "two"}'
        case 3:
            return f'{{"text": "a", "n": {"1" * 5000}}}'.encode()
        case 4:
            return chosen(
                random, [b"[1]", b"null", b'"text"', b'{"text": 1}', b'{"txt": "a"}', b"{", b"NaN", b"\0"]
            )
        case 5:
            return '{"text": "Größe"}'.encode("latin-1")
    return line.encode()


def _wanted_texts(data: bytes) -> list[str]:
    """What must have been read, since nothing was refused."""
    texts = []
    for number, line in enumerate(data.split(b"\n")):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        if line.strip():
            text = json.loads(line.decode("utf-8-sig"))["text"]
            texts.append(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return texts


def tars(seed: int, folder: Path) -> None:
    """Documents in tars: each member is a document, is counted as left out, or the tar is refused."""
    random = np.random.default_rng(seed)
    path = folder / chosen(random, ["a.tar", "A.TAR", "b.tar.gz", "b.TGZ"])
    packed = path.name.lower().endswith("gz")
    data, texts, others = _make_tar(random)
    damaged = random.random() < 0.5
    if packed:
        data = gzip.compress(data, mtime=0)
    if damaged:
        data = mutated(data, random)
    path.write_bytes(data)
    report = Report()
    with refusals_name(path):
        found = list(file_documents(path, report))
    if packed or not damaged:  # gzip has a checksum, a tar's data have none
        require(Counter(found) == Counter(texts), f"{found}, wanted {texts}")
        told = sum(report.left_out.counts.values())
        require(told == others, f"{others} members are no documents, told {report.left_out.counts}")


def _make_tar(random: np.random.Generator) -> tuple[bytes, list[str], int]:
    """A tar, the texts in it, and how many of its members are none."""
    file, texts, others = io.BytesIO(), list[str](), 0
    form = chosen(random, [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    names: list[tuple[str, str]] = []
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        long = "n" * (40 if form == tarfile.USTAR_FORMAT else 90) + "/" + "m" * 50 + "/"
        for number in range(int(random.integers(1, 8))):
            place = chosen(random, ["", "./", "deep/er/", "d.v1/", long])
            item, text = tarfile.TarInfo(f"{place}{number}"), f"text {number} {text_of_words(random)}"
            kind = int(random.integers(8))
            if kind == 0:
                item.type = tarfile.DIRTYPE
                tar.addfile(item)
            elif kind == 1 and names:
                target, linked = chosen(random, names)
                item.name, item.type, item.linkname = item.name + Path(target).suffix, tarfile.LNKTYPE, target
                tar.addfile(item)
                texts.append(linked)
            elif kind == 2:
                item.name, item.type, item.linkname = item.name + ".txt", tarfile.SYMTYPE, "nowhere.txt"
                tar.addfile(item)
                others += 1
            elif kind == 3:
                item.name, item.type = item.name + ".txt", chosen(random, [tarfile.FIFOTYPE, tarfile.CHRTYPE])
                tar.addfile(item)
                others += 1
            else:
                ending = chosen(random, [".txt", ".TXT", ".v2.txt", ".json", ".JSON", ".jpg", "", ".txt.zst"])
                item.name += ending
                data = json.dumps({"text": text}).encode() if "json" in ending.lower() else text.encode()
                item.size = len(data)
                tar.addfile(item, io.BytesIO(data))
                if ending.lower().endswith((".txt", ".json")):
                    texts.append(text)
                    names.append((item.name, text))
                else:
                    others += 1
    return file.getvalue(), texts, others


def folders(seed: int, folder: Path) -> None:
    """Samples in a tree of files and tars: each file is in a sample, is told, or something is refused."""
    random = np.random.default_rng(seed)
    count = _fill(random, folder / "in")
    left_out = Tally()
    with refusals_name(folder):
        source = find_source(folder / "in", None, left_out)
        samples = list(read_samples(source, left_out))
    there = sum(len(sample.files) for sample in samples) + sum(left_out.counts.values())
    require(there == count, f"{count} files, {there} in samples or told: {left_out.counts}")
    keys = Counter(sample.key for sample in samples if ".tar:" not in sample.where.lower())
    require(max(keys.values(), default=1) == 1, f"keys come twice: {keys}")


ENDINGS = (
    ".txt",
    ".png",
    ".TXT",
    ".PNG",
    ".jpg",
    ".wav",
    ".json",
    ".image.u16",
    ".v2.png",
    ".md",
    ".png.gz",
    ".zst",
    "",
)


def _fill(random: np.random.Generator, root: Path) -> int:
    """Files in a folder, its subfolders and a tar; returns how many there are to be read or told."""
    count = 0
    for place in (root, root / "sub", root / "d.v1"):
        place.mkdir(parents=True, exist_ok=True)
        for number in range(int(random.integers(1, 4))):
            for ending in {chosen(random, ENDINGS) for _ in range(3)}:
                (place / f"{number}{ending}").write_bytes(b"x")
    (root / ".hidden").write_bytes(b"x")
    (root / "link.txt").symlink_to(chosen(random, ["nowhere.txt", "0.txt"]))
    count = sum(not path.is_dir() for path in root.rglob("*"))
    if random.random() < 0.5:
        (root / "sub" / "folder").symlink_to(root / "d.v1")
        count += 1
    file, members = io.BytesIO(), 0
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(int(random.integers(1, 4))):
            for ending in sorted({chosen(random, ENDINGS) for _ in range(3)}):
                tar.addfile(tarfile.TarInfo(f"{number}{ending}"))
                members += 1
    (root / "a.TAR").write_bytes(file.getvalue())
    return count + members


def captions(seed: int, folder: Path) -> None:
    """A caption in .txt or .json: what is read is what stands there, blanks at its ends left out."""
    random = np.random.default_rng(seed)
    text = text_of_words(random, half=True)
    (folder / "a.png").write_bytes(b"x")
    if random.random() < 0.5:
        path = folder / chosen(random, ["a.txt", "a.TXT"])
        data = text.encode("utf-8", "replace")
    else:
        path = folder / chosen(random, ["a.json", "a.JSON"])
        record: dict[str, Any] = {chosen(random, ["caption", "text", "caption", "title"]): text}
        data = json.dumps(record).encode()
        data = chosen(
            random, [data, data, data, DEEP.encode(), b'{"caption": "a", "caption": "b"}', b"[]", b""]
        )
    if random.random() < 0.3:
        data = b"\xef\xbb\xbf" + data
    if random.random() < 0.4:
        data = mutated(data, random)
    path.write_bytes(data)
    with refusals_name(path):
        (sample,) = read_samples(find_source(folder))
        found = sample.caption()
    told: Any = data.decode("utf-8-sig")
    if path.suffix.lower() == ".json":
        record = json.loads(told)
        told = record.get("caption", record.get("text"))
    told = told.strip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    require(found == told and found != "", f"{found!r} of {data!r}")


FUZZERS = [
    Fuzzer("jsonl", jsonl),
    Fuzzer("tars", tars),
    Fuzzer("folders", folders),
    Fuzzer("captions", captions),
]
