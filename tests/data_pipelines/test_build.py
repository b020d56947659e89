"""Building datasets from text, and reading them back: with our reader and with plain webdataset."""

import gzip
import json
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipelines.build import BuildOptions, build, build_from_files, cut_tail
from data_pipelines.demo import build_demo, library_files
from data_pipelines.documents import find_files
from data_pipelines.errors import DataError
from data_pipelines.lint import lint
from data_pipelines.rows import RowReader, Source, open_sources
from data_pipelines.shards import write_tar
from data_pipelines.stats import describe_split, sample_texts
from data_pipelines.tokenizers import load_tokenizer
from tests.data_pipelines.helpers import EOT, make_dataset, write_jsonl

TEXTS = [f"Document number {n}.\nIt says: {'ab ' * (n % 7)}ü.\n" for n in range(60)]
BYTES = BuildOptions(tokenizer="bytes")


def documents_of(folder: Path, split: str) -> list[str]:
    """All documents of a split, decoded."""
    sources = open_sources([Source(folder)], split)
    reader = RowReader(sources, sources[0].tokens, seed=0, shuffle=False)
    ids = reader.batch([0]).tokens[0].numpy()
    tokenizer = load_tokenizer(folder)
    ends = np.flatnonzero(ids == tokenizer.eot)
    return [tokenizer.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_every_document_lands_in_one_split(tmp_path, tokenizer):
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


def test_a_build_is_reproducible(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    options = BuildOptions("bpe:300")
    prints = {build(source, tmp_path / name, options).dataset.fingerprint for name in ("a", "b")}
    files = [(tmp_path / name / "train-000000.tar").read_bytes() for name in ("a", "b")]
    assert len(prints) == 1 and files[0] == files[1]


STALLED_BUILD = """
import sys, time
from data_pipelines.build import BuildOptions, build

def report(what, done, total):
    if what == "tokenising":
        print("ready", flush=True)
        time.sleep(60)

build(sys.argv[1], sys.argv[2], BuildOptions("bytes"), report)
"""


def test_a_build_removes_what_killed_ones_left_and_nothing_else(tmp_path):
    source, out = write_jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out"
    host = socket.gethostname()
    kept = {f".out.part-{host}-{os.getppid()}", ".out.part-elsewhere.example-1", f".out2.part-{host}-x"}
    for name in kept:
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", STALLED_BUILD, str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
    left = tmp_path / f".out.part-{host}-{process.pid}"
    assert left.is_dir() and not out.exists()
    assert build(source, out, BYTES).removed == [left]
    assert {path.name for path in tmp_path.glob(".out*")} == kept
    assert build(source, tmp_path / "other", BYTES).removed == []


def test_a_folder_of_files_of_all_kinds(tmp_path):
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
    assert built.skipped.counts == {"not UTF-8": 1, "binary": 1, "empty": 1}


def test_a_single_file_is_cut_into_train_and_validation(tmp_path):
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
def test_cut_tail_of_tiny_texts(text, parts):
    assert cut_tail(text, 0.3) == parts


@pytest.mark.parametrize("texts", [["a", "b"], ["same", "same"], ["x", "y", "z"]])
def test_few_documents_fill_both_splits(tmp_path, texts):
    build(write_jsonl(tmp_path / "in.jsonl", texts), tmp_path / "out", BYTES)
    train, held = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "validation")
    assert sorted(train + held) == sorted(texts) and train and held


def test_no_validation_split_if_none_is_wanted(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["a", "b"])
    built = build(source, tmp_path / "out", BuildOptions("bytes", validation_fraction=0))
    assert list(built.dataset.splits) == ["train"]
    with pytest.raises(DataError, match="'validation' does not exist"):
        open_sources([Source(tmp_path / "out")], "validation")


def test_an_output_folder_in_use_needs_force(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    build(source, tmp_path / "out", BYTES)
    with pytest.raises(DataError, match="--force"):
        build(source, tmp_path / "out", BYTES)
    build(source, tmp_path / "out", BuildOptions("bytes", force=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="will not delete"):
        build(source, tmp_path / "mine", BuildOptions("bytes", force=True))


def test_a_failed_build_leaves_nothing(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["a"] * 5)
    with source.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"in\.jsonl:6: not JSON"):
        build(source, tmp_path / "out", BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_interrupted_build_leaves_nothing(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)

    def interrupt(what, done, total):
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
def test_bad_lines_are_named(tmp_path, line, text):
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"in\.jsonl:3: .*{text}"):
        build(tmp_path / "in.jsonl", tmp_path / "out", BYTES)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        build(tmp_path / "none", tmp_path / "out", BYTES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        build(tmp_path / "empty", tmp_path / "out", BYTES)
    (tmp_path / "empty" / "a.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"no text found in 1 file.*1 binary"):
        build(tmp_path / "empty", tmp_path / "out", BYTES)


@pytest.mark.parametrize(
    "options", [BuildOptions("bytes", validation_fraction=1.0), BuildOptions("bytes", shard_megabytes=0)]
)
def test_options_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(DataError, match="must be"):
        build(write_jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out", options)


def test_raw_shards_are_tokenised(tmp_path):
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


def test_plain_webdataset_reads_our_shards(tmp_path):
    documents = make_dataset(tmp_path, [300_000, 50, 7, 270_000], seed=4)
    samples = list(webdataset.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False))
    tokens = np.concatenate([np.frombuffer(sample["tokens.u16"], "<u2") for sample in samples])
    lengths = np.concatenate([np.frombuffer(sample["lengths.u32"], "<u4") for sample in samples])
    assert np.array_equal(tokens, np.concatenate([np.append(document, EOT) for document in documents]))
    assert lengths.tolist() == [len(document) + 1 for document in documents]
    assert max(len(sample["tokens.u16"]) for sample in samples) == 2 * 262_144


def test_the_demo_corpus_is_this_pythons_library(tmp_path):
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
