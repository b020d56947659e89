"""Tokenizers of others: what they lack is told, their end-of-text can be named, training takes linear time."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_pipelines.errors import DataError
from data_pipelines.prepare.pair_options import PairOptions
from data_pipelines.prepare.pairs import build_pairs
from data_pipelines.prepare.text import BuildOptions, build, held_bytes
from data_pipelines.raw.report import Report
from data_pipelines.storage.dataset import open_dataset
from data_pipelines.tokens.bpe_tokenizer import BpeTokenizer
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.modalities import load_modalities
from data_pipelines.tokens.tokenizer_files import end_of_text_name
from data_pipelines.tokens.tokenizer_loading import load_tokenizer, tokenizer_from_spec
from data_pipelines.tokens.tokenizer_training import UNBROKEN, train_bpe, unbroken_pieces
from pretrain.run_folder import RunFolder
from tests.data_pipelines.helpers import write_jsonl
from tests.data_pipelines.test_sources import put, samples

TEXT = "Die GRÖSSE ist 3 Meter, ÄÖÜ und 日本 hello"
LOST = Counter("DGRÖSSE3M,ÄÖÜ日本")


def lowercase(unknown: bool, kind: str = "metaspace") -> str:
    """A BPE with the letters a to z alone: without an unknown token it drops what it lacks."""
    special = ["<unk>", "</s>"] if unknown else ["</s>"]
    letters = [*special, "\u2581" if kind == "metaspace" else "Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    made = Tokenizer(models.BPE(vocabulary, [], **({"unk_token": "<unk>"} if unknown else {})))
    if kind == "metaspace":
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        made.pre_tokenizer, made.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    made.add_special_tokens(special)
    return made.to_str()


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
def test_characters_without_a_token_are_counted(unknown: bool, kind: str) -> None:
    tokenizer = BpeTokenizer(lowercase(unknown, kind), "file")
    for ids in (tokenizer.encode(TEXT), tokenizer.encode_batch([TEXT, "x"])[0]):
        assert tokenizer.lost(TEXT, ids) == LOST
    assert tokenizer.lost("hello und", tokenizer.encode("hello und")) == Counter()
    tab = tokenizer.lost("a\tb", tokenizer.encode("a\tb"))
    assert tab == (Counter("\t") if kind == "bytes" else Counter()), (
        "white space counts where tokens are bytes"
    )


def test_a_tokenizer_of_all_bytes_loses_nothing_and_one_that_folds_case_neither() -> None:
    for tokenizer in (BytesTokenizer(), train_bpe(["abc"] * 3, 300)):
        assert tokenizer.lost(TEXT, tokenizer.encode(TEXT)) == Counter()
    folds = Tokenizer.from_str(lowercase(True))
    folds.normalizer = normalizers.Lowercase()
    tokenizer = BpeTokenizer(folds.to_str(), "file")
    assert tokenizer.lost("DIE Grosse", tokenizer.encode("DIE Grosse")) == Counter()
    assert tokenizer.rewrites("DIE Grosse") and not tokenizer.rewrites("die  grosse")
    composes = Tokenizer.from_str(train_bpe(["abc"] * 3, 300)._content)
    composes.normalizer = normalizers.NFC()
    tokenizer = BpeTokenizer(composes.to_str(), "file")
    assert tokenizer.rewrites("e\u0301") and not tokenizer.rewrites("\u00e9")
    assert tokenizer.lost("e\u0301", tokenizer.encode("e\u0301")) == Counter()
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = trainers.UnigramTrainer(vocab_size=40, special_tokens=["</s>", "<unk>"], unk_token="<unk>")
    unigram.train_from_iterator(["the seven small homes"] * 9, special)
    tokenizer = BpeTokenizer(unigram.to_str(), "file")
    assert tokenizer.lost("the Ö home", tokenizer.encode("the Ö home")) == Counter("Ö")


@pytest.mark.parametrize("unknown", [False, True])
def test_a_build_tells_what_is_lost_and_bits_per_byte_leave_it_out(tmp_path: Path, unknown: bool) -> None:
    (tmp_path / "t.json").write_text(lowercase(unknown))
    source = write_jsonl(tmp_path / "in.jsonl", [TEXT] * 3)
    options = BuildOptions(str(tmp_path / "t.json"), validation_fraction=0)
    built = build(source, tmp_path / "out", options)
    (line,) = built.report.lines()
    assert (
        line.startswith(f"lost: {3 * LOST.total()} character(s) for which the tokenizer has no token")
        and "Ö" in line
    )
    bytes_lost = sum(len(character.encode()) * count for character, count in LOST.items())
    assert open_dataset(tmp_path / "out").split("train").text_bytes == 3 * (len(TEXT.encode()) - bytes_lost)
    with pytest.raises(DataError, match="--strict(.|\n)*lost: "):
        build(source, tmp_path / "strict", BuildOptions(str(tmp_path / "t.json"), strict=True))
    folder = put(tmp_path / "pairs", samples("a", "B"))
    pairs = PairOptions(image_codec="patch:8:2", tokenizer=str(tmp_path / "t.json"))
    assert build_pairs(folder, tmp_path / "out2", pairs).report.lost.examples == {
        "character(s) for which the tokenizer has no token": f"'B' in {folder}/B.png"
    }


def test_texts_that_a_tokenizer_rewrites_are_told(tmp_path: Path) -> None:
    folds = Tokenizer.from_str(lowercase(True))
    folds.normalizer = normalizers.Lowercase()
    (tmp_path / "t.json").write_text(folds.to_str())
    source = write_jsonl(tmp_path / "in.jsonl", ["Hello und", "hello und", "hello Und"])
    built = build(source, tmp_path / "out", BuildOptions(str(tmp_path / "t.json"), validation_fraction=0))
    assert (
        built.report.changed.counts == {"rewritten by the tokenizer's normalizer": 2}
        and not built.report.lost.counts
    )


def test_bytes_of_a_text_that_a_normalizer_takes_apart_or_shortens(tmp_path: Path) -> None:
    apart = Tokenizer.from_str(lowercase(True))
    apart.normalizer = (
        normalizers.NFKD()
    )  # one character of three bytes becomes eighteen, of which three blanks have a token
    shorter = Tokenizer.from_str(lowercase(True))
    shorter.normalizer = normalizers.Replace("z", "")
    for made, text, held in ((apart, "ab \ufdfa", 6), (shorter, "abzzz", 2)):
        tokenizer = BpeTokenizer(made.to_str(), "file")
        assert held_bytes(tokenizer, text, tokenizer.encode(text), Report(), "here") == held


def test_byte_lengths_are_those_of_the_text() -> None:
    text = "Grüße 日本 and more words"
    for tokenizer in (BytesTokenizer(), train_bpe([text] * 3, 300)):
        lengths = tokenizer.byte_lengths()
        assert lengths is not None
        assert len(lengths) == tokenizer.vocabulary and lengths[tokenizer.eot] == 0
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert BpeTokenizer(lowercase(True), "file").byte_lengths() is None


def test_half_a_surrogate_pair_is_a_replacement_character_alone_and_in_batches() -> None:
    text, repaired = "caf\udce9 \ud800 \ud83d\ude00", "caf\ufffd \ufffd \U0001f600"
    for tokenizer in (BytesTokenizer(), train_bpe(["abc"] * 3, 300), BpeTokenizer(lowercase(True), "file")):
        wanted = tokenizer.encode(repaired)
        assert np.array_equal(tokenizer.encode(text), wanted)
        assert np.array_equal(tokenizer.encode_batch(["x", text])[1], wanted)


def byte_level(*special: str) -> str:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["abc"], trainers.BpeTrainer(special_tokens=list(special), initial_alphabet=alphabet)
    )
    return made.to_str()


@pytest.mark.parametrize(
    "name",
    [
        "<｜end▁of▁sentence｜>",
        "[EOS]",
        "<|EOT|>",
        "<EOD>",
        "</s>",
        "<|end_of_text|>",
        "<EOS_TOKEN>",
        "<|endofdocument|>",
    ],
)
def test_usual_names_of_end_of_text_are_known(name: str) -> None:
    tokenizer = BpeTokenizer(byte_level("<｜begin▁of▁sentence｜>", name, "<|im_start|>"), "file")
    assert (tokenizer.eot_name, tokenizer.eot) == (name, 1)


def test_an_end_of_text_token_can_be_named_and_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(byte_level("<|pad|>", "<|stop|>", "<|endoftext|>"))
    usual, named = tokenizer_from_spec(str(path)), tokenizer_from_spec(str(path), "<|stop|>")
    assert (usual.eot, named.eot) == (2, 1) and usual.fingerprint != named.fingerprint
    assert tokenizer_from_spec(str(path), "<|endoftext|>").fingerprint == usual.fingerprint
    source = write_jsonl(tmp_path / "in.jsonl", ["one", "two", "three"])
    built = build(source, tmp_path / "out", BuildOptions(str(path), end_of_text="<|stop|>"))
    assert built.dataset.eot == 1
    again = load_tokenizer(tmp_path / "out")
    assert (again.eot, again.fingerprint) == (1, named.fingerprint)
    taken = build(source, tmp_path / "out2", BuildOptions(str(tmp_path / "out")))
    assert taken.dataset.eot == 1, "a dataset's tokenizer has the end-of-text of the dataset"
    folder = put(tmp_path / "pairs", samples("a", "b"))
    options = PairOptions(image_codec="patch:8:2", tokenizer=str(path), end_of_text="<|stop|>")
    build_pairs(folder, tmp_path / "out3", options)
    modalities = load_modalities(tmp_path / "out3" / "image-to-text")
    assert modalities.tokenizer.eot == modalities.vocabulary.eot == 1
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.save_tokenizer(again)
    assert run.load_tokenizer().fingerprint == named.fingerprint
    for spec in (
        run.tokenizer,
        run.tokenizer / "tokenizer.json",
    ):  # as `triptych evaluate` says to rebuild with
        assert tokenizer_from_spec(str(spec)).fingerprint == named.fingerprint


@pytest.mark.parametrize(
    ("spec", "name", "message"),
    [
        (
            "t.json",
            "<|nothing|>",
            r"t\.json: --end-of-text <\|nothing\|>: not in it. Its special tokens are <\|pad\|>, <\|stop",
        ),
        ("t.json", "a", r"--end-of-text a: an ordinary token"),
        ("t.json", None, r"t\.json: no end-of-text token; name one of its special tokens with --end-of-text"),
        ("two.json", None, r"two\.json: \[EOS\] and <EOD> could end a text. Say which with --end-of-text"),
        ("bytes", "a", "--end-of-text a: the tokenizer bytes has its own"),
        ("bpe:300", "a", "--end-of-text a: bpe:300 gets its own"),
    ],
)
def test_what_cannot_end_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, name: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.json").write_text(byte_level("<|pad|>", "<|stop|>"))
    Path("two.json").write_text(byte_level("[EOS]", "<EOD>"))
    with pytest.raises(DataError, match=message):
        build(
            write_jsonl(tmp_path / "in.jsonl", ["a", "b"]),
            tmp_path / "out",
            BuildOptions(spec, end_of_text=name),
        )


def test_a_recorded_end_of_text_must_still_be_special() -> None:
    spec = {"added_tokens": [{"content": "a", "special": True}]}
    assert end_of_text_name(spec, {"a": 5}, "f", 5) == ("a", True)
    twice = {"added_tokens": [{"content": "</s>", "special": True}] * 2}
    assert end_of_text_name(twice, {"</s>": 5}, "f", 5) == end_of_text_name(twice, {"</s>": 5}, "f", None)
    with pytest.raises(DataError, match="its token 6, recorded as end-of-text, is no special one"):
        end_of_text_name(spec, {"a": 5, "b": 6}, "f", 6)


@pytest.mark.parametrize("change", [{"a": 0, "b": 0}, {"a": 2**31}, {}])
def test_ids_that_cannot_be_are_refused(change: dict[str, int]) -> None:
    spec = json.loads(lowercase(False))
    spec["model"]["vocab"] = change
    spec["added_tokens"] = []
    with pytest.raises(
        DataError, match="file: (the token|a tokenizer without tokens|not a Hugging Face|no end-of-text)"
    ):
        BpeTokenizer(json.dumps(spec), "file")


def test_a_byte_level_vocabulary_without_all_bytes_does_not_reach_the_engine_that_panics() -> None:
    spec = json.loads(train_bpe(["abc"] * 3, 300)._content)
    del spec["model"]["vocab"]["Ã"]
    tokenizer = BpeTokenizer(json.dumps(spec), "file")
    assert tokenizer.engine == "tokenizers" and tokenizer.lost("é", tokenizer.encode("é")) == Counter("é")


def test_unbroken_text_is_cut_for_training_and_nothing_is_lost() -> None:
    text = "word " * 50 + "A" * 1000 + " more\n" + " " * 700 + "end"
    pieces = list(unbroken_pieces(text))
    assert "".join(pieces) == text and len(pieces) > 5
    assert max(len(run) for piece in pieces for run in piece.split()) <= UNBROKEN
    assert list(unbroken_pieces("plain words\n" * 1000)) == ["plain words\n" * 1000]


def test_training_on_text_without_blanks_takes_time_in_proportion() -> None:
    """Four times the text in far less than the sixteen-fold time of one word that long."""
    random = np.random.default_rng(0)

    def seconds(characters: int) -> float:
        text = "".join(random.choice(list("ACGT"), characters))
        start = time.process_time()
        train_bpe([text], 400)
        return time.process_time() - start

    seconds(10_000)
    assert seconds(400_000) < 8 * seconds(100_000)
