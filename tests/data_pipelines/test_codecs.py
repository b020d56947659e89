"""Codecs: patches, spectral frames, codebooks in a line, folders, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.codecs import PatchCodec, SpectralCodec, load_codec
from data_pipelines.codecs.codebooks import fill_mask, flatten, level_size, unflatten
from data_pipelines.codecs.kmeans import kmeans, nearest
from data_pipelines.codecs.spectral import Frames, log_magnitudes
from data_pipelines.errors import DataError
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.modalities import Modalities, code_modality, combine, load_modalities
from data_pipelines.tokens.tokenizer_training import word_tokenizer

FRAMES = Frames(8000, 256, 200, 300, 2000)


def pictures(count: int, shape: tuple[int, ...] = (8, 6), colours: int = 7) -> list[np.ndarray]:
    """Images of a few colours that stand in 2 x 2 blocks."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, colours, (count, shape[0] // 2, shape[1] // 2, *shape[2:])) * 30
    return list(blocks.repeat(2, 1).repeat(2, 2).astype(np.uint8))


def tones(count: int, samples: int = 1656) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    frequencies = random.choice([440, 700, 1000, 1500], count)
    time = np.arange(samples) / 8000
    phases = random.uniform(0, 6, count)
    return [
        (0.4 * np.sin(6.2832 * f * time + p)).astype(np.float32)
        for f, p in zip(frequencies, phases, strict=True)
    ]


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 3)])
def test_patches_of_few_colours_come_back_exactly(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = pictures(60, shape, 3)
    codec = PatchCodec.train(images, 3 if len(shape) == 2 else 27, 2)
    codes = codec.encode(images)
    assert codec.grid == (4, 3) and codes[0].shape == (12,)
    assert all(np.array_equal(a, b) for a, b in zip(codec.decode(codes), images, strict=True))
    # Row by row: the fourth code is the first patch of the second row.
    changed = images[0].copy()
    changed[2:4, 0:2] = images[1][0:2, 0:2] = 255 - changed[2:4, 0:2]
    assert np.flatnonzero(codec.encode([changed])[0] != codes[0]).tolist() in ([], [3])
    codec.save(tmp_path)
    again = load_codec(tmp_path)
    assert again.fingerprint == codec.fingerprint and again.describe() == codec.describe()
    assert np.array_equal(again.encode(images[2:3])[0], codes[2])


@pytest.mark.parametrize("codebooks", [1, 3])
def test_a_tone_keeps_its_pitch(tmp_path: Path, codebooks: int) -> None:
    sounds = tones(60)
    codec = SpectralCodec.train(sounds, 24, FRAMES, codebooks)
    codes = codec.encode(sounds)
    assert codes[0].shape == ((8,) if codebooks == 1 else (3, 8))
    for sound, made in zip(sounds, codec.decode(codes), strict=True):
        assert made.dtype == np.float32 and made.shape == sound.shape and abs(made).max() <= 1
        pitches = [np.abs(np.fft.rfft(one)).argmax() * 8000 / 1656 for one in (sound, made)]
        assert abs(pitches[0] - pitches[1]) < 40
    codec.save(tmp_path)
    again = load_codec(tmp_path)
    assert again.fingerprint == codec.fingerprint
    assert np.array_equal(again.decode(codes[:1])[0], codec.decode(codes[:1])[0])


def test_more_codebooks_come_closer() -> None:
    sounds = [s + np.random.default_rng(1).normal(0, 0.02, 1656).astype(np.float32) for s in tones(80)]
    errors = []
    for codebooks in (1, 2, 3):
        codec = SpectralCodec.train(sounds, 16, FRAMES, codebooks)
        spectra = [np.atleast_2d(codes) for codes in codec.encode(sounds)]
        guess = [sum(level[c] for level, c in zip(codec.centroids, codes, strict=True)) for codes in spectra]
        errors.append(
            np.mean(
                [((g - log_magnitudes(s, FRAMES)) ** 2).mean() for g, s in zip(guess, sounds, strict=True)]
            )
        )
    assert errors[0] > errors[1] > errors[2]


def test_short_and_long_sounds_are_encoded_whole() -> None:
    codec = SpectralCodec.train(tones(60), 24, FRAMES)
    for samples, frames in ((1, 1), (256, 1), (257, 2), (456, 2), (457, 3)):
        assert codec.encode([np.full(samples, 0.1, np.float32)])[0].shape == (frames,)


def test_kmeans_is_the_same_on_any_number_of_threads() -> None:
    code = (
        "import numpy as np, hashlib; from data_pipelines.codecs.kmeans import kmeans;"
        "p = np.random.default_rng(0).normal(size=(3000, 5));"
        "print(hashlib.sha256(kmeans(p, 40, 3, 'x').tobytes()).hexdigest())"
    )
    found = set()
    for threads in ("1", "2"):
        env = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PATH": "/usr/bin"}
        shown = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=100, check=True
        )
        found.add(shown.stdout)
    assert len(found) == 1


def test_kmeans_finds_clusters_and_tells_when_there_are_too_few_points() -> None:
    random = np.random.default_rng(0)
    points = np.concatenate([random.normal(c, 0.1, (50, 2)) for c in (0, 5, 10)])
    centroids = np.sort(kmeans(points, 3, 0, "points")[:, 0])
    assert np.allclose(centroids, [0, 5, 10], atol=0.2)
    number, distance = nearest(points, kmeans(points, 3, 0, "points"))
    assert len(set(number[:50].tolist())) == 1 and distance.max() < 1
    with pytest.raises(DataError, match="points: only 2 different ones in 4"):
        kmeans(np.asarray([[0], [0], [1], [1]]), 3, 0, "points")


@given(
    codebooks=st.integers(1, 5),
    frames=st.integers(1, 9),
    size=st.integers(1, 6),
    delay=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_codebooks_in_a_line_come_back(
    codebooks: int, frames: int, size: int, delay: bool, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, size, (codebooks, frames))
    line = flatten(codes, size, delay)
    each = level_size(size, delay)
    places = frames + (codebooks - 1) * delay
    assert line.shape == (places * codebooks,)
    # Level l stands at every K-th place, in its own part of the ids.
    assert np.array_equal(line // each, np.tile(np.arange(codebooks), places))
    if delay:
        holes = line.reshape(places, codebooks) % each == size
        assert np.array_equal(holes, fill_mask(frames, codebooks))
        assert np.array_equal(np.flatnonzero(~holes[:, -1]), np.arange(frames) + codebooks - 1)
    assert np.array_equal(unflatten(line, codebooks, size, delay), codes)


def test_lines_that_are_no_frames() -> None:
    line = flatten(np.asarray([[0, 1], [2, 0]]), 3, True)
    assert line.tolist() == [0, 7, 1, 6, 3, 4]
    with pytest.raises(DataError, match="no whole frames of 2"):
        unflatten(line[:-1], 2, 3, True)
    with pytest.raises(DataError, match="frame 1, codebook 0: 3 is outside of 0 to 2"):
        unflatten(np.asarray([0, 7, 3, 6, 3, 4]), 2, 3, True)
    with pytest.raises(DataError, match="too few for the delay"):
        unflatten(line[:2], 3 - 1, 3, True)
    with pytest.raises(DataError, match="code 3 is outside of 0 to 2"):
        flatten(np.asarray([[3]]), 3, False)


@pytest.fixture(scope="module")
def modalities() -> Modalities:
    images = PatchCodec.train(pictures(60), 5, 2)
    sounds = SpectralCodec.train(tones(60), 12, FRAMES, 2)
    return combine(word_tokenizer(["red", "blue"]), images, sounds, delay=True)


def test_modalities_there_and_back(tmp_path: Path, modalities: Modalities) -> None:
    modalities.save(tmp_path)
    again = load_modalities(tmp_path)
    v = again.vocabulary
    assert v.audio is not None and v.image is not None
    assert v == modalities.vocabulary and v.audio.delay and v.audio.size == 2 * 13 and v.image.size == 5
    assert again.sample("text", np.append(again.text_ids("red blue"), [v.eot, v.eot, 0])) == "red blue"
    (ids,) = again.ids("audio", tones(1), "x")
    assert len(ids) == 9 * 2 and ids.min() >= v.audio.first and ids.max() < v.audio.end
    assert again.sample("audio", ids).shape == (1656,)
    (ids,) = again.ids("image", pictures(1), "x")
    assert again.sample("image", ids).shape == (8, 6)
    with pytest.raises(DataError, match="is no image token"):
        again.sample("image", ids - 3)


def test_files_that_do_not_belong_together(tmp_path: Path, modalities: Modalities) -> None:
    modalities.save(tmp_path)
    other = PatchCodec.train(pictures(90, colours=8), 6, 2)
    other.save(tmp_path / "codecs/image")
    with pytest.raises(DataError, match="the image codec has fingerprint"):
        load_modalities(tmp_path)
    assert modalities.image is not None
    modalities.image.save(tmp_path / "codecs/image")
    word_tokenizer(["red", "green"]).save(tmp_path)
    with pytest.raises(DataError, match="tokenizer.json: fingerprint"):
        load_modalities(tmp_path)
    config = tmp_path / "codecs/image/codec.json"
    config.write_text(config.read_text().replace('"patch": 2', '"patch": 1'))
    with pytest.raises(DataError, match="do not belong together"):
        load_codec(tmp_path / "codecs/image")
    (tmp_path / "codecs/image/weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="weights.safetensors: damaged"):
        load_codec(tmp_path / "codecs/image")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no_such_package:Codec", "no_such_package:Codec, which cannot be imported"),
        ("data_pipelines.stream.batch:Codec", "cannot be imported"),
        ("patches", "not one of patch, spectral, .*diffusers-vq"),
    ],
)
def test_codecs_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    monkeypatch.setenv("TRIPTYCH_CODECS", "no_such_package, data_pipelines.stream.batch")
    (tmp_path / "codec.json").write_text(json.dumps({"kind": kind}))
    with pytest.raises(DataError, match=message):
        load_codec(tmp_path)
    with pytest.raises(DataError, match="holds no codec"):
        load_codec(tmp_path / "other")


@pytest.mark.parametrize("kind", ["transformers-dac", "transformers-encodec", "diffusers-vq"])
def test_pretrained_codecs_say_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Their packages are large extras, and cannot be imported here even where they are installed."""
    (tmp_path / "codec.json").write_text(json.dumps({"kind": kind, "model": "model"}))
    with pytest.raises(DataError, match="model: no such folder; codec.json names it"):
        load_codec(tmp_path)
    (tmp_path / "model").mkdir()
    for library in ("transformers", "diffusers"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=r"needs (transformers|diffusers).*pip install 'triptych\[codecs\]'"):
        load_codec(tmp_path)
    (tmp_path / "codec.json").write_text(json.dumps({"kind": kind}))
    with pytest.raises(DataError, match='no "model" in it'):
        load_codec(tmp_path)


def test_a_codec_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "class Thirds:\n"
        "    modality, codebooks, codebook_size, grid, fingerprint = 'audio', 1, 3, None, 'thirds'\n"
        "    @classmethod\n"
        "    def load(cls, folder):\n"
        "        return cls()\n"
    )
    (tmp_path / "my_codecs.py").write_text(source)
    (tmp_path / "codec.json").write_text('{"kind": "my_codecs:Thirds"}')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"its codec is my_codecs:Thirds.*export TRIPTYCH_CODECS=my_codecs$"):
        load_codec(tmp_path)
    assert "my_codecs" not in sys.modules
    monkeypatch.setenv("TRIPTYCH_CODECS", "other,my_codecs")
    assert load_codec(tmp_path).fingerprint == "thirds"


@pytest.mark.parametrize(
    "kind", ["torch:hub", "subprocess:Popen", "os:", "a.b", "os:path:join", None, ["patch"], {}]
)
def test_a_kind_that_is_no_codec_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: object
) -> None:
    (tmp_path / "codec.json").write_text(json.dumps({"kind": kind}))
    with pytest.raises(DataError, match="codec.json: "):
        load_codec(tmp_path)
    monkeypatch.setenv("TRIPTYCH_CODECS", "torch,subprocess,os")
    with pytest.raises(DataError, match="codec.json: "):
        load_codec(tmp_path)


def test_samples_that_codecs_refuse(modalities: Modalities) -> None:
    assert modalities.image is not None and modalities.audio is not None
    with pytest.raises(DataError, match=r"image 1 is uint8 \(8, 8\), this codec takes uint8 \(8, 6\)"):
        modalities.image.encode([*pictures(1), np.zeros((8, 8), np.uint8)])
    with pytest.raises(DataError, match="sound 0 is float64"):
        modalities.audio.encode([np.zeros(9)])
    with pytest.raises(DataError, match="12 codes below 5"):
        modalities.image.decode([np.full(12, 5)])
    with pytest.raises(DataError, match="a.tar: codes of 1 codebooks, the vocabulary has 2"):
        modalities.code_ids("audio", np.zeros(4, np.int64), "a.tar")
    with pytest.raises(DataError, match="no token for a word"):
        modalities.text_ids("red green")
    with pytest.raises(DataError, match="do not divide"):
        PatchCodec.train(pictures(3), 2, 4)


def test_text_alone_has_no_modalities(tmp_path: Path) -> None:
    BytesTokenizer().save(tmp_path)
    with pytest.raises(DataError, match="text alone"):
        load_modalities(tmp_path)


def test_a_cell_of_a_grid_is_one_token() -> None:
    with pytest.raises(DataError, match="image codec of 2 codebooks with a grid"):
        code_modality("image", 0, (2, 16), "x", (4, 4))
    assert code_modality("image", 0, (2, 16), "x").size == 32


@pytest.mark.parametrize("content", ["[" * 100_000, "\ufeff{", '{"kind": 1e999}', "[]"])
def test_a_damaged_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "codec.json").write_text(content)
    with pytest.raises(DataError, match=r"codec\.json"):
        load_codec(tmp_path)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "codec.json").write_text('{"kind": "transformers-dac", "model": "model"}')
    with pytest.raises(DataError, match="model: the DacModel there cannot be loaded"):
        load_codec(tmp_path)


def test_points_that_are_no_numbers_are_refused() -> None:
    points = np.ones((9, 2))
    points[3, 1] = np.nan
    with pytest.raises(DataError, match="frames: some are NaN or infinite"):
        kmeans(points, 2, 0, "frames")
