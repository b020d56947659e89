"""Fuzzers of tokenizers and codecs in files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from data_pipelines.codecs import PatchCodec, SpectralCodec, load_codec
from data_pipelines.codecs.spectral import Frames
from data_pipelines.tokens.tokenizer_loading import tokenizer_from_spec
from data_pipelines.tokens.tokenizer_training import train_bpe
from tests.fuzz.base import Fuzzer, chosen, mutated, refusals_name, require
from tests.fuzz.texts import changed_json, text_of_words


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
        content = json.dumps(changed_json(json.loads(content), random))
    data = content.encode()
    path = folder / "tokenizer.json"
    path.write_bytes(mutated(data, random) if random.random() < 0.1 else data)
    named = chosen(random, [*[None] * 12, "</s>", "seven", "<unk>"])
    texts = [text_of_words(random, half=True) for _ in range(3)]
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
        path.write_text(json.dumps(changed_json(json.loads(path.read_text()), random)))
    else:
        path.write_bytes(mutated(path.read_bytes(), random))
    with refusals_name(folder):
        found = load_codec(folder)
    require(found.fingerprint == codec.fingerprint, "a changed codec was taken")
    size = np.zeros((4, 4), np.uint8) if codec.modality == "image" else np.zeros(656, np.float32)
    require(np.array_equal(found.encode([size])[0], codec.encode([size])[0]), "it gives other codes")


FUZZERS = [Fuzzer("tokenizers", tokenizers), Fuzzer("codecs", codecs)]
