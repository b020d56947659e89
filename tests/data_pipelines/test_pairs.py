"""`triptych data pairs`: from files to datasets that are read back."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_pipelines.codecs import PatchCodec
from data_pipelines.errors import DataError
from data_pipelines.inspection.lint import lint
from data_pipelines.prepare.pair_options import PairOptions
from data_pipelines.prepare.pairs import build_pairs
from data_pipelines.rows.cut_rows import Source, open_sources
from data_pipelines.rows.whole_rows import WholeRowReader
from data_pipelines.storage.dataset import open_dataset
from data_pipelines.storage.shards import write_tar
from data_pipelines.tokens.modalities import load_modalities
from data_pipelines.tokens.tokenizer_training import word_tokenizer
from data_pipelines.tokens.vocabulary import TASKS
from tests.data_pipelines.helpers import VOCABULARY, make_pairs, pair
from tests.data_pipelines.test_command import run
from tests.data_pipelines.test_whole_rows import read_back

COUNT = 30


def png(number: int, colour: bool = False, side: int = 8, bits: int = 8) -> bytes:
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, (side, side, *([3] if colour else [])))
    file = io.BytesIO()
    Image.fromarray(pixels.astype(f"uint{bits}")).save(file, "PNG")
    return file.getvalue()


def wav(number: int, rate: int = 8000, form: str = "WAV") -> bytes:
    time = np.arange(rate // 5) / rate
    noise = np.random.default_rng(number).normal(0, 0.01, len(time))
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(6.28 * (300 + 40 * number) * time) + noise, rate, format=form)
    return file.getvalue()


def samples(**changes: dict[str, bytes | None]) -> list[dict[str, Any]]:
    """Captions with images and sounds; `changes` by key."""
    made: list[dict[str, Any]] = [
        {"__key__": f"s{n}", "txt": f"number {n}".encode(), "png": png(n), "wav": wav(n)}
        for n in range(COUNT)
    ]
    for sample in made:
        for extension, data in changes.get(sample["__key__"], {}).items():
            sample[extension] = data
            if data is None:
                del sample[extension]
    return made


OPTIONS = PairOptions(
    tokenizer="bytes", image_codec="patch:40:2", audio_codec="spectral:12:2", validation_fraction=0.2
)


def documents(folder: Path, split: str = "train") -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids of condition, ids of target) of every document, in stored order."""
    reader = WholeRowReader(open_sources([Source(folder)], split), 200, 0, shuffle=False)
    v = reader.vocabulary
    found = [d for row in read_back(reader.batch(range(reader.rows_per_epoch[0]))) for d in row]
    pairs = []
    for document in found:
        ends = [i for i, token in enumerate(document) if token in {v.end(m.name) for m in v.modalities}]
        pairs.append((np.asarray(document[2 : ends[0]]), np.asarray(document[ends[0] + 2 : ends[1]])))
    return pairs


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    (root / "raw").mkdir()
    made = samples()
    write_tar(root / "raw" / "a.tar", made[:20])
    write_tar(root / "raw" / "b.tar", made[20:])
    build_pairs(root / "raw", root / "out", OPTIONS)
    return root


def test_all_tasks_hold_the_samples_on_one_side(built: Path) -> None:
    words = {}
    for task, (x, y) in TASKS.items():
        folder = built / "out" / task
        modalities = load_modalities(folder)
        assert lint(folder) == []
        for split in ("train", "validation"):
            pairs = documents(folder, split)
            place = 0 if x == "text" else 1
            words[task, split] = {modalities.sample("text", one[place]) for one in pairs}
            for both in pairs:
                other = modalities.sample(y if x == "text" else x, both[1 - place])
                assert other.shape == ((8, 8) if "image" in task else (1656,))
                if y == "text":  # filled up to the longest caption and one more
                    assert len(both[1]) == 10 and both[1][-1] == modalities.vocabulary.eot
                elif x == "text":
                    assert modalities.vocabulary.eot not in both[0]
    assert len({frozenset(words[task, "train"]) for task in TASKS}) == 1
    train, validation = words["text-to-image", "train"], words["text-to-image", "validation"]
    assert train | validation == {f"number {n}" for n in range(COUNT)} and not train & validation
    assert len({load_modalities(built / "out" / task).vocabulary.fingerprint for task in TASKS}) == 1


def test_images_and_captions_stay_together(built: Path) -> None:
    folder = built / "out" / "text-to-image"
    modalities = load_modalities(folder)
    for given, made in documents(folder):
        number = int(modalities.sample("text", given).split()[1])
        with Image.open(io.BytesIO(png(number))) as image:
            (wanted,) = modalities.ids("image", [np.asarray(image)], "x")
        assert np.array_equal(made, wanted)


def test_a_folder_of_files_gives_the_same_tokens(tmp_path: Path, built: Path) -> None:
    for sample in samples():
        for extension, data in sample.items():
            if extension != "__key__":
                (tmp_path / f"{sample['__key__']}.{extension}").write_bytes(data)
    (tmp_path / "readme.md").write_text("not a sample")
    options = PairOptions(
        vocabulary=built / "out" / "text-to-image", tasks=("image-to-text",), validation_fraction=0.2
    )
    build_pairs(tmp_path, tmp_path / "out", options)
    key = lambda pairs: sorted((a.tolist(), b.tolist()) for a, b in pairs)  # noqa: E731
    assert key(documents(tmp_path / "out/image-to-text")) == key(documents(built / "out/image-to-text"))
    assert not (tmp_path / "out/text-to-image").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_codec": "patch:40:2"}, "--image-codec patch:40:2: --vocabulary .* says which codec is used"),
        ({"audio_codec": "codes:9"}, "--audio-codec codes:9: --vocabulary .* says which codec is used"),
        ({"delay": True}, "--delay: --vocabulary .* says whether there is a delay"),
    ],
)
def test_a_vocabulary_leaves_nothing_to_choose(
    tmp_path: Path, built: Path, changes: dict[str, Any], message: str
) -> None:
    options = PairOptions(vocabulary=built / "out" / "text-to-image", **changes)
    with pytest.raises(DataError, match=message):
        build_pairs(built / "raw", tmp_path / "out", options)


def test_codes_get_their_codec_later(tmp_path: Path) -> None:
    """The dataset knows how many codes there are, not whose they are."""
    pictures = np.random.default_rng(0).integers(0, 256, (40, 4, 6), dtype=np.uint8)
    codec = PatchCodec.train(list(pictures), codes=12, patch=2)
    codes = codec.encode(list(pictures))
    made = [
        {"__key__": f"{n}", "txt": b"a", "image.u16": one.astype("<u2").tobytes()}
        for n, one in enumerate(codes)
    ]
    write_tar(tmp_path / "a.tar", made)
    options = PairOptions(image_codec="codes:12:2x3", tokenizer="bytes", validation_fraction=0)
    build_pairs(tmp_path / "a.tar", tmp_path / "out", options)
    folder = tmp_path / "out/text-to-image"
    place = folder / "codecs" / "image"
    place.mkdir(parents=True)
    codec.save(place)
    decoded = {load_modalities(folder).sample("image", ids).tobytes() for _, ids in documents(folder)}
    assert decoded == {image.tobytes() for image in codec.decode(codes)}
    PatchCodec.train(list(pictures), codes=11, patch=2).save(place)
    with pytest.raises(
        DataError, match=r"has 1 codebook\(s\) of 11 codes, grid \(2, 3\); the codes .* have 1 .* of 12"
    ):
        load_modalities(folder)


def test_codes_are_taken_as_they_are(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images, sounds = random.integers(0, 70_000, (5, 6)), random.integers(0, 9, (5, 2, 4))
    made = [
        {
            "__key__": f"{n}",
            "json": json.dumps({"caption": "ab"[: 1 + n % 2]}).encode(),
            "image.u32": images[n].astype("<u4").tobytes(),
            "audio.u16": sounds[n].astype("<u2").tobytes(),
        }
        for n in range(5)
    ]
    write_tar(tmp_path / "a.tar", made)
    spec: dict[str, Any] = {
        "image_codec": "codes:70000:2x3",
        "audio_codec": "codes:9:2",
        "tokenizer": "bytes",
    }
    built = build_pairs(
        tmp_path / "a.tar", tmp_path / "out", PairOptions(**spec, validation_fraction=0, delay=True)
    )
    v = built.modalities.vocabulary
    assert v.image is not None and v.audio is not None
    assert v.image.size == 70_000 and v.audio.size == 20 and v.audio.delay
    pairs = documents(tmp_path / "out/text-to-image")
    assert sorted(made.tolist() for _, made in pairs) == sorted((images + v.image.first).tolist())
    assert open_dataset(tmp_path / "out/text-to-image").token_bytes == 4
    with pytest.raises(DataError, match="no codec for image tokens"):
        built.modalities.sample("image", pairs[0][1])
    smaller = PairOptions(**{**spec, "image_codec": "codes:60000:2x3"})
    with pytest.raises(DataError, match=r"a.tar:\d: image code \d+ is outside of 0 to 59999"):
        build_pairs(tmp_path / "a.tar", tmp_path / "out2", smaller)
    with pytest.raises(DataError, match="the grid has 3 x 3"):
        build_pairs(
            tmp_path / "a.tar", tmp_path / "out2", PairOptions(**{**spec, "image_codec": "codes:70000:3x3"})
        )
    with pytest.raises(DataError, match="say with --image-codec which codec made them"):
        build_pairs(tmp_path / "a.tar", tmp_path / "out2", PairOptions(tokenizer="bytes"))
    with pytest.raises(DataError, match="its audio.u16 has 16 bytes, not a whole number of 3"):
        build_pairs(
            tmp_path / "a.tar", tmp_path / "out2", PairOptions(**{**spec, "audio_codec": "codes:9:3"})
        )


BAD = [
    ({"s7": {"txt": None}}, {}, "a.tar:s7: an image and audio without its caption; put a s7.txt"),
    ({"s7": {"txt": b" \n"}}, {}, "a.tar:s7.txt: its caption is empty"),
    ({"s7": {"txt": b"\xff"}}, {}, "a.tar:s7.txt: a caption that is not UTF-8"),
    ({"s7": {"txt": None, "json": b"{}"}}, {}, 'a.tar:s7.json: no string "caption"'),
    ({"s7": {"png": None, "wav": None}}, {}, "a.tar:s7: a caption without an image or a sound"),
    ({"s7": {"png": png(7)[:60]}}, {}, "a.tar:s7.png: a picture that cannot be decoded"),
    ({"s7": {"png": png(7, bits=16)}}, {}, "a.tar:s7.png: more than 8 bits"),
    ({"s7": {"png": png(7, side=6)}}, {}, "a.tar:s7.png: an image of 6 x 6 pixels, .*a.tar:s0.png has 8 x 8"),
    ({"s7": {"wav": b"RIFF no sound"}}, {}, "a.tar:s7.wav: a sound that cannot be decoded"),
    ({}, {"text_slot": 8}, "a.tar:s0: its text has 8 tokens, the slot 8"),
    ({}, {"image_codec": "patch:4000:2"}, "image patches of 2 x 2: only"),
    ({}, {"image_codec": "patch:40:3"}, "do not divide"),
    ({}, {"image_codec": "patch:40"}, "--image-codec patch:40: a codec's folder, or patch:CODES:SIZE"),
    ({}, {"image_codec": "no/folder"}, "no/folder holds no codec"),
    ({}, {"tasks": ("text-to-video",)}, "--tasks text-to-video: no such task"),
    ({}, {"delay": True, "audio_codec": "spectral:12"}, "--delay: for audio of several codebooks"),
    ({}, {"tasks": ("text-to-image",)}, "--audio-codec .*: the tasks have no audio samples"),
    ({"s7": {"png": None, "image.u16": bytes(32)}}, {}, "some of the samples have image codes: say with"),
    ({}, {"validation_fraction": 1.0}, "--validation-fraction 1.0"),
    ({}, {"text_slot": 1}, "--text-slot 1"),
]


@pytest.mark.parametrize(("changes", "options", "message"), BAD)
def test_bad_samples_and_options(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    write_tar(tmp_path / "a.tar", samples(**changes))
    with pytest.raises(DataError, match=message):
        build_pairs(tmp_path / "a.tar", tmp_path / "out", PairOptions(**{**OPTIONS.__dict__, **options}))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"], "nothing is left of a build that failed"


def test_another_codec_or_tokenizer_than_the_vocabularys(tmp_path: Path, built: Path) -> None:
    write_tar(tmp_path / "a.tar", samples())
    theirs = built / "out" / "text-to-image"
    build_pairs(tmp_path / "a.tar", tmp_path / "b", PairOptions(tokenizer="bytes", image_codec="patch:30:2"))
    other = str(tmp_path / "b/text-to-image/codecs/image")
    with pytest.raises(DataError, match="the image codec has fingerprint"):
        build_pairs(tmp_path / "a.tar", tmp_path / "out", PairOptions(vocabulary=theirs, image_codec=other))
    with pytest.raises(DataError, match="--tokenizer bpe:300 trains a new one"):
        build_pairs(tmp_path / "a.tar", tmp_path / "out", PairOptions(vocabulary=theirs, tokenizer="bpe:300"))
    word_tokenizer(["number"]).save(tmp_path)
    words = PairOptions(vocabulary=theirs, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="the text tokenizer has fingerprint"):
        build_pairs(tmp_path / "a.tar", tmp_path / "out", words)
    with pytest.raises(DataError, match="a codec for image"):
        build_pairs(tmp_path / "a.tar", tmp_path / "out", PairOptions(tokenizer="bytes", audio_codec=other))


def test_sounds_are_resampled_to_the_codecs_rate(tmp_path: Path, built: Path) -> None:
    write_tar(tmp_path / "a.tar", [{"__key__": "x", "txt": b"x", "wav": wav(3, 16_000)}])
    options = PairOptions(
        vocabulary=built / "out/text-to-audio", tasks=("text-to-audio",), validation_fraction=0
    )
    result = build_pairs(tmp_path / "a.tar", tmp_path / "out", options)
    ((_, made),) = documents(tmp_path / "out/text-to-audio")
    sound = result.modalities.sample("audio", made)
    assert abs(np.abs(np.fft.rfft(sound)).argmax() * 8000 / len(sound) - 420) < 40


def test_colour_images_and_a_trained_tokenizer(tmp_path: Path) -> None:
    made = [{"__key__": f"{n}", "txt": f"photo {n}".encode(), "png": png(n, True)} for n in range(40)]
    write_tar(tmp_path / "a.tar", made)
    text = run(
        "pairs", tmp_path / "a.tar", "--out", tmp_path / "out", "--image-codec", "patch:64:2", "--tokenizer", "bpe:260",
        "--tasks", "image-to-text", "--text-slot", 9, "--validation-fraction", 0.1,
    )  # fmt: skip
    assert "RGB 8 x 8" in text and "text slot 9" in text and "train: " in text
    shown = run("stats", tmp_path / "out/image-to-text", "--sequence-length", 64)
    assert "documents: image-to-text" in shown and "tokens: image" in shown and "is padding" in shown
    assert "<begin image> [16 image tokens] <end image>" in shown
    assert "no problems" in run("lint", tmp_path / "out/image-to-text")


def test_lint_finds_pairs_that_are_none(tmp_path: Path) -> None:
    make_pairs(
        tmp_path, [pair("image-to-text", [257] * 4, [1]), np.asarray([VOCABULARY.task("image-to-text"), 5])]
    )
    (problem,) = lint(tmp_path)
    assert "document 1" in problem.what


def test_a_caption_with_an_unknown_word_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(s9={"txt": b"number nein"}))
    (tmp_path / "words").mkdir()
    word_tokenizer(["number", *map(str, range(COUNT))]).save(tmp_path / "words")
    options = PairOptions(
        tokenizer=str(tmp_path / "words"), image_codec="patch:40:2", tasks=("image-to-text",)
    )
    with pytest.raises(DataError, match="a.tar:s9: 'number nein': the tokenizer has no token for a word"):
        build_pairs(tmp_path / "a.tar", tmp_path / "out", options)


def test_reading_sounds_names_the_packages_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", samples(s5={"wav": None, "flac": wav(5, form="FLAC")}))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(DataError, match=r"a.tar:s5.flac: .*pip install 'triptych\[audio\]'"):
        build_pairs(tmp_path / "a.tar", tmp_path / "out", OPTIONS)
