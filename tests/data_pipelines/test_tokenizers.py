"""Tokenizers: round trips, identical ids from both BPE engines, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex as HuggingFaceRegex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipelines.errors import DataError
from data_pipelines.tokens.bpe_tokenizer import BpeTokenizer
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.tiktoken_encoder import HARD_TEXTS
from data_pipelines.tokens.tokenizer_files import EOT
from data_pipelines.tokens.tokenizer_loading import tokenizer_from_spec
from data_pipelines.tokens.tokenizer_training import bpe_size, train_bpe

TEXT = [
    "def f(x): return x + 1\n" * 20,
    "Der Bär läuft durch Größe und Maß. " * 20,
    "Привет мир, 你好世界 hello world 12345 " * 20,
    "the quick brown fox jumps over the lazy dog; don't they're we'll " * 20,
]
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return train_bpe(TEXT, 350)


def test_bpe_has_the_asked_size_and_encodes_through_tiktoken(bpe: BpeTokenizer) -> None:
    assert bpe.vocabulary == 350 and bpe.engine == "tiktoken" and bpe.eot == 0
    assert len(bpe.encode(TEXT[3])) < len(TEXT[3]) / 2


@given(st.text(max_size=200))
@settings(deadline=None, max_examples=300)
def test_both_engines_give_the_same_ids_for_any_text(bpe: BpeTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert np.array_equal(ids, bpe.encode_reference(text))
    assert bpe.decode(ids) == text


@pytest.mark.parametrize("text", [*TEXT, *HARD_TEXTS, "a<|endoftext|>b"])
def test_both_engines_give_the_same_ids_for_hard_texts(bpe: BpeTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert np.array_equal(ids, bpe.encode_reference(text))
    assert np.array_equal(ids, bpe.encode_batch([text, "x"])[0])
    assert bpe.eot not in ids and bpe.decode(ids) == text


@given(st.text(max_size=100))
@settings(deadline=None)
def test_bytes_go_round(text: str) -> None:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and tokenizer.decode(ids) == text
    assert tokenizer.decode([65, 256, 66]) == f"A{EOT}B"


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer, special: str | None = EOT) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [special] if special else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


def test_a_file_with_its_own_pattern_goes_through_tiktoken(tmp_path: Path) -> None:
    split = pre_tokenizers.Split(HuggingFaceRegex(GPT4_PATTERN), "isolated")
    steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    path = tmp_path / "tokenizer.json"
    path.write_text(trained(pre_tokenizers.Sequence(steps)))
    tokenizer = tokenizer_from_spec(str(path))
    assert isinstance(tokenizer, BpeTokenizer) and tokenizer.engine == "tiktoken"
    for text in [*TEXT, *HARD_TEXTS]:
        assert np.array_equal(tokenizer.encode(text), tokenizer.encode_reference(text))


def test_a_file_that_tiktoken_cannot_follow_goes_through_its_own_library() -> None:
    tokenizer = BpeTokenizer(trained(pre_tokenizers.ByteLevel(add_prefix_space=True)), "file")
    assert tokenizer.engine == "tokenizers"
    assert np.array_equal(tokenizer.encode("a b"), tokenizer.encode_batch(["a b"])[0])


def test_merges_out_of_the_order_of_ids_are_left_to_the_library(bpe: BpeTokenizer) -> None:
    spec = json.loads(bpe._content)
    spec["model"]["merges"].reverse()
    assert BpeTokenizer(json.dumps(spec), "file").engine == "tokenizers"


def test_truncation_and_padding_of_a_file_are_not_applied(bpe: BpeTokenizer) -> None:
    texts = [TEXT[0], "x"]
    for change in (lambda t: t.enable_truncation(8), lambda t: t.enable_padding(length=4000)):
        for fast in (True, False):
            changed = Tokenizer.from_str(bpe._content)
            change(changed)
            if not fast:
                changed.add_tokens(["no such word"])
            tokenizer = BpeTokenizer(changed.to_str(), "file")
            assert tokenizer.engine == ("tiktoken" if fast else "tokenizers")
            for encoded in (tokenizer.encode_batch(texts), [tokenizer.encode(text) for text in texts]):
                assert [tokenizer.decode(ids) for ids in encoded] == texts


@pytest.mark.parametrize("text", [" " * 1_500_000, "a" + "\n " * 60_000 + "b"])
def test_long_whitespace_is_encoded(bpe: BpeTokenizer, text: str) -> None:
    for ids in (bpe.encode(text), bpe.encode_batch(["x", text])[1]):
        assert bpe.decode(ids) == text


def test_an_end_of_text_token_that_is_not_special_is_refused(bpe: BpeTokenizer) -> None:
    spec = json.loads(bpe._content)
    spec["added_tokens"][0]["special"] = False
    with pytest.raises(DataError, match=r"file: its end-of-text token <\|endoftext\|> is an ordinary token"):
        BpeTokenizer(json.dumps(spec), "file")
    spec["added_tokens"] = []
    with pytest.raises(DataError, match="is an ordinary token"):
        BpeTokenizer(json.dumps(spec), "file")


@pytest.mark.parametrize(
    ("spec", "text"),
    [("bpe", "bpe:N"), ("bpe:x", "bpe:N"), ("bpe:256", "at least 257")],
)
def test_bad_sizes_are_refused(spec: str, text: str) -> None:
    with pytest.raises(DataError, match=text):
        bpe_size(spec)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        tokenizer_from_spec(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: not a Hugging Face tokenizer"):
        tokenizer_from_spec(str(tmp_path / "bad.json"))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match=r"binary\.json: not a Hugging Face tokenizer"):
        tokenizer_from_spec(str(tmp_path / "binary.json"))
    with pytest.raises(DataError, match=r"no tokenizer\.json in it"):
        tokenizer_from_spec(str(tmp_path))
    (tmp_path / "open.json").write_text(trained(pre_tokenizers.ByteLevel(), special=None))
    with pytest.raises(DataError, match=r"open\.json: no end-of-text token"):
        tokenizer_from_spec(str(tmp_path / "open.json"))


def test_a_folder_that_holds_a_tokenizer_file_is_a_tokenizer(bpe: BpeTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe._content)
    assert tokenizer_from_spec(str(tmp_path)).fingerprint == bpe.fingerprint


def test_a_tiny_corpus_gives_a_smaller_vocabulary() -> None:
    assert 257 <= train_bpe(["abab"], 5000).vocabulary < 300
