"""Small datasets of pairs with one vocabulary, beside plain text, and a tiny run of masked diffusion over them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipelines.prepare.pair_writer import PairWriter
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.modalities import Modalities, code_modality
from data_pipelines.tokens.vocabulary import Modality, Vocabulary
from tests.data_pipelines.helpers import make_dataset

TASKS = ("text-to-image", "image-to-text", "text-to-audio")
TINY = """
run: {{name: tiny, folder: {folder}, steps: 8, device: cpu}}
model: {{family: trimodal, layers: 2, width: 32, heads: 4, mlp_width: 64, image_positions: 2d}}
objective: {{kind: masked_diffusion, evaluation_draws: 2, image: {{schedule: cosine, weight: none}}}}
data:
  path: [{{path: {data}/text, weight: 1}}, {{path: {data}/text-to-image, weight: 2}},
         {{path: {data}/image-to-text, weight: 2}}, {{path: {data}/text-to-audio, weight: 1}}]
  sequence_length: 40
  global_batch_rows: 8
optim: {{lr: 5e-3, matrix_lr_multiplier: 1.0, warmup_steps: 2, clip_norm: 0.5}}
parallel: {{zero: 1}}
checkpoint: {{save_every_steps: 3, keep_last: 4}}
monitor: {{log_every_steps: 1, evaluate_every_steps: 4, evaluate_rows: 8, tensorboard: false}}
"""


def modalities(image_codec: str = "0123456789abcdef") -> Modalities:
    """Bytes, four patches of eight codes, and three frames of six codes; the codecs themselves are not there."""
    tokenizer = BytesTokenizer()
    text = Modality("text", 0, tokenizer.vocabulary, tokenizer.fingerprint)
    image = code_modality("image", text.end, (1, 8), image_codec, (2, 2))
    audio = code_modality("audio", image.end, (1, 6), "frames")
    return Modalities(Vocabulary(text, tokenizer.eot, image, audio), tokenizer)


def build_pairs(folder: Path, image_codec: str = "0123456789abcdef", rows: int = 40) -> Path:
    """Datasets of three tasks, and of text, under `folder`."""
    found, random = modalities(image_codec), np.random.default_rng(0)
    for task in TASKS:
        (folder / task).mkdir(parents=True)
        writer = PairWriter(folder / task, task, found, slot=None)
        for number in range(rows):
            digit = int(random.integers(0, 6))
            made = {
                "text": found.text_ids("abcdef"[digit] * 2),
                "image": found.code_ids("image", np.array([digit, digit + 1, digit, digit + 2]), "a row"),
                "audio": found.code_ids("audio", np.array([digit, digit, digit]), "a row"),
            }
            x, y = task.split("-to-")
            writer.write("train" if number % 4 else "validation", made[x], made[y], 2, "a row")
        writer.close()
    make_dataset(folder / "text", [12] * 24, validation=6)
    return folder


def write_config(folder: Path, data: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(folder=folder / "runs", data=data))
    return path
