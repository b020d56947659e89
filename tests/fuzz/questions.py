"""Fuzzers of what a trained model is asked: choices and prompts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.modalities import combine
from data_pipelines.tokens.tokenizer import Tokenizer
from data_pipelines.tokens.tokenizer_training import train_bpe
from pretrain.commands.choices import read_questions
from pretrain.generate.prompts import check_prompts
from pretrain.generate.requests import Requests
from tests.fuzz.base import Fuzzer, chosen, mutated, refusals_name, require
from tests.fuzz.texts import DEEP, HALF, WORDS, changed_json, text_of_words


def choices(seed: int, folder: Path) -> None:
    """Questions against Python's own reader."""
    random = np.random.default_rng(seed)
    texts = [text_of_words(random, half=random.random() < 0.2) for _ in range(int(random.integers(1, 5)))]
    texts = [f"{number} {text}" for number, text in enumerate(texts)]
    record: dict[str, Any] = {"task": "text", "prompt": text_of_words(random), "choices": texts, "answer": 0}
    if random.random() < 0.4:
        record = changed_json(record, random)
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


FUZZERS = [Fuzzer("choices", choices), Fuzzer("prompts", prompts)]
