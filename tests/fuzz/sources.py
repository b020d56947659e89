"""Fuzzers of raw data: folders and tars of files, JSON lines, captions, pictures, sounds, tokenizers, codecs, choices,
prompts.

Where a format has checksums, a changed fact is a finding; where it has none, what is read must at least be what the
changed file says, or be refused with the file's name.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.codecs import PatchCodec, SpectralCodec, load_codec
from data_pipelines.codecs.spectral import Frames
from data_pipelines.prepare.pairs import PairOptions, build_pairs
from data_pipelines.prepare.text import BuildOptions, build
from data_pipelines.raw.documents import file_documents
from data_pipelines.raw.files import find_source
from data_pipelines.raw.pictures import picture_facts, read_picture
from data_pipelines.raw.report import Report, Tally
from data_pipelines.raw.samples import read_samples
from data_pipelines.raw.sounds import read_sound, sound_rate
from data_pipelines.storage.dataset import Dataset, Shard
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.document_form import member_documents, token_members
from data_pipelines.tokens.modalities import combine
from data_pipelines.tokens.tokenizer import Tokenizer
from data_pipelines.tokens.tokenizer_loading import tokenizer_from_spec
from data_pipelines.tokens.tokenizer_training import train_bpe
from pretrain.commands.choices import read_questions
from pretrain.generate.prompts import check_prompts
from pretrain.generate.requests import Requests
from tests.fuzz.base import Fuzzer, chosen, mutated, refusals_name, require

WORDS = (
    "seven",
    "Größe",
    "日本",
    "a b",
    "\u2028",
    "\u0085",
    "\ufeff",
    "\U0001f600",
    "x" * 50,
    '"',
    "\\",
    "\t",
    "</s>",
)
HALF = "\ud800"
DEEP = "[" * 100_000 + "]" * 100_000


def _text(random: np.random.Generator, half: bool = False) -> str:
    words = (*WORDS, HALF) if half else WORDS
    return " ".join(chosen(random, words) for _ in range(int(random.integers(0, 8))))


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
    text = _text(random, half=True)
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
            item, text = tarfile.TarInfo(f"{place}{number}"), f"text {number} {_text(random)}"
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
    text = _text(random, half=True)
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


def pictures(seed: int, folder: Path) -> None:
    """A damaged PNG gives its pixels or is refused, for it has checksums; other formats give pixels or are refused."""
    from PIL import Image

    random = np.random.default_rng(seed)
    mode, form = chosen(
        random,
        [
            *(("L", form) for form in ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")),
            *(("RGB", form) for form in ("PNG", "JPEG", "BMP", "WEBP", "TIFF")),
            *((mode, "PNG") for mode in ("1", "LA", "RGBA", "P", "I;16")),
            ("CMYK", "JPEG"),
        ],
    )
    channels = {"LA": 2, "RGB": 3, "P": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)
    shape = (12, 8) if channels == 1 else (12, 8, channels)
    pixels = random.integers(0, 256, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
    picture = (
        Image.fromarray(pixels)
        if mode not in ("1", "P", "CMYK")
        else Image.fromarray(pixels[..., :3] if channels > 1 else pixels).convert(mode)
    )
    options: dict[str, Any] = {}
    orientation = int(random.integers(1, 9))
    if form in ("PNG", "JPEG", "WEBP") and random.random() < 0.5:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, form, **options)
    whole = file.getvalue()
    damaged = random.random() < 0.7
    data = mutated(whole, random) if damaged else whole
    colours = chosen(random, [1, 3])
    with refusals_name("a.png"):
        found = read_picture(data, "a.png", colours)
        facts = picture_facts(data, "a.png")
    require(
        found.dtype == np.uint8 and found.ndim == (2 if colours == 1 else 3), f"{found.dtype} {found.shape}"
    )
    require(found.shape[:2] == (facts.height, facts.width), f"{found.shape}, told {facts}")
    if not damaged:
        turned = "exif" in options and orientation >= 5
        require(
            found.shape[:2] == ((8, 12) if turned else (12, 8)), f"{found.shape} of orientation {orientation}"
        )
    if form == "PNG" and data[:4] == b"\x89PNG":
        require(
            np.array_equal(found, read_picture(whole, "a.png", colours)), "a damaged PNG gives other pixels"
        )


SOUNDS = (
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_U8"),
    ("FLAC", None),
    ("OGG", "VORBIS"),
    ("MP3", None),
)


@cache
def _sound(form: str, subtype: str | None, rate: int) -> bytes:
    import soundfile

    time = np.arange(rate // 4) / rate
    noise = np.random.default_rng(0).normal(0, 0.01, len(time))
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(2000 * time) + noise, rate, format=form, subtype=subtype)
    return file.getvalue()


def sounds(seed: int, folder: Path) -> None:
    """A cut sound is refused; a damaged one keeps its length and rate or is refused, and where there are checksums, its
    samples."""
    random = np.random.default_rng(seed)
    (form, subtype), rate = chosen(random, list(SOUNDS)), chosen(random, [8000, 16_000])
    whole = _sound(form, subtype, rate)
    kind = int(random.integers(4))
    data = [whole, whole[: int(random.integers(len(whole)))], mutated(whole, random), mutated(whole, random)][
        kind
    ]
    with refusals_name("a.wav"):
        told = sound_rate(data, "a.wav")
        found, found_rate = read_sound(data, "a.wav")
        again, _ = read_sound(data, "a.wav", 12_000)
    wanted, _ = read_sound(whole, "b.wav")
    require(kind != 1 or data == whole, f"{len(data)} of {len(whole)} bytes were taken for a whole {form}")
    require(found.dtype == np.float32 and bool(np.isfinite(found).all()), f"{found.dtype}, or not finite")
    if form != "MP3":
        require(told == found_rate == rate, f"{found_rate} Hz, told {told}, was {rate}")
        require(len(found) == len(wanted), f"{len(found)} samples of {len(wanted)}")
    require(abs(len(again) - len(found) * 12_000 / found_rate) <= 1, f"resampled to {len(again)}")
    if form in ("FLAC", "OGG"):
        require(np.array_equal(found, wanted), f"a damaged {form} gives other samples")


@cache
def _tokenizer_files() -> tuple[str, ...]:
    """Byte-level BPE, BPE with few characters (with and without an unknown token), whole words, Unigram."""
    from tokenizers import Tokenizer as Made
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    texts = ["the seven small homes", "a while over the sail", "Größe und 日本"] * 5
    made = [train_bpe(texts, 300)._content]
    for options in ({}, {"unk_token": "<unk>"}):
        bpe = Made(models.BPE(**options))
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        special = ["</s>", *options.values()]
        bpe.train_from_iterator(texts[:2], trainers.BpeTrainer(vocab_size=60, special_tokens=special))
        made.append(bpe.to_str())
    words = Made(models.WordLevel({"seven": 0, "the": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer, words.normalizer = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    words.add_special_tokens(["<eos>"])
    unigram = Made(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<｜end▁of▁sentence｜>", "<unk>"], unk_token="<unk>"
    )
    unigram.train_from_iterator(texts, trainer)
    return (*made, words.to_str(), unigram.to_str())


def tokenizers(seed: int, folder: Path) -> None:
    """A changed tokenizer.json is refused, or its ids are the same alone, in batches and when loaded again."""
    random = np.random.default_rng(seed)
    content = chosen(random, _tokenizer_files())
    if random.random() < 0.7:
        content = json.dumps(_changed(json.loads(content), random))
    data = content.encode()
    path = folder / "tokenizer.json"
    path.write_bytes(mutated(data, random) if random.random() < 0.1 else data)
    named = chosen(random, [*[None] * 12, "</s>", "seven", "<unk>"])
    texts = [_text(random, half=True) for _ in range(3)]
    with refusals_name(path, *(repr(text[:200]) for text in texts), *map(_shown, texts)):
        tokenizer = tokenizer_from_spec(str(path), named)
        batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        require(
            ids.tolist() == tokenizer.encode(text).tolist(), f"{text!r} alone has other ids than in a batch"
        )
        require(not len(ids) or int(ids.max()) < tokenizer.vocabulary, "an id outside of the vocabulary")
        tokenizer.decode(ids)
        tokenizer.lost(text, ids)
    (folder / "saved").mkdir()
    entry = tokenizer.save(folder / "saved")
    again = tokenizer_from_spec(str(folder / "saved" / "tokenizer.json"), entry["eot"])
    require(
        (again.eot, again.fingerprint) == (tokenizer.eot, tokenizer.fingerprint),
        "another one when loaded again",
    )


def _shown(text: str) -> str:
    return repr(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")[:200])


def _changed(content: Any, random: np.random.Generator) -> Any:
    """JSON with one of its values exchanged, left out or put in twice, anywhere in it."""
    holder: Any = None
    key: Any = None
    inner = content
    while isinstance(inner, dict | list) and inner and (holder is None or random.random() < 0.8):
        holder = inner
        key = chosen(random, list(holder)) if isinstance(holder, dict) else int(random.integers(len(holder)))
        inner = holder[key]
    if holder is None:
        return content
    value = chosen(random, [None, 0, -1, 2**40, "", "a", "Ġ", [], {}, [1], True, 0.5, "delete", "twice"])
    if value == "delete":
        del holder[key]
    elif value == "twice" and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = value
    return content


@cache
def _codecs() -> tuple[PatchCodec, SpectralCodec]:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (20, 4, 4), dtype=np.uint8)
    waves = [random.uniform(-1, 1, 656).astype(np.float32) for _ in range(20)]
    return PatchCodec.train(list(pictures), 16, 2), SpectralCodec.train(waves, 8, Frames(), 2)


def codecs(seed: int, folder: Path) -> None:
    """A changed codec is refused: config and weights have a fingerprint together."""
    random = np.random.default_rng(seed)
    codec = chosen(random, list(_codecs()))
    codec.save(folder)
    path = folder / chosen(random, ["codec.json", "weights.safetensors"])
    if path.suffix == ".json" and random.random() < 0.6:
        path.write_text(json.dumps(_changed(json.loads(path.read_text()), random)))
    else:
        path.write_bytes(mutated(path.read_bytes(), random))
    with refusals_name(folder):
        found = load_codec(folder)
    require(found.fingerprint == codec.fingerprint, "a changed codec was taken")
    size = np.zeros((4, 4), np.uint8) if codec.modality == "image" else np.zeros(656, np.float32)
    require(np.array_equal(found.encode([size])[0], codec.encode([size])[0]), "it gives other codes")


def choices(seed: int, folder: Path) -> None:
    """Questions against Python's own reader."""
    random = np.random.default_rng(seed)
    texts = [_text(random, half=random.random() < 0.2) for _ in range(int(random.integers(1, 5)))]
    texts = [f"{number} {text}" for number, text in enumerate(texts)]
    record: dict[str, Any] = {"task": "text", "prompt": _text(random), "choices": texts, "answer": 0}
    if random.random() < 0.4:
        record = _changed(record, random)
    line = json.dumps(record, ensure_ascii=bool(random.integers(2))).encode("utf-8", "surrogatepass")
    line = chosen(
        random,
        [line] * 8 + [f'{{"task": "text", "x": {DEEP}}}'.encode(), b'{"task": "text", "task": "text"}', b""],
    )
    data = chosen(random, [b"", b"\xef\xbb\xbf", b"\n\n"]) + line + chosen(random, [b"", b"\n", b"\r\n"])
    data = mutated(data, random) if random.random() < 0.2 else data
    path = folder / "q.jsonl"
    path.write_bytes(data)
    with refusals_name(path):
        questions = read_questions(path)
    lines = [one for one in data.decode("utf-8-sig").split("\n") if one.strip()]
    require(len(questions) == len(lines), f"{len(questions)} questions of {len(lines)} lines")
    for question, one in zip(questions, lines, strict=True):
        told = json.loads(one)
        require(list(question.choices) == told["choices"], f"{question.choices} of {one!r}")
        wanted = told["answer"]
        right = wanted if isinstance(wanted, int) else told["choices"].index(wanted)
        require(
            question.right == right and question.begins == told.get("prompt", ""), f"{question} of {one!r}"
        )


@cache
def _prompt_tokenizers() -> tuple[Tokenizer, ...]:
    return BytesTokenizer(), train_bpe(["the seven small homes Größe", "a while over the sail"] * 5, 280)


PROMPTS = (
    *WORDS,
    HALF,
    "\udce9",
    "[MASK]",
    "[MASK",
    "<|endoftext|>",
    "\x00",
    "\x1b[31m",
    " " * 300,
    "é" * 200,
    "[bold]",
)


def prompts(seed: int, folder: Path) -> None:
    """A prompt's ids say the prompt, or it is refused."""
    random = np.random.default_rng(seed)
    prompt = chosen(random, ["", " "]).join(
        chosen(random, PROMPTS) for _ in range(int(random.integers(0, 6)))
    )
    tokenizer = chosen(random, list(_prompt_tokenizers()))
    requests = Requests(combine(tokenizer), {"text": {700: 3, 20: 1}}, 2000)
    tokens = chosen(random, [None, None, 1, 50, 5000])
    with refusals_name("--prompt", "--tokens", "a document of", "a text of"):
        check_prompts([prompt], tokenizer)
        canvas = requests.text(prompt, tokens, (seed, 0))
    vocabulary = requests.modalities.vocabulary
    ids = canvas.tokens_T.numpy()
    said = tokenizer.decode(ids[(ids != vocabulary.mask) & (ids != vocabulary.eot)])
    wanted = prompt.replace("[MASK]", "")
    require(said.replace(" ", "") == wanted.replace(" ", ""), f"{said!r} of {prompt!r}")


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
        text = f"text {number} {_text(random)}"
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
        caption = f"{number} {_text(random)}".strip()
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


FUZZERS = [
    Fuzzer("builds", builds),
    Fuzzer("pairs", pairs),
    Fuzzer("jsonl", jsonl),
    Fuzzer("tars", tars),
    Fuzzer("folders", folders),
    Fuzzer("captions", captions),
    Fuzzer("pictures", pictures),
    Fuzzer("sounds", sounds),
    Fuzzer("tokenizers", tokenizers),
    Fuzzer("codecs", codecs),
    Fuzzer("choices", choices),
    Fuzzer("prompts", prompts),
]
