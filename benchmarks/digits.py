"""What the digits model has learned: every task, judged by what knows nothing of the model.

python -m benchmarks.digits digits --out runs/digits/report           # about a minute on one core
python -m benchmarks.digits digits --samples 1000 --sweep             # the image samplers side by side

Pictures of a digit by a classifier that was fitted on real digits, with how varied they are beside it; sounds by a tone
detector; answers in text by exact match with the test split; free text by whether it is true. `--out FOLDER` gets
report.json, a contact sheet of pictures and a sound of each digit.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import save
from data_pipelines.digits.images import load_digits
from data_pipelines.digits.judges import (
    ImageJudge,
    detect_digit,
    is_number_word,
    is_sentence,
    is_true_sentence,
    nearest_neighbour_distance,
    within_class_distance,
)
from data_pipelines.digits.sentences import WORDS
from data_pipelines.digits.tones import SAMPLE_RATE, make_tones
from data_pipelines.rows.cut_rows import Source, open_sources
from data_pipelines.rows.whole_rows import WholeEvaluation
from data_pipelines.tokens.modalities import Modalities
from pretrain.checkpoint_reader import TrainedModel, load_trained_model
from pretrain.config.objective import MaskedDiffusionSection
from pretrain.generate.canvas import canvas
from pretrain.generate.denoiser import model_denoiser
from pretrain.generate.diffusion import Sampler
from pretrain.generate.documents import Document, documents_of
from pretrain.generate.lengths import load_lengths
from pretrain.generate.media import contact_sheet, write_image, write_sound
from pretrain.generate.requests import Requests
from pretrain.generate.settings import DEFAULTS, SamplerSettings, settings_for
from pretrain.likelihood import Share
from pretrain.run_folder import find_run

ROWS_AT_ONCE = 64
FEWEST = 2 * len(WORDS)
"""Samples: how varied pictures are takes two of each digit."""
SHEET_COLUMNS = 10
IMAGE_SAMPLERS = {
    "ancestral": SamplerSettings(sampler="ancestral"),
    "first hitting, w 1.5": SamplerSettings(sampler="first_hitting", guidance=1.5),
    "ancestral, w 1.5": DEFAULTS["image"],
    "ancestral, w 2": SamplerSettings(sampler="ancestral", guidance=2.0),
    "confidence": SamplerSettings(gumbel=1.0),
    "confidence, w 1.5": SamplerSettings(gumbel=1.0, guidance=1.5),
    "confidence, Gumbel 4": SamplerSettings(gumbel=4.0),
    "confidence, Gumbel 4, w 1.25": SamplerSettings(gumbel=4.0, guidance=1.25),
    "confidence, Gumbel 4, w 1.5": SamplerSettings(gumbel=4.0, guidance=1.5),
    "confidence, Gumbel 8, w 1.5": SamplerSettings(gumbel=8.0, guidance=1.5),
}
REPORTED = "ancestral, w 1.5"


@dataclass(frozen=True)
class Model:
    trained: TrainedModel
    modalities: Modalities
    requests: Requests

    def fill(self, tokens: Sequence[list[int]], settings: SamplerSettings) -> Iterator[Any]:
        """What the model makes of documents with [MASK]s: texts, pictures or sounds."""
        vocabulary = self.modalities.vocabulary
        denoiser = model_denoiser(self.trained.model, vocabulary)
        sampler = Sampler(denoiser, vocabulary, settings, self.trained.device, rows_at_once=ROWS_AT_ONCE)
        for start in range(0, len(tokens), ROWS_AT_ONCE):
            some = [canvas(vocabulary, document) for document in tokens[start : start + ROWS_AT_ONCE]]
            for filled in sampler(some, start):
                yield self.requests.sample(filled)

    def settings(self, kind: str) -> SamplerSettings:
        """The defaults of what is made."""
        objective = self.trained.config.objective
        assert isinstance(objective, MaskedDiffusionSection)
        return settings_for(kind, objective)

    def prompted(self, task: str, digits: np.ndarray) -> list[list[int]]:
        """Documents that ask for something of each digit's word."""
        return [self.requests.pair(task, WORDS[digit]).tokens_T.tolist() for digit in digits]


@dataclass(frozen=True)
class Pictures:
    """A sampler's pictures, judged. Distances are between images of the original 16 levels."""

    right: float
    """Share that the classifier reads as the digit that was asked for."""
    within_class: float
    """Mean distance between two pictures of one digit."""
    of_real: float
    """The same, over that of real test pictures."""
    nearest: float
    """Median distance to the nearest real training picture."""
    copies: float
    """Share at distance 0 to one."""


@dataclass(frozen=True)
class Reality:
    """What the same judges say of real pictures that went through the tokenizer."""

    judge: float
    """The classifier's accuracy on the test split as it is."""
    judge_on_tokens: float
    within_class: float
    nearest: float


class PictureJudge:
    def __init__(self, modalities: Modalities) -> None:
        self._digits = load_digits()
        self._judge = ImageJudge()
        test = self._digits["test"]
        codec = modalities.codec("image")
        decoded = np.asarray(codec.decode(codec.encode(list(test.images_N))))
        self.real = Reality(
            self._judge.accuracy,
            float((self._judge(decoded) == test.labels_N).mean()),
            within_class_distance(decoded, test.labels_N),
            float(np.median(nearest_neighbour_distance(decoded, self._digits["train"].images_N))),
        )

    def __call__(self, pictures: np.ndarray, asked_for: np.ndarray) -> Pictures:
        spread = within_class_distance(pictures, asked_for)
        nearest = nearest_neighbour_distance(pictures, self._digits["train"].images_N)
        return Pictures(
            float((self._judge(pictures) == asked_for).mean()),
            spread,
            spread / self.real.within_class,
            float(np.median(nearest)),
            float((nearest == 0).mean()),
        )


def load(run: str) -> Model:
    folder = find_run(run)
    trained = load_trained_model(folder)
    assert trained.modalities is not None, f"{run} is no run of masked diffusion"
    length = trained.config.data.sequence_length
    return Model(
        trained, trained.modalities, Requests(trained.modalities, load_lengths(folder.tokenizer), length)
    )


def digits_to_ask(samples: int) -> np.ndarray:
    return np.arange(samples) % len(WORDS)


def pictures_of(model: Model, settings: SamplerSettings, samples: int) -> np.ndarray:
    asked_for = digits_to_ask(samples)
    return np.asarray(list(model.fill(model.prompted("text-to-image", asked_for), settings)))


def sounds_of(model: Model, samples: int) -> list[np.ndarray]:
    return list(model.fill(model.prompted("text-to-audio", digits_to_ask(samples)), model.settings("audio")))


def documents_of_test(model: Model, task: str) -> list[Document]:
    """Of the dataset's test split."""
    path = next(source.path for source in model.trained.config.data.sources if Path(source.path).name == task)
    sources = open_sources([Source(path=path)], split="test")
    rows = WholeEvaluation(sources, model.trained.config.data.sequence_length)
    return list(documents_of(rows.batches(ROWS_AT_ONCE), model.modalities.vocabulary))


def exact_match(model: Model, task: str) -> tuple[float, int]:
    """Share of the test split's documents whose text comes out as it is, and how many there are."""
    documents = documents_of_test(model, task)
    mask = model.modalities.vocabulary.mask
    made = model.fill([document.blank(mask) for document in documents], model.settings("text"))
    wanted = [model.modalities.sample("text", document.target.numpy()) for document in documents]
    right = [text == answer for text, answer in zip(made, wanted, strict=True)]
    return float(np.mean(right)), len(right)


def free_text(model: Model, samples: int) -> dict[str, float]:
    """Shares of texts without a prompt: true sentences, well-formed ones, number words alone; and of those that are
    more than a number word, the well-formed and the true ones."""
    asked = [model.requests.text("", seed=(0, number)).tokens_T.tolist() for number in range(samples)]
    texts = list(model.fill(asked, model.settings("free text")))
    true, formed, words = (
        sum(map(judge, texts)) for judge in (is_true_sentence, is_sentence, is_number_word)
    )
    return {
        "true_sentences": true / samples,
        "well_formed_sentences": formed / samples,
        "number_words": words / samples,
        "sentences": samples - words,
        "well_formed_of_sentences": formed / max(samples - words, 1),
        "true_of_sentences": true / max(samples - words, 1),
    }


def with_interval(share: float, count: int) -> str:
    """A share of `count` with half of its 95 % interval."""
    low, high = Share(round(share * count), count).interval
    return f"{share:.1%} +- {(high - low) / 2:.1%}"


def measure(
    model: Model, samples: int, *, sweep: bool
) -> tuple[dict[str, Any], np.ndarray, list[np.ndarray]]:
    judge = PictureJudge(model.modalities)
    settings = IMAGE_SAMPLERS if sweep else {name: IMAGE_SAMPLERS[name] for name in ("confidence", REPORTED)}
    asked_for = digits_to_ask(samples)
    pictures = {
        name: pictures_of(model, one, samples)
        for name, one in track(settings.items(), "pictures", console=Console(stderr=True), transient=True)
    }
    sounds = sounds_of(model, samples)
    heard = np.asarray([detect_digit(sound) for sound in sounds])
    real_sounds = make_tones(asked_for, seed=99)
    found = {
        "samples": samples,
        "text_to_image": {name: asdict(judge(some, asked_for)) for name, some in pictures.items()},
        "reported_sampler": REPORTED,
        "real_pictures": asdict(judge.real),
        "text_to_audio": float((heard == asked_for).mean()),
        "tone_detector": float((np.asarray([detect_digit(s) for s in real_sounds]) == asked_for).mean()),
        "text": free_text(model, samples),
    }
    for task in ("image-to-text", "audio-to-text"):
        found[task.replace("-", "_")], found[f"{task.replace('-', '_')}_documents"] = exact_match(model, task)
    return found, pictures[REPORTED], sounds


def show(found: dict[str, Any]) -> None:
    count, console = found["samples"], Console(highlight=False)
    real = found["real_pictures"]
    table = Table(
        "pictures by", "right", "within class", "of real", "nearest", "copies", box=None, header_style="bold"
    )
    for name, one in found["text_to_image"].items():
        right = with_interval(one["right"], count)
        row = (
            f"{one['within_class']:.1f}",
            f"{one['of_real']:.2f}",
            f"{one['nearest']:.1f}",
            f"{one['copies']:.1%}",
        )
        table.add_row(name, right, *row)
    table.add_row(
        "real test pictures",
        f"{real['judge']:.1%}; {real['judge_on_tokens']:.1%} as tokens",
        f"{real['within_class']:.1f}",
        "1.00",
        f"{real['nearest']:.1f}",
        "",
    )
    console.print(table)
    tasks = Table("task", "right", "wanted", box=None, header_style="bold")
    free = found["text"]
    best = found["text_to_image"][found["reported_sampler"]]["right"]
    for name, share, number, wanted in (
        (f"text to image ({found['reported_sampler']})", best, count, "95 %"),
        ("text to audio", found["text_to_audio"], count, "99 %"),
        ("image to text", found["image_to_text"], found["image_to_text_documents"], "93 %"),
        ("audio to text", found["audio_to_text"], found["audio_to_text_documents"], "99 %"),
        ("free text: well formed", free["well_formed_of_sentences"], max(free["sentences"], 1), ""),
        ("free text: true sentences", free["true_of_sentences"], max(free["sentences"], 1), "90 %"),
    ):
        tasks.add_row(name, with_interval(share, number), wanted)
    console.print(tasks)
    console.print(
        f"free text: {free['number_words']:.1%} are number words alone, which are not counted above"
    )


def write(folder: Path, found: dict[str, Any], pictures: np.ndarray, sounds: list[np.ndarray]) -> None:
    """The report, a sheet with ten pictures of each digit, a sound of each."""
    folder.mkdir(parents=True, exist_ok=True)
    save(found, folder / "report.json")
    per_digit = min(SHEET_COLUMNS, len(pictures) // len(WORDS))
    shown = [
        pictures[digit + len(WORDS) * number] for digit in range(len(WORDS)) for number in range(per_digit)
    ]
    write_image(folder / "pictures.png", contact_sheet(shown, columns=per_digit))
    for digit, word in enumerate(WORDS):
        write_sound(folder / f"{word}.wav", sounds[digit], SAMPLE_RATE)
    print(f"{folder / 'pictures.png'} has a row for each digit; {folder}/*.wav are the sounds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run of configs/trimodal/demo.yaml: its name or folder")
    parser.add_argument("--samples", type=int, default=500, help="of each kind that is made")
    parser.add_argument("--sweep", action="store_true", help="try every image sampler")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the report, a contact sheet and sounds"
    )
    arguments = parser.parse_args()
    if arguments.samples < FEWEST:
        parser.error(f"--samples {arguments.samples}: at least {FEWEST}, two of each digit")
    found, pictures, sounds = measure(load(arguments.run), arguments.samples, sweep=arguments.sweep)
    show(found)
    if arguments.out is not None:
        write(arguments.out, found, pictures, sounds)


if __name__ == "__main__":
    main()
