"""Files of questions and prompts: text as it is, or an error that names file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines.tokens.bpe_tokenizer import BpeTokenizer
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.modalities import combine
from pretrain.commands.choices import answers_of, read_questions
from pretrain.errors import UserError
from pretrain.generate.prompts import check_prompts
from pretrain.generate.requests import Requests
from tests.data_pipelines.test_tokenizer_files import lowercase

QUESTION = {
    "task": "text",
    "prompt": "two plus two equals",
    "choices": ["four", "five\u2028six"],
    "answer": "four",
}


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_separators_are_text_and_a_mark_is_none(tmp_path: Path, ascii_only: bool, mark: bytes) -> None:
    line = json.dumps(QUESTION, ensure_ascii=ascii_only).encode()
    (tmp_path / "q.jsonl").write_bytes(mark + line + b"\r\n\n" + line)
    questions = read_questions(tmp_path / "q.jsonl")
    assert [question.choices for question in questions] == [("four", "five\u2028six")] * 2
    assert [question.where[-6:] for question in questions] == ["line 1", "line 3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"task": "text", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: JSON nested too deep"),
        (
            json.dumps({**QUESTION, "prompt": "two \ud800"}).encode(),
            "line 1: prompt holds half a surrogate pair",
        ),
        (
            json.dumps({**QUESTION, "choices": ["\ud800", "\udfff"]}).encode(),
            "line 1: choices holds half a surrogate",
        ),
        (b'{"task": "text", "answer": 0, "answer": 1}', 'line 1: the key "answer" stands in it twice'),
        (b"\xff", "line 1: not UTF-8"),
        (b"1" * 5000, "line 1: not JSON"),
        (b"[1]", "line 1: an object with keys"),
        (b"\n \n", "holds no question"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "q.jsonl").write_bytes(line)
    with pytest.raises(UserError, match=rf"--choices .*q\.jsonl.*{message}"):
        read_questions(tmp_path / "q.jsonl")


def test_a_choice_that_the_tokenizer_cannot_say_is_refused(tmp_path: Path) -> None:
    """Without their capitals, two choices could become one text."""
    (tmp_path / "q.jsonl").write_text(json.dumps({**QUESTION, "choices": ["a", "Aa"], "answer": 0}))
    (question,) = read_questions(tmp_path / "q.jsonl")
    requests = Requests(combine(BpeTokenizer(lowercase(False), "file")), {"text": {9: 1, 8: 1}}, 99)
    with pytest.raises(
        UserError, match="line 1: 'two plus two equals Aa': the tokenizer has no token for 'A'"
    ):
        answers_of(question, requests)
    assert len(answers_of(question, Requests(combine(BytesTokenizer()), {}, 99))) == 2


def test_prompts_are_utf8_and_what_the_model_does_not_see_of_them_is_told(caplog) -> None:  # type: ignore[no-untyped-def]
    check_prompts(["café \ufffd", ""], BytesTokenizer())
    assert not caplog.records
    check_prompts(["der Bär"], BpeTokenizer(lowercase(True), "file"))
    assert "no token for 'Bä'" in caplog.text
    for prompt in ("caf\udce9", "\ud800"):
        with pytest.raises(UserError, match="--prompt '.*\ufffd': not UTF-8"):
            check_prompts(["good", prompt], BytesTokenizer())
