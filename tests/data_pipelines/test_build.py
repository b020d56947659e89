"""Building datasets from text, and reading them back: with our reader and with plain webdataset."""

import gzip
import io
import json
import os
import socket
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import webdataset

from data_pipelines.errors import DataError
from data_pipelines.inspection.lint import lint
from data_pipelines.inspection.stats import describe_split, sample_texts
from data_pipelines.prepare import text as build_module
from data_pipelines.prepare.demo import build_demo, library_files
from data_pipelines.prepare.text import BuildOptions, build, build_from_files, cut_tail
from data_pipelines.raw.documents import find_files
from data_pipelines.rows.cut_rows import RowReader, Source, open_sources
from data_pipelines.storage.shards import write_tar
from data_pipelines.tokens.tokenizer_loading import load_tokenizer
from tests.data_pipelines.helpers import EOT, make_dataset, write_jsonl

TEXTS = [f"Document number {n}.\nIt says: {'ab ' * (n % 7)}ü.\n" for n in range(60)]
BYTES = BuildOptions(tokenizer="bytes")


def documents_of(folder: Path, split: str) -> list[str]:
    """All documents of a split, decoded."""
    sources = open_sources([Source(folder)], split)
    reader = RowReader(sources, sources[0].tokens, seed=0, shuffle=False)
    ids = reader.batch([0]).targets[0].numpy()
    tokenizer = load_tokenizer(folder)
    ends = np.flatnonzero(ids == tokenizer.eot)
    return [tokenizer.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_every_document_lands_in_one_split(tmp_path: Path, tokenizer: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    options = BuildOptions(tokenizer, validation_fraction=0.2, shard_megabytes=0.0005)
    built = build(source, tmp_path / "out", options)
    train, held = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "validation")
    assert sorted(train + held) == sorted(TEXTS) and 3 < len(held) < 25
    assert train == [text for text in TEXTS if text in set(train)]
    assert lint(tmp_path / "out") == []
    assert len(built.dataset.splits["train"].shards) > 2
    assert built.dataset.splits["train"].text_bytes == sum(len(text.encode()) for text in train)
    assert not list(tmp_path.glob(".out*"))


def test_a_build_is_reproducible(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    options = BuildOptions("bpe:300")
    prints = {build(source, tmp_path / name, options).dataset.fingerprint for name in ("a", "b")}
    files = [(tmp_path / name / "train-000000.tar").read_bytes() for name in ("a", "b")]
    assert len(prints) == 1 and files[0] == files[1]


STALLED_BUILD = """
import sys, time
from data_pipelines.prepare.text import BuildOptions, build

def report(what, done, total):
    if what == "tokenising":
        print("ready", flush=True)
        time.sleep(60)

build(sys.argv[1], sys.argv[2], BuildOptions("bytes"), report)
"""


def test_a_build_removes_what_killed_ones_left_and_nothing_else(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out"
    host = socket.gethostname()
    kept = {f".out.part-{host}-{os.getppid()}", ".out.part-elsewhere.example-1", f".out2.part-{host}-x"}
    for name in kept:
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", STALLED_BUILD, str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.kill()
    left = tmp_path / f".out.part-{host}-{process.pid}"
    assert left.is_dir() and not out.exists()
    assert build(source, out, BYTES).removed == [left]
    assert {path.name for path in tmp_path.glob(".out*")} == kept
    assert build(source, tmp_path / "other", BYTES).removed == []


def test_a_folder_of_files_of_all_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b.md").write_text("# Title\n")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (folder / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (folder / "image.bin").write_bytes(b"\0\1\2")
    (folder / "empty.txt").write_text(" \n")
    (folder / ".hidden.txt").write_text("no")
    write_jsonl(folder / "c.jsonl", ["one", "two"])
    with gzip.open(folder / "d.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "three \ud83d\ude00 \ud800", "id": 4}) + "\n\n")
    built = build(folder, tmp_path / "out", BYTES)
    texts = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "validation")
    assert sorted(texts) == sorted(["# Title\n", "marked", "one", "two", "three \U0001f600 \ufffd"])
    hidden = "hidden (a name that begins with a dot)"
    assert built.skipped.counts == {"not UTF-8": 1, "binary": 1, "empty": 1, hidden: 1}


def test_a_single_file_is_cut_into_train_and_validation(tmp_path: Path) -> None:
    text = "".join(f"line {n} of a small file\n" for n in range(80))
    (tmp_path / "in.txt").write_text(text)
    build(tmp_path / "in.txt", tmp_path / "out", BuildOptions("bpe:8192"))
    train, held = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "validation")
    assert train[0] + held[0] == text and len(train) == len(held) == 1
    assert train[0].endswith("\n") and 0.02 < len(held[0]) / len(text) < 0.15


@pytest.mark.parametrize(
    ("text", "parts"),
    [("ab", ("a", "b")), ("a", ("a", "")), ("x" * 70 + "\n" + "y" * 30, ("x" * 70 + "\n", "y" * 30))],
)
def test_cut_tail_of_tiny_texts(text: str, parts: tuple[str, ...]) -> None:
    assert cut_tail(text, 0.3) == parts


@pytest.mark.parametrize("texts", [["a", "b"], ["same", "same"], ["x", "y", "z"]])
def test_few_documents_fill_both_splits(tmp_path: Path, texts: list[str]) -> None:
    build(write_jsonl(tmp_path / "in.jsonl", texts), tmp_path / "out", BYTES)
    train, held = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "validation")
    assert sorted(train + held) == sorted(texts) and train and held


def test_no_validation_split_if_none_is_wanted(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a", "b"])
    built = build(source, tmp_path / "out", BuildOptions("bytes", validation_fraction=0))
    assert list(built.dataset.splits) == ["train"]
    with pytest.raises(DataError, match="'validation' does not exist"):
        open_sources([Source(tmp_path / "out")], "validation")


def test_an_output_folder_in_use_needs_force(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    build(source, tmp_path / "out", BYTES)
    with pytest.raises(DataError, match="--force"):
        build(source, tmp_path / "out", BYTES)
    build(source, tmp_path / "out", BuildOptions("bytes", force=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="will not delete"):
        build(source, tmp_path / "mine", BuildOptions("bytes", force=True))


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a"] * 5)
    with source.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"in\.jsonl:6: not JSON"):
        build(source, tmp_path / "out", BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "tokenising" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "out", BYTES, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("[1]", "found: list"),
        ('{"txt": "a"}', "found: txt"),
        ('{"text": 3}', "found: text"),
        ("{", "not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, text: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"in\.jsonl:3: .*{text}"):
        build(tmp_path / "in.jsonl", tmp_path / "out", BYTES)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        build(tmp_path / "none", tmp_path / "out", BYTES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        build(tmp_path / "empty", tmp_path / "out", BYTES)
    (tmp_path / "empty" / "a.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"no text found in 1 file.*1 binary"):
        build(tmp_path / "empty", tmp_path / "out", BYTES)


@pytest.mark.parametrize(
    "options",
    [
        {"validation_fraction": 1.0},
        {"validation_fraction": float("nan")},
        {"shard_megabytes": 0},
        {"shard_megabytes": float("nan")},
        {"shard_megabytes": float("inf")},
        {"seed": 2**63},
        {"seed": -(2**64)},
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_read(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match="must be"):
        build(tmp_path / "no such file", tmp_path / "out", BuildOptions("bytes", **options))


@pytest.mark.parametrize("megabytes", [float("nan"), float("inf"), 0, -1])
def test_a_demo_of_no_size_is_refused(tmp_path: Path, megabytes: float) -> None:
    with pytest.raises(DataError, match="--megabytes"):
        build_demo(tmp_path / "demo", BYTES, megabytes)


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "n" * 300, ".."])
def test_an_output_folder_that_cannot_be_made_is_refused_before_the_survey(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(DataError, match="choose another --out"):
        build(source, tmp_path / place, BYTES, lambda what, done, total: pytest.fail(what))


def test_the_output_folder_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)
    for force in (False, True):
        built = build(tmp_path / "in", tmp_path / "in" / "out", BuildOptions("bytes", force=force))
        assert sum(split.documents for split in built.dataset.splits.values()) == len(TEXTS)
        assert built.skipped.counts == {}
    with pytest.raises(DataError, match="the same folder"):
        build(tmp_path / "in", tmp_path / "in", BYTES)


def test_a_dataset_moved_away_by_a_killed_build_is_put_back(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out"
    before = build(source, out, BYTES).dataset.fingerprint
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait(timeout=30)
    old = tmp_path / f".out.old-{socket.gethostname()}-{ended.pid}"
    out.rename(old)
    with pytest.raises(DataError, match="--force"):
        build(source, out, BYTES)
    assert open_sources([Source(out)])[0].dataset.fingerprint == before and not old.exists()
    old.mkdir()  # the build was killed while it deleted the old dataset
    assert build(source, out, BuildOptions("bytes", force=True)).removed == [old]


def test_a_long_document_is_sampled_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "SAMPLE_EXCERPT", 1000)
    monkeypatch.setattr(build_module, "SAMPLE_CHARACTERS", 20_000)
    (tmp_path / "in.txt").write_text("a" * 5000 + "".join(f" {letter * 9}" for letter in "bcdef") * 2000)
    tokenizer = build(tmp_path / "in.txt", tmp_path / "out", BuildOptions("bpe:300")).tokenizer
    assert len(tokenizer.encode(" bbbbbbbbb fffffffff")) == 2
    texts = [*(f"{letter * 8}!" for letter in "ghijk"), "x" * 50_000]
    monkeypatch.setattr(build_module, "SAMPLE_CHARACTERS", 1100)
    survey = build_module.Survey()
    for mark, text in enumerate(texts):
        survey.add_sample(mark, text)
        survey.documents += 1
    assert build_module._training_texts(survey) == [*texts[:5], "x" * 1000]


def test_a_vocabulary_that_falls_short_is_told(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    short = build(source, tmp_path / "short", BuildOptions("bpe:5000"))
    assert "ids instead of 5,000" in short.vocabulary_shortfall
    for name, spec in (("full", "bpe:260"), ("bytes", "bytes")):
        assert build(source, tmp_path / name, BuildOptions(spec)).vocabulary_shortfall == ""


def flipped_gzip(data: bytes) -> bytes:
    packed = bytearray(gzip.compress(data, mtime=0))  # a time would give the workers different parameters
    packed[12:20] = b"\xff" * 8
    return bytes(packed)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.gz", flipped_gzip(b"text " * 99), r"a\.txt\.gz: damaged gzip"),
        ("a.jsonl.gz", flipped_gzip(b'{"text": "a"}\n' * 99), r"a\.jsonl\.gz: damaged gzip"),
        ("a.tar.gz", flipped_gzip(b"x" * 999), r"a\.tar\.gz: damaged gzip"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1: JSON nested too deep"),
        ("a.jsonl", b"1" * 5000, r"a\.jsonl:1: not JSON"),
    ],
)
def test_damaged_sources_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        build(tmp_path / name, tmp_path / "out", BYTES)


def test_documents_without_text_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", ["one", "two", " \n"])
    write_tar(tmp_path / "in" / "b.tar", [{"__key__": "0", "json": b'{"text": ""}', "txt": b" "}])
    assert build(tmp_path / "in", tmp_path / "out", BYTES).skipped.counts == {"empty": 3}


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz"])
def test_tars_with_gnu_names_that_are_not_utf8_are_read_packed_or_not(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    mode: Literal["w", "w:gz"] = "w" if ending == "tar" else "w:gz"
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("é" * 150 + ".txt", "é" * 150 + ".jpg"):
            item = tarfile.TarInfo(name)
            item.size = 5
            tar.addfile(item, io.BytesIO(b"hello"))
    built = build(path, tmp_path / "out", BYTES)
    assert built.skipped.counts == {"not text (.jpg)": 1}
    built.skipped.names[0].encode()  # can be printed


def test_raw_shards_are_tokenised(tmp_path: Path) -> None:
    samples = [
        {"__key__": f"{n:06d}", "json": json.dumps({"text": text}).encode()} for n, text in enumerate(TEXTS)
    ]
    samples.append({"__key__": "000099", "txt": b"plain", "jpg": b"\xff"})
    (tmp_path / "raw").mkdir()
    write_tar(tmp_path / "raw" / "a.tar", samples)
    built = build_from_files(find_files(tmp_path / "raw"), tmp_path / "out", BYTES)
    texts = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "validation")
    assert sorted(texts) == sorted([*TEXTS, "plain"])
    assert built.skipped.counts == {"not text (.jpg)": 1}


def test_plain_webdataset_reads_our_shards(tmp_path: Path) -> None:
    documents = make_dataset(tmp_path, [300_000, 50, 7, 270_000], seed=4)
    samples = list(webdataset.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False))
    tokens = np.concatenate([np.frombuffer(sample["tokens.u16"], "<u2") for sample in samples])
    lengths = np.concatenate([np.frombuffer(sample["lengths.u32"], "<u4") for sample in samples])
    assert np.array_equal(tokens, np.concatenate([np.append(document, EOT) for document in documents]))
    assert lengths.tolist() == [len(document) + 1 for document in documents]
    assert max(len(sample["tokens.u16"]) for sample in samples) == 2 * 262_144


def test_the_demo_corpus_is_this_pythons_library(tmp_path: Path) -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    files = library_files(1.0)
    assert files == library_files(1.0) and all(path.is_relative_to(folder) for path in files)
    assert not any("site-packages" in path.parts for path in files)
    assert sum(path.stat().st_size for path in files) <= 1e6
    built = build_demo(tmp_path / "demo", BuildOptions("bpe:512"), 1.0)
    figures = describe_split(built.dataset, "train")
    assert figures.bytes_per_token > 1.5 and sum(n for _, _, n in figures.histogram) == figures.documents
    texts = sample_texts(built.dataset, built.tokenizer, "train", 3)
    assert len(texts) == 3 and all(texts)
