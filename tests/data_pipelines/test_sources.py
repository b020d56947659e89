"""What comes in: nothing of a source vanishes without a word, whatever it is packed in and called."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.prepare.pair_options import PairOptions
from data_pipelines.prepare.pairs import BuiltPairs, build_pairs
from data_pipelines.prepare.text import BuildOptions, build
from data_pipelines.raw.documents import file_documents
from data_pipelines.raw.files import find_source, raw_files
from data_pipelines.raw.report import Report, Tally
from tests.data_pipelines.helpers import write_jsonl
from tests.data_pipelines.test_command import run

HIDDEN = "hidden (a name that begins with a dot)"
DOTS = "with a dot before the ending, which a KEY must not have (rename them)"
PAIRS = PairOptions(tokenizer="bytes", image_codec="patch:8:2")


def tar_of(path: Path, members: list[tuple[str, bytes]], **links: tuple[bytes, str]) -> Path:
    """A tar of files, in this order, then of links: name = (kind, target)."""
    with tarfile.open(path, "w:gz" if path.name.lower().endswith("gz") else "w") as tar:
        for name, data in members:
            item = tarfile.TarInfo(name)
            item.size = len(data)
            tar.addfile(item, io.BytesIO(data))
        for name, (kind, target) in links.items():
            item = tarfile.TarInfo(name.replace("_", "."))
            item.type, item.linkname = kind, target
            tar.addfile(item)
    return path


def png(value: int, colour: bool = True) -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (4, 4, 3) if colour else (4, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sample(key: str, number: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(number)), (f"{key}.txt", f"picture {key}".encode())]


def samples(*keys: str) -> list[tuple[str, bytes]]:
    return [member for number, key in enumerate(keys) for member in sample(key, number)]


def put(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    for name, data in members:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def texts_of(path: Path, report: Report | None = None) -> list[str]:
    return list(file_documents(path, report or Report()))


def documents(built: BuiltPairs) -> int:
    return sum(split.documents for split in built.datasets["text-to-image"].splits.values())


@pytest.mark.parametrize("name", ["DATA.JSONL", "data.Ndjson", "DATA.JSONL.GZ"])
def test_endings_count_in_any_case(tmp_path: Path, name: str) -> None:
    data = b"".join(json.dumps({"text": f"text {n}"}).encode() + b"\n" for n in range(5))
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    assert texts_of(tmp_path / name) == [f"text {n}" for n in range(5)]


def test_json_files_are_objects_or_lists_of_them_as_in_a_tar(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}]')
    (tmp_path / "b.JSON").write_text('{"text": "three", "url": "x"}')
    assert [*texts_of(tmp_path / "a.json"), *texts_of(tmp_path / "b.JSON")] == ["one", "two", "three"]
    tar = tar_of(
        tmp_path / "c.tar",
        [("a.json", b'[{"text": "one"}, {"text": "two"}]'), ("b.jsonl", b'{"text": "x"}\n')],
    )
    assert texts_of(tar) == ["one", "two", "x"]
    (tmp_path / "d.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(DataError, match=r"d\.json: not JSON \(Extra data.* call it \.jsonl"):
        texts_of(tmp_path / "d.json")
    (tmp_path / "e.json").write_text('[{"text": "one"}, {"txt": "two"}]')
    with pytest.raises(DataError, match=r'e\.json, element 1: no string "text"'):
        texts_of(tmp_path / "e.json")


def test_lines_end_with_a_line_feed_alone_and_may_begin_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a\u2028b\u0085c"}\r\n\n{"text": "d"}'.encode())
    assert texts_of(tmp_path / "a.jsonl") == ["a\u2028b\u0085c", "d"]
    (tmp_path / "b.jsonl").write_text('{"text": "a", "text": "b"}')
    with pytest.raises(DataError, match=r'b\.jsonl:1: the key "text" stands in it twice'):
        texts_of(tmp_path / "b.jsonl")


@pytest.mark.parametrize("ending", ["tar", "TAR", "tar.gz", "TGZ"])
def test_links_in_tars_are_read_or_told(tmp_path: Path, ending: str) -> None:
    links = {
        "b_txt": (tarfile.LNKTYPE, "a.txt"),
        "d_txt": (tarfile.SYMTYPE, "./c.txt"),
        "e_txt": (tarfile.SYMTYPE, "no"),
    }
    more = {
        "f_txt": (tarfile.SYMTYPE, "d.txt"),
        "g_txt": (tarfile.SYMTYPE, "g.txt"),
        "h_txt": (tarfile.FIFOTYPE, ""),
    }
    path = tar_of(tmp_path / f"a.{ending}", [("a.txt", b"one"), ("c.txt", b"two")], **links, **more)
    report = Report()
    assert texts_of(path, report) == ["one", "two", "one", "two", "two"]
    assert report.left_out.counts == {"links to no file in their tar": 2, "no file but a pipe": 1}
    assert report.left_out.examples["links to no file in their tar"].endswith(":e.txt")


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_members_are_read_with_their_holes(tmp_path: Path, form: str) -> None:
    path = tmp_path / "sparse.txt"
    with path.open("wb") as file:
        file.write(b"begin" * 100)
        for place in range(1, 60):  # more parts than fit into one header
            file.seek(place * 20_000)
            file.write(b"part %d " % place)
    (tmp_path / "z.txt").write_text("the next member")
    command = [
        "tar",
        "--sparse",
        f"--format={form}",
        "-C",
        str(tmp_path),
        "-cf",
        str(tmp_path / "a.tar"),
        "sparse.txt",
        "z.txt",
    ]
    if subprocess.run(command).returncode:
        pytest.fail("this needs GNU tar")
    assert (tmp_path / "a.tar").stat().st_size < path.stat().st_size, "stored without its holes"
    found = [raw.read() for raw in raw_files(tmp_path / "a.tar", tmp_path, Tally())]
    assert found == [path.read_bytes(), b"the next member"]


def test_names_in_tars(tmp_path: Path) -> None:
    members = [
        ("./d.v1/0.txt", b"a"),
        ("./d.v1/._0.txt", b"\0"),
        ("./d.v1/1.TXT", b"b"),
        ("./d.v1/p.v2.txt", b"c"),
    ]
    path = tar_of(
        tmp_path / "a.tar", [*members, ("./d.v1/3.JSON", b'{"text": "d"}'), ("x.zst", b"e"), ("y.jpg", b"f")]
    )
    report = Report()
    assert texts_of(path, report) == ["a", "b", "c", "d"]
    assert report.left_out.counts == {
        HIDDEN: 1,
        "packed in a form that is not read (.zst; unpack them, or use gzip)": 1,
        "not text (.jpg)": 1,
    }


def test_every_file_of_a_folder_is_read_or_told(tmp_path: Path) -> None:
    folder = put(
        tmp_path / "in", [("a.txt", b"a"), (".git/b.txt", b"b"), (".c.txt", b"c"), ("e.txt.xz", b"e")]
    )
    (folder / "nowhere.txt").symlink_to("gone")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "alias.txt").symlink_to("a.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "utf16.txt").write_text("b", encoding="utf-16")
    built = build(folder, tmp_path / "out", BuildOptions("bytes"))
    assert sum(split.documents for split in built.dataset.splits.values()) == 2
    assert built.skipped.counts == {
        HIDDEN: 2,
        "links to nothing, or to no file": 1,
        "links to a folder (not followed)": 1,
        "not a file (a pipe, a socket or a device)": 1,
        "packed in a form that is not read (.xz; unpack them, or use gzip)": 1,
        "not UTF-8 but UTF-16": 1,
    }
    assert any("left out: 2 hidden" in line and "for example" in line for line in built.report.lines())
    with pytest.raises(
        DataError, match=r"--strict(.|\n)*links to nothing, or to no file, for example .*nowhere\.txt"
    ):
        build(folder, tmp_path / "strict", BuildOptions("bytes", strict=True))
    assert not (tmp_path / "strict").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in" / "shut").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "shut").chmod(0)
    with pytest.raises(DataError, match="shut: the folder cannot be read"):
        find_source(tmp_path / "in")


def test_a_command_tells_what_is_left_out_and_strict_refuses(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", [*samples("a", "b", "c"), ("d.v2.png", png(9)), ("readme.md", b"x")])
    text = run(
        "pairs", folder, "--out", tmp_path / "out", "--tokenizer", "bytes", "--image-codec", "patch:8:2"
    )
    assert f"left out: 1 {DOTS}, for example {folder}/d.v2.png" in text
    assert "left out: 1 neither caption nor image, sound or codes (.md)" in text
    assert "image after the codec: PSNR" in text
    with pytest.raises(DataError, match=r"--strict(.|\n)*d\.v2\.png"):
        build_pairs(folder, tmp_path / "out2", PairOptions(**{**vars(PAIRS), "strict": True}))


def test_keys_have_their_folder(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", samples(*(f"{n:03d}/image" for n in range(8))))
    built = build_pairs(folder, tmp_path / "out", PAIRS)
    counts = {name: split.documents for name, split in built.datasets["text-to-image"].splits.items()}
    assert sum(counts.values()) == 8 and min(counts["train"], counts["validation"]) >= 1


def test_samples_that_all_have_one_key_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        tar_of(tmp_path / "in" / f"{name}.tar", samples("sample"))
    with pytest.raises(DataError, match="all 3 samples have the key 'sample'"):
        build_pairs(tmp_path / "in", tmp_path / "out", PAIRS)


def test_tars_packed_or_not_and_loose_files_are_all_read(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", samples("x", "y"))
    tar_of(folder / "a.tar", samples("a0", "a1", "a2"))
    tar_of(folder / "b.tar.gz", samples("b0", "b1"))
    tar_of(folder / "c.TGZ", samples("c0"))
    built = build_pairs(folder, tmp_path / "out", PAIRS)
    assert documents(built) == 8 and built.report.left_out.counts == {}
    assert built.found.describe() == "read 6 sample(s) of 3 tar(s) and 2 of loose files beside them"


def test_second_files_of_a_sample_are_told_and_equal_names_refused(tmp_path: Path) -> None:
    folder = put(
        tmp_path / "in", [*samples("a", "b"), ("a.jpg", b"x"), ("b.json", b"{}"), ("b.image.u16", b"xx")]
    )
    built = build_pairs(folder, tmp_path / "out", PAIRS)
    assert documents(built) == 2 and built.report.left_out.counts == {
        "a second image of a sample (.png is taken, not .jpg)": 1,
        "a second caption of a sample (.txt is taken, not .json)": 1,
        "a second image of a sample (.png is taken, not .image.u16)": 1,
    }
    put(folder, [("a.PNG", png(3))])
    with pytest.raises(DataError, match=r"a\.png: key a has two files \.png, the other is .*a\.PNG"):
        build_pairs(folder, tmp_path / "out2", PAIRS)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (samples("5", "6") + samples("6"), r"a\.tar:6\.png: key 6 has two files \.png"),
        (
            [*sorted(samples("0", "1", "2"), key=lambda m: m[0][-3:])],
            r"the files of key 0 do not stand next to each other",
        ),
        (
            samples("0", "1") + samples("0"),
            r"the files of key 0 do not stand next to each other.*--sort=name",
        ),
    ],
)
def test_tars_whose_samples_are_not_whole(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    tar_of(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        build_pairs(tmp_path / "a.tar", tmp_path / "out", PAIRS)


def test_samples_that_the_tasks_do_not_need_are_told(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", [*samples("a", "b"), ("c.txt", b"c"), ("c.audio.u16", b"xx")])
    options = PairOptions(**{**vars(PAIRS), "tasks": ("text-to-image",)})
    built = build_pairs(folder, tmp_path / "out", options)
    assert documents(built) == 2 and built.report.left_out.counts == {
        "without what --tasks text-to-image needs": 1
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[" * 100_000, r"a\.json: JSON nested too deep"),
        ("a.json", b'{"caption": "x", "caption": "y"}', r'a\.json: the key "caption" stands in it twice'),
        ("a.json", b"\xff", r"a\.json: not UTF-8"),
        ("a.txt", b"\xff", r"a\.txt: a caption that is not UTF-8"),
    ],
)
def test_damaged_captions_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    put(tmp_path / "in", [*samples("b", "c"), ("a.png", png(1)), (name, content)])
    with pytest.raises(DataError, match=message):
        build_pairs(tmp_path / "in", tmp_path / "out", PAIRS)


def test_half_a_surrogate_pair_in_a_caption_is_told(tmp_path: Path) -> None:
    caption = json.dumps({"caption": " a \ud800 b \U0001f600 "}).encode()
    put(tmp_path / "in", [*samples("b", "c"), ("a.png", png(1)), ("a.json", b"\xef\xbb\xbf" + caption)])
    built = build_pairs(tmp_path / "in", tmp_path / "out", PAIRS)
    assert built.report.changed.counts == {"with half a surrogate pair, which became U+FFFD": 1}
    assert built.text_slot == len("a \ufffd b \U0001f600".encode()) + 1


def test_shards_are_told_apart_from_other_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "b.jsonl", ["one"])
    tar_of(tmp_path / "in" / "a.TAR", [("a.txt", b"one"), ("b.txt", b"two")])
    text = run("tokenize", tmp_path / "in", "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert "left out: 1 no tar shard" in text and "b.jsonl" in text


def test_files_that_hold_no_document_are_told(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", [("a.jsonl", b'{"text": "one"}\n'), ("b.jsonl", b""), ("c.json", b"[]")])
    put(folder, [("d.JSONL", b"\n \n"), ("e.txt", b"")])
    tar_of(folder / "f.tar", [])
    report = Report()
    assert [text for path in find_source(folder).files for text in texts_of(path, report)] == ["one"]
    assert report.left_out.counts == {"empty": 4, "tars with nothing in them": 1}


def test_a_member_that_a_later_one_replaces_is_told(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "t.tar", [("a.txt", b"old"), ("b.txt", b"b"), ("./a.txt", b"new")])
    report = Report()
    assert texts_of(path, report) == ["b", "new"]
    (line,) = report.lines()
    assert "1 replaced by a later member" in line and line.endswith("t.tar:a.txt")


def test_what_was_left_out_stands_beside_a_half_sample(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", [*samples("a", "b"), ("k.txt", b"caption"), ("k.v2.png", png(3))])
    with pytest.raises(DataError, match=r"(?s)k.txt: a caption without an image.*with a dot.*k.v2.png"):
        build_pairs(folder, tmp_path / "out", PairOptions(image_codec="patch:8:2", tokenizer="bytes"))
