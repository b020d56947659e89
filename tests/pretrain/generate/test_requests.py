"""From a request to a canvas and back; files of pictures and sounds; how long targets are."""

from __future__ import annotations

import wave
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.codecs import PatchCodec, SpectralCodec
from data_pipelines.codecs.spectral import Frames
from data_pipelines.rows.pair_lengths import TargetLengths
from data_pipelines.stream.batch import Batch, Cursor
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.modalities import Modalities, combine
from data_pipelines.tokens.tokenizer_training import word_tokenizer
from pretrain.errors import UserError
from pretrain.generate.documents import documents_of
from pretrain.generate.lengths import (
    CaptionLengths,
    count_lengths,
    draw_length,
    load_caption_lengths,
    load_lengths,
    save_lengths,
    usual_length,
)
from pretrain.generate.media import contact_sheet, read_image, read_sound, write_image, write_sound
from pretrain.generate.requests import Requests

WORDS = ["one", "two", "three", "plus", "equals"]
LENGTHS = {"text": {6: 3, 2: 1}, "text-to-audio": {8: 5}, "image-to-text": {2: 9}, "audio-to-text": {2: 9}}


@pytest.fixture(scope="module")
def modalities() -> Modalities:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (40, 4, 4), dtype=np.uint8)
    sounds = [random.uniform(-1, 1, 656).astype(np.float32) for _ in range(20)]
    image = PatchCodec.train(list(pictures), patch=2, codes=16)
    audio = SpectralCodec.train(sounds, codes=8, frames=Frames())
    return combine(word_tokenizer(WORDS), image, audio)


def requests(modalities: Modalities, row: int = 32) -> Requests:
    return Requests(modalities, LENGTHS, row)


def test_a_text_becomes_a_pair_with_the_grid_to_fill(modalities: Modalities) -> None:
    v = modalities.vocabulary
    one = requests(modalities).pair("text-to-image", "one two")
    assert torch.equal(requests(modalities).pair("text-to-image", " one two ").tokens_T, one.tokens_T)
    assert one.tokens_T.tolist() == [
        v.task("text-to-image"),
        *[v.begin("text"), 0, 1, v.end("text")],
        *[v.begin("image"), *[v.mask] * 4, v.end("image")],
    ]
    filled = one.tokens_T.masked_fill(one.tokens_T == v.mask, v.modality("image").first)
    assert requests(modalities).sample(filled).shape == (4, 4)


def test_pictures_and_sounds_are_conditions_from_files(modalities: Modalities, tmp_path: Path) -> None:
    v = modalities.vocabulary
    picture = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)
    write_image(tmp_path / "in.png", picture)
    one = requests(modalities).pair("image-to-text", str(tmp_path / "in.png"))
    assert (one.tokens_T == v.mask).sum() == 2 and one.condition_T.sum() == 4
    with pytest.raises(UserError, match="--tokens 3: every image-to-text target .* fills 2 tokens"):
        requests(modalities).pair("image-to-text", str(tmp_path / "in.png"), 3)
    sound = np.sin(np.arange(656) / 3).astype(np.float32)
    write_sound(tmp_path / "in.wav", sound, 8000)
    two = requests(modalities).pair("audio-to-text", str(tmp_path / "in.wav"))
    (frames,) = modalities.ids("audio", [read_sound(tmp_path / "in.wav", modalities.audio)], "sound")  # type: ignore[arg-type]
    assert two.tokens_T[2 : 2 + len(frames)].tolist() == frames.tolist()
    three = requests(modalities).pair("text-to-audio", "two")
    assert (three.tokens_T == v.mask).sum() == 8
    assert (requests(modalities).pair("text-to-audio", "two", 3).tokens_T == v.mask).sum() == 3


def test_text_is_infilled_continued_and_begun(modalities: Modalities) -> None:
    v, make = modalities.vocabulary, requests(modalities)
    mask = v.mask
    assert make.text("three [MASK] two equals [MASK]").tokens_T.tolist() == [2, mask, 1, 4, mask, v.eot]
    assert make.text("[MASK] [MASK] one").tokens_T.tolist() == [mask, mask, 0, v.eot]
    assert make.text("one plus").tokens_T.tolist() == [0, 3, *[mask] * 4]  # 6 is most common
    assert make.text("one", 2).tokens_T.tolist() == [0, mask, mask]
    lengths = {len(make.text("", seed=(0, number)).tokens_T) for number in range(40)}
    assert lengths == {2, 6}
    assert make.sample(torch.tensor([0, 3, 1, 5, 2, 5])) == "one plus two"


def test_bytes_keep_the_space_before_a_mask() -> None:
    plain = combine(BytesTokenizer())
    one = Requests(plain, {}, 32).text("a [MASK]b")
    assert one.tokens_T.tolist() == [97, 32, plain.vocabulary.mask, 98, 256]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: r.pair("text-to-smell", "one"), "--task text-to-smell: this run has text, text-to-image"),
        (lambda r: r.pair("text-to-image", " "), "--prompt is empty"),
        (lambda r: r.pair("text-to-image", "one", 5), "--tokens 5: every image of this run has 4 tokens"),
        (lambda r: r.text("one [MASK]", 3), "--tokens: the prompt's \\[MASK\\]s say how many"),
        (lambda r: r.text("one", 40), "a document of 41 tokens: this run learned rows of 32"),
        (lambda r: r.text(" ".join(["one"] * 6)), "the data had no text document of more than 6 tokens"),
        (lambda r: r.pair("image-to-text", "nowhere.png"), "nowhere.png: cannot be read"),
        (lambda r: r.pair("audio-to-text", "nowhere.wav"), "nowhere.wav: cannot be read"),
    ],
)
def test_what_cannot_be_made_is_said(make, message: str, modalities: Modalities) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        make(requests(modalities))


def test_a_vocabulary_of_text_alone_has_one_task() -> None:
    with pytest.raises(UserError, match="this run has text$"):
        Requests(combine(BytesTokenizer()), {}, 32).pair("text-to-image", "x")


def test_files_of_another_form_are_refused(modalities: Modalities, tmp_path: Path) -> None:
    write_image(tmp_path / "wide.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(UserError, match="5 x 4 pixels; this run's images are 4 x 4"):
        read_image(tmp_path / "wide.png", modalities.image)  # type: ignore[arg-type]
    write_image(tmp_path / "deep.png", np.zeros((4, 4), np.uint16))
    with pytest.raises(UserError, match="deep.png: more than 8 bits"):
        read_image(tmp_path / "deep.png", modalities.image)  # type: ignore[arg-type]
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="not a picture"):
        read_image(tmp_path / "text.png", modalities.image)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="text.png: a sound that cannot be decoded"):
        read_sound(tmp_path / "text.png", modalities.audio)  # type: ignore[arg-type]
    with wave.open(str(tmp_path / "stereo.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes(b"\0" * 44100)
    assert read_sound(tmp_path / "stereo.wav", modalities.audio).shape == (2000,)  # type: ignore[arg-type]
    for write, name in ((write_image, "a.png"), (write_sound, "a.wav")):
        (tmp_path / name).mkdir()
        samples = (np.zeros((4, 4), np.uint8),) if name == "a.png" else (np.zeros(4, np.float32), 8000)
        with pytest.raises(UserError, match=f"{name}: cannot be written"):
            write(tmp_path / name, *samples)
    with pytest.raises(UserError, match="write to a .wav"):
        write_sound(tmp_path / "a.mp3", np.zeros(4, np.float32), 8000)
    with pytest.raises(UserError, match="write to a .png"):
        write_image(tmp_path / "a.picture", np.zeros((4, 4), np.uint8))


def test_pictures_and_sounds_read_back_as_written(modalities: Modalities, tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (4, 4), dtype=np.uint8)
    write_image(tmp_path / "a.png", picture)
    assert np.array_equal(read_image(tmp_path / "a.png", modalities.image), picture)  # type: ignore[arg-type]
    sound = np.sin(np.arange(300) / 5).astype(np.float32)
    write_sound(tmp_path / "a.wav", sound, 8000)
    again = read_sound(tmp_path / "a.wav", modalities.audio)  # type: ignore[arg-type]
    assert again.dtype == np.float32 and np.abs(again - sound).max() < 1e-4


@pytest.mark.parametrize("colours", [(), (3,)])
def test_a_contact_sheet_holds_every_picture(colours: tuple[int, ...]) -> None:
    pictures = [np.full((2, 3, *colours), value, np.uint8) for value in (10, 20, 30, 40, 50)]
    sheet = contact_sheet(pictures, scale=2)
    assert sheet.shape == (2 * (4 + 2) + 2, 3 * (6 + 2) + 2, *colours)
    inside = [(2, 2), (2, 10), (2, 18), (8, 2), (8, 10)]
    assert [int(sheet[place].max()) for place in inside] == [10, 20, 30, 40, 50]
    assert int(sheet[8, 18].min()) == 255


def test_lengths_are_counted_from_rows_of_whole_documents(modalities: Modalities, tmp_path: Path) -> None:
    v = modalities.vocabulary
    pair = [v.task("image-to-text"), v.begin("image"), *[v.modality("image").first] * 4, v.end("image")]
    pair += [v.begin("text"), 1, v.eot, v.end("text")]
    documents = [pair, [0, 3, 1, v.eot], [v.pad] * 3]
    tokens = [token for document in documents for token in document]
    segments = [number for number, document in enumerate(documents) for _ in document]
    positions = [place for document in documents for place in range(len(document))]
    ones = torch.ones(1, len(tokens), dtype=torch.bool)
    batch = Batch(
        torch.tensor([[*tokens, v.pad]]),
        ones,
        torch.tensor([segments], dtype=torch.int16),
        torch.tensor([positions], dtype=torch.int16),
        torch.tensor([0]),
        Cursor(1, "x"),
    )
    documents_there = list(documents_of([batch, batch], v))
    assert documents_there[0].blank(v.mask) == [*pair[:8], v.mask, v.mask, pair[-1]]
    assert documents_there[0].condition.tolist() == pair[2:6] and documents_there[1].target.tolist() == [
        0,
        3,
        1,
        v.eot,
    ]
    found = count_lengths(documents_there)
    assert found == {"image-to-text": {2: 2}, "text": {4: 2}}
    save_lengths(TargetLengths({task: Counter(counts) for task, counts in found.items()}), tmp_path)
    assert load_lengths(tmp_path) == found and load_lengths(tmp_path / "elsewhere") == {}
    assert usual_length({"text": {3: 2, 5: 2, 9: 1}}, "text") == 3
    assert usual_length({"text": {3: 2, 5: 2, 9: 1}}, "text", above=3) == 5
    with pytest.raises(UserError, match="--tokens: the data had no text-to-image document; say how many"):
        draw_length(found, "text-to-image", np.random.default_rng(0))
    (tmp_path / "target_lengths.json").write_text("[1]")
    with pytest.raises(UserError, match="damaged"):
        load_lengths(tmp_path)


def test_a_sound_is_as_long_as_those_of_its_caption(modalities: Modalities, tmp_path: Path) -> None:
    """Frequent captions have their own lengths, others those of captions with about as many tokens."""
    counted = TargetLengths()
    for number in range(40):
        counted.add("text-to-audio", (0,), 3)
        counted.add("text-to-audio", (1,), 9)
        counted.add("text-to-audio", (2, 2, number % 3, 3, 4), 20 + number % 2)
        counted.add("image-to-text", None, 2)
    counted.add("text-to-audio", (3,), 5)
    save_lengths(counted.thinned(), tmp_path)
    captions = load_caption_lengths(tmp_path)
    assert captions["text-to-audio"].of([0]) == {3: 40} and captions["text-to-audio"].of([1]) == {9: 40}
    assert captions["text-to-audio"].of([4]) == {3: 40, 9: 40, 5: 1}, "a new caption of one token"
    assert set(captions["text-to-audio"].of([0, 1, 2, 3, 0, 1, 2])) == {20, 21}, "a new one of seven"
    make = Requests(modalities, load_lengths(tmp_path), 32, captions)
    mask = modalities.vocabulary.mask

    def drawn(caption: str) -> set[int]:
        made = (make.pair("text-to-audio", caption, seed=(0, number)) for number in range(30))
        return {int((one.tokens_T == mask).sum()) for one in made}

    assert drawn("one") == {3} and drawn("two") == {9} and drawn("three three equals two two") == {20, 21}
    assert drawn("equals") >= {3, 9}, "a length for each sample, not the most common one for all"
    (tmp_path / "target_lengths_by_caption.json").write_text('{"text-to-audio": {"by_tokens": []}}')
    with pytest.raises(UserError, match="by_caption.json: damaged"):
        load_caption_lengths(tmp_path)
    assert CaptionLengths().of([1]) == {}


@pytest.mark.parametrize(
    ("change", "column", "row", "value"),
    [("exif", 0, 0, 200), ("transparent", 0, 0, 255), ("none", 0, 0, 10)],
)
def test_pictures_are_asked_about_as_they_are_seen(  # type: ignore[no-untyped-def]
    modalities: Modalities, tmp_path: Path, caplog, change: str, column: int, row: int, value: int
) -> None:
    pixels = np.full((4, 4), 200, np.uint8)
    pixels[0, 0] = 10
    picture = Image.fromarray(pixels)
    options: dict[str, Any] = {}
    if change == "exif":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 3  # upside down
    if change == "transparent":
        alpha = np.full((4, 4), 255, np.uint8)
        alpha[0, 0] = 0
        picture = Image.merge("LA", (picture, Image.fromarray(alpha)))
    picture.save(tmp_path / "a.png", **options)
    with caplog.at_level("WARNING"):
        seen = read_image(tmp_path / "a.png", modalities.image)  # type: ignore[arg-type]
    assert int(seen[row, column]) == value
    assert bool(caplog.records) == (change != "none") and (change == "none" or "a.png" in caplog.text)
    if change == "exif":
        assert int(seen[3, 3]) == 10
