"""Every kind of damage gets an answer that names the file and what to do, and lint finds it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.inspection.lint import lint, rebuild_indices
from data_pipelines.rows.cut_rows import RowReader, Source, open_sources
from data_pipelines.storage.dataset import open_dataset
from data_pipelines.storage.index import build_index, index_path, read_index
from data_pipelines.storage.shards import write_tar
from data_pipelines.storage.tar_walk import walk
from data_pipelines.tokens.tokenizer_loading import load_tokenizer
from tests.data_pipelines.helpers import make_dataset

SHARD = "train-000000.tar"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of equal layout, three samples each."""
    folder = tmp_path_factory.mktemp("original")
    make_dataset(folder, [200_000] * 6, shard_bytes=1_150_000, validation=2)
    return folder


def member(folder: Path, number: int) -> tuple[int, int]:
    """(offset of its header, offset of its data) of a member of the first shard."""
    index = read_index(index_path(folder / SHARD))
    return int(index.header_offset_N[number]), int(index.data_offset_N[number])


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def flip(path: Path, offset: int) -> None:
    """Flip one bit."""
    patch(path, offset, bytes([path.read_bytes()[offset] ^ 1]))


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_description(folder: Path) -> None:
    (folder / "dataset.json").unlink()


def no_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def no_index(folder: Path) -> None:
    index_path(folder / SHARD).unlink()


def empty_shard(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"")


def truncated_inside_data(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:700_001])


def truncated_at_a_member(folder: Path) -> None:
    header, _ = member(folder, 2)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:header])


def flipped_byte_in_data(folder: Path) -> None:
    flip(folder / SHARD, member(folder, 3)[1] + 1234)


def flipped_byte_near_the_start(folder: Path) -> None:
    flip(folder / SHARD, member(folder, 1)[1] + 50)


def flipped_byte_in_lengths(folder: Path) -> None:
    flip(folder / SHARD, member(folder, 4)[1] + 1)


def zeroed_header(folder: Path) -> None:
    patch(folder / SHARD, member(folder, 2)[0], bytes(512))


def index_of_another_shard(folder: Path) -> None:
    shutil.copy(index_path(folder / "train-000001.tar"), index_path(folder / SHARD))


def another_shard(folder: Path) -> None:
    shutil.copy(folder / "train-000001.tar", folder / SHARD)


def swapped_shards(folder: Path) -> None:
    for suffix in (".tar", ".idx"):
        one, two = folder / f"train-000000{suffix}", folder / f"train-000001{suffix}"
        one.rename(folder / "third")
        two.rename(one)
        (folder / "third").rename(two)


def bad_magic(folder: Path) -> None:
    patch(index_path(folder / SHARD), 0, b"NOTINDEX")


def newer_index(folder: Path) -> None:
    patch(index_path(folder / SHARD), 8, b"\x09")


def flipped_byte_in_index(folder: Path) -> None:
    flip(index_path(folder / SHARD), 120)


def flipped_byte_in_index_header(folder: Path) -> None:
    flip(index_path(folder / SHARD), 30)


def short_index(folder: Path) -> None:
    path = index_path(folder / SHARD)
    path.write_bytes(path.read_bytes()[:-8])


def edited_description(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    content["splits"]["train"]["shards"][0]["tokens"] += 1
    (folder / "dataset.json").write_text(json.dumps(content))


def other_version(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"version": 7}))


def no_json(folder: Path) -> None:
    (folder / "dataset.json").write_text("{")


def other_json(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"format": "something"}')


AT_OPENING: list[tuple[Callable[[Path], None], str]] = [
    (no_folder, r"no such dataset folder.*triptych data demo"),
    (no_description, r"dataset\.json: missing.*triptych data build"),
    (no_shard, r"train-000000\.tar: the shard is missing.*build"),
    (no_index, r"train-000000\.idx: the index is missing.*triptych data index"),
    (empty_shard, r"train-000000\.tar: the shard is empty"),
    (truncated_inside_data, r"train-000000\.tar: truncated: 700001 bytes, its index says \d+"),
    (truncated_at_a_member, r"train-000000\.tar: truncated"),
    (flipped_byte_near_the_start, r"train-000000\.tar: the data of member 1 .*bytes \d+ to \d+"),
    (index_of_another_shard, r"train-000000\.idx: this is the index of another shard.*data index"),
    (another_shard, r"train-000000\.tar: .*(another shard|is damaged)"),
    (swapped_shards, r"train-000000\.idx: this is the index of another shard"),
    (bad_magic, r"train-000000\.idx: not a shard index.*data index"),
    (newer_index, r"train-000000\.idx: index version 9.*version 1"),
    (flipped_byte_in_index_header, r"train-000000\.idx: the index header is damaged"),
    (short_index, r"train-000000\.idx: the index has \d+ bytes"),
    (edited_description, r"dataset\.json: its fingerprint does not fit"),
    (other_version, r"dataset\.json: format version 7"),
    (no_json, r"dataset\.json: cannot be read"),
    (other_json, r"dataset\.json: its format is 'something'"),
]
AT_FIRST_TOUCH: list[tuple[Callable[[Path], None], str]] = [
    (flipped_byte_in_data, r"train-000000\.tar: the data of member 3 \(\.tokens\.u16, bytes \d+ to \d+\)"),
    (flipped_byte_in_lengths, r"train-000000\.tar: the data of member 4 \(\.lengths\.u32"),
    (zeroed_header, r"train-000000\.tar: the tar header of member 2 "),
    (flipped_byte_in_index, r"train-000000\.idx: the index is damaged.*data index"),
]


def test_an_undamaged_dataset_has_no_problems(original: Path) -> None:
    assert lint(original) == []
    assert open_dataset(original).splits["train"].documents == 6


@pytest.mark.parametrize(("damage", "message"), AT_OPENING, ids=lambda value: getattr(value, "__name__", ""))
def test_damage_seen_at_opening(
    tmp_path: Path, original: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(original, folder)
    damage(folder)
    with pytest.raises(DataError, match=f"(?s){message}"):
        open_sources([Source(folder)])
    try:
        assert lint(folder)
    except DataError as error:
        assert damage is no_folder and "no such dataset folder" in str(error)


@pytest.mark.parametrize(
    ("damage", "message"), AT_FIRST_TOUCH, ids=lambda value: getattr(value, "__name__", "")
)
def test_damage_seen_when_a_member_is_first_read(
    tmp_path: Path, original: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(original, folder)
    damage(folder)
    reader = RowReader(open_sources([Source(folder)]), 50_000, seed=0)
    with pytest.raises(DataError, match=message):
        reader.batch(range(24))
    assert any(SHARD[:12] in str(problem.path) for problem in lint(folder))


def test_lint_reports_all_problems(tmp_path: Path, original: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(original, folder)
    flip(folder / SHARD, member(folder, 1)[1] + 9)
    zeroed_header(folder)
    flipped_byte_in_data(folder)
    truncated = folder / "train-000001.tar"
    truncated.write_bytes(truncated.read_bytes()[:900_000])
    text = "\n".join(map(str, lint(folder)))
    for part in ("member 1 ", "member 2 ", "member 3 ", "train-000001.tar: truncated", "beyond the end"):
        assert part in text


def test_lint_checks_the_tokens_themselves(tmp_path: Path) -> None:
    make_dataset(tmp_path, [5, 6])
    shard = tmp_path / SHARD
    index = read_index(index_path(shard))
    at = int(index.data_offset_N[1])
    patch(shard, at, np.asarray([999], "<u2").tobytes())  # outside the vocabulary
    patch(shard, at + 10, np.asarray([7], "<u2").tobytes())  # was the end of document 0
    patch(shard, at + 16, np.asarray([256], "<u2").tobytes())  # inside document 1
    index_path(shard).write_bytes(build_index(shard))
    text = "\n".join(map(str, lint(tmp_path)))
    assert "1 ids outside the vocabulary of 257, the first is 999" in text
    assert "1 documents do not end in id 256" in text and "1 end-of-text ids inside documents" in text


def test_rebuilding_an_index_gives_the_same_bytes(tmp_path: Path, original: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(original, folder)
    wanted = {path.name: path.read_bytes() for path in folder.glob("*.idx")}
    for name in wanted:
        (folder / name).unlink()
    assert rebuild_indices(folder) == 3
    assert {path.name: path.read_bytes() for path in folder.glob("*.idx")} == wanted


def test_an_index_is_not_rebuilt_over_damage(tmp_path: Path, original: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(original, folder)
    flipped_byte_in_data(folder)
    with pytest.raises(DataError, match=r"not what dataset\.json was written for"):
        rebuild_indices(folder)
    assert lint(folder)


def test_datasets_of_different_tokenizers_are_not_mixed(tmp_path: Path, original: Path) -> None:
    make_dataset(tmp_path / "other", [5])
    content = json.loads((tmp_path / "other" / "dataset.json").read_text())
    other = "f" * 64
    from data_pipelines.storage.dataset import _fingerprint

    content["tokenizer"]["fingerprint"] = other
    content["fingerprint"] = _fingerprint(content)
    (tmp_path / "other" / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"(?s){other[:12]}.*--tokenizer"):
        open_sources([Source(original), Source(tmp_path / "other")])
    with pytest.raises(DataError, match=r"tokenizer\.json was changed"):
        load_tokenizer(tmp_path / "other")


def test_an_empty_split_is_refused(tmp_path: Path, original: Path) -> None:
    with pytest.raises(DataError, match=r"'test' does not exist \(splits with data: train, validation\)"):
        open_sources([Source(original)], "test")
    with pytest.raises(DataError, match="no dataset given"):
        open_sources([])


def test_walk_reads_long_names_and_rejects_a_bad_checksum(tmp_path: Path) -> None:
    path = tmp_path / "long.tar"
    name = "folder/" * 20 + "x" * 60
    write_tar(path, [{"__key__": name, "a.b": b"1"}, {"__key__": "ü", "txt": b"2"}])
    data = path.read_bytes()
    members = list(walk(path, data))
    assert [m.name for m in members] == [name + ".a.b", "ü.txt"]
    assert (members[0].key, members[0].extension) == (name, "a.b")
    damaged = bytearray(data)
    damaged[3] ^= 1
    with pytest.raises(DataError, match="checksum is wrong at byte 0"):
        list(walk(path, bytes(damaged)))
