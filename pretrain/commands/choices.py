"""`triptych evaluate RUN --choices FILE`: questions with several answers, of which one is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_pipelines.errors import DataError
from data_pipelines.prepare.pair_writer import fill_text
from data_pipelines.raw.json_text import has_surrogate, json_lines
from data_pipelines.tokens.roles import TASK_NAMES
from data_pipelines.tokens.tokenizer import Tokenizer
from data_pipelines.tokens.vocabulary import TASKS
from pretrain.checkpoint_reader import TrainedModel, load_trained_model
from pretrain.commands.console import plain_console
from pretrain.errors import UserError
from pretrain.generate.canvas import canvas
from pretrain.generate.denoiser import model_denoiser
from pretrain.generate.lengths import load_lengths
from pretrain.generate.prompts import lost_characters
from pretrain.generate.requests import FREE_TEXT, Requests
from pretrain.json_text import to_json
from pretrain.likelihood import Answer, Likelihood, Share, Verdict, choose
from pretrain.run_folder import find_run

WAYS = ("elbo", "confidence")
KEYS = {"task", "condition", "prompt", "choices", "answer"}


@dataclass(frozen=True)
class Question:
    """One line of the file.

    begins: the condition's text or file, or the beginning of the text.
    right: the number of the right choice.
    """

    task: str
    begins: str
    choices: tuple[str, ...]
    right: int
    where: str


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSON Lines file. Raises UserError that names file and line."""
    try:
        with path.open("rb") as file:
            if file.peek(2).startswith(b"\x1f\x8b"):
                raise UserError(f"--choices {path}: packed by gzip; unpack it first")
            lines = list(json_lines(file, lambda number: f"--choices {path}, line {number}"))
    except OSError as error:
        raise UserError(f"--choices {path}: cannot be read ({error.strerror or error})") from None
    except DataError as error:
        raise UserError(str(error)) from None
    if not lines:
        raise UserError(f"--choices {path}: holds no question")
    return [_question(content, where, path.parent) for where, content in lines]


def _question(content: Any, where: str, folder: Path) -> Question:
    if not isinstance(content, dict) or not content.keys() <= KEYS:
        raise UserError(f"{where}: an object with keys of {', '.join(sorted(KEYS))} is wanted")
    task, choices = content.get("task"), content.get("choices", [])
    if task not in TASK_NAMES:
        raise UserError(f"{where}: task {task!r} is not one of {', '.join(TASK_NAMES)}")
    _refuse_half_characters(content, where)
    good = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not good or len(choices) < 2 or len(set(choices)) < len(choices):
        raise UserError(f"{where}: choices must be a list of two or more different texts")
    key = "prompt" if task == FREE_TEXT else "condition"
    begins = content.get(key, "" if task == FREE_TEXT else None)
    if not isinstance(begins, str):
        raise UserError(
            f"{where}: {task} needs a {key}, " + ("a text" if key == "prompt" else "a file's name")
        )
    if task != FREE_TEXT and TASKS[task][1] != "text":
        raise UserError(f"{where}: choices are texts, and {task} makes no text")
    if task != FREE_TEXT:
        begins = str(folder / begins)
    return Question(task, begins, tuple(choices), _right(content.get("answer"), choices, where), where)


def _refuse_half_characters(content: dict[str, Any], where: str) -> None:
    """Raises UserError for half a surrogate pair: repaired, two choices could become one."""
    for key, value in content.items():
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and has_surrogate(text) for text in texts):
            raise UserError(
                f"{where}: {key} holds half a surrogate pair (\\ud800 to \\udfff), which is no text; mend it"
            )


def _right(answer: Any, choices: list[str], where: str) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise UserError(f"{where}: answer {answer!r} is neither a choice nor the number of one from 0")


def answers_of(question: Question, requests: Requests) -> list[Answer]:
    """What each choice would put into the question's document. Raises UserError that names the line."""
    try:
        return [_answer(question, choice, requests) for choice in question.choices]
    except (UserError, DataError) as error:
        raise UserError(f"{question.where}: {error}") from None


def _answer(question: Question, choice: str, requests: Requests) -> Answer:
    modalities, vocabulary = requests.modalities, requests.modalities.vocabulary
    slot = requests.slot(question.task)
    if question.task == FREE_TEXT:
        begun = modalities.text_ids(question.begins)
        # One text, encoded as a whole: tokens of the choice alone may be cut otherwise.
        text = f"{question.begins} {choice}".strip()
        whole = modalities.text_ids(text)
        _refuse_lost(text, modalities.tokenizer)
        if whole[: len(begun)].tolist() != begun.tolist():
            raise UserError(f"{question.begins!r} ends inside a token of {choice!r}; end it at a word")
        ids = _filled(whole, slot, vocabulary.eot)[len(begun) :]
        blank = canvas(vocabulary, [*begun.tolist(), *[vocabulary.mask] * len(ids)])
        return Answer(blank, torch.from_numpy(ids))
    ids = _filled(modalities.text_ids(choice), slot, vocabulary.eot)
    _refuse_lost(choice, modalities.tokenizer)
    return Answer(requests.pair(question.task, question.begins, len(ids)), torch.from_numpy(ids))


def _refuse_lost(text: str, tokenizer: Tokenizer) -> None:
    """Raises UserError for characters without a token: another text would be judged."""
    lost = lost_characters(text, tokenizer)
    if lost:
        raise UserError(
            f"{text[:80]!r}: the tokenizer has no token for {lost!r}, so another text would be judged"
        )


def _filled(ids: np.ndarray, slot: int | None, eot: int) -> np.ndarray:
    """A text as the run's data has it, with end-of-text behind."""
    if slot is not None and len(ids) >= slot:
        raise UserError(
            f"a choice makes a text of {len(ids)} tokens and end-of-text; this run's texts have {slot} in all"
        )
    return fill_text(ids, slot, eot, "a choice")


def print_choices(
    run: str, path: str, by: str, *, draws: int, step: int | None, device: str, json_output: bool
) -> None:
    """Accuracy on the questions of a file, by task. Raises UserError for another run than one of masked diffusion."""
    if by not in WAYS:
        raise UserError(f"--by {by}: one of {', '.join(WAYS)}")
    questions = read_questions(Path(path))
    folder = find_run(run)
    trained = load_trained_model(folder, step, device)
    if trained.modalities is None:
        raise UserError(f"--choices {path}: for runs of masked diffusion, and {run} is none")
    requests = Requests(
        trained.modalities, load_lengths(folder.tokenizer), trained.config.data.sequence_length
    )
    right: dict[str, list[bool]] = {}
    verdicts = []
    shown = track(
        _verdicts(trained, requests, questions, by, draws),
        "answering",
        total=len(questions),
        console=Console(stderr=True),
        transient=True,
    )
    for question, verdict in zip(questions, shown, strict=True):
        right.setdefault(question.task, []).append(verdict.chosen == question.right)
        verdicts.append(verdict)
    shares = {task: Share(sum(marks), len(marks)) for task, marks in right.items()}
    if json_output:
        _print_json(run, trained.step, by, shares, verdicts)
    else:
        _print_table(f"{run}, step {trained.step}, by {by}", shares)


def _verdicts(
    trained: TrainedModel, requests: Requests, questions: list[Question], by: str, draws: int
) -> Iterator[Verdict]:
    vocabulary = requests.modalities.vocabulary
    likelihood = Likelihood(model_denoiser(trained.model, vocabulary), vocabulary, trained.device)
    for number, question in enumerate(questions):
        answers = answers_of(question, requests)
        yield choose(likelihood, answers, by=by, draws=draws, seed=number)


def _print_json(run: str, step: int, by: str, shares: dict[str, Share], verdicts: list[Verdict]) -> None:
    tasks = {
        task: {
            "right": share.right,
            "count": share.count,
            "accuracy": share.share,
            "interval": share.interval,
        }
        for task, share in shares.items()
    }
    chosen = [
        {"chosen": one.chosen, "nats": [estimate.nats for estimate in one.estimates]} for one in verdicts
    ]
    print(to_json({"run": run, "step": step, "by": by, "accuracy": tasks, "questions": chosen}))


def _print_table(title: str, shares: dict[str, Share]) -> None:
    table = Table("task", "right", "questions", "accuracy", "95 % interval", title=title)
    for task, share in shares.items():
        low, high = share.interval
        cells = (f"{share.right:,}", f"{share.count:,}", f"{100 * share.share:.1f} %")
        table.add_row(task, *cells, f"{100 * low:.1f} to {100 * high:.1f} %")
    plain_console().print(table)
