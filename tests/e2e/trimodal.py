"""A tiny dataset of pairs and text, and a run that learns it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipelines.codecs import PatchCodec, SpectralCodec
from data_pipelines.codecs.spectral import Frames
from data_pipelines.prepare.pair_writer import PairWriter
from data_pipelines.storage.dataset import token_bytes, write_dataset
from data_pipelines.storage.shards import TokenShardWriter
from data_pipelines.tokens.modalities import Modalities, combine
from data_pipelines.tokens.tokenizer_training import word_tokenizer
from data_pipelines.tokens.vocabulary import TASKS

WORDS = ("zero", "one", "two", "three", "plus", "equals")
TINY = """
run: {{name: tiny, folder: {folder}, steps: 4, device: cpu}}
model: {{family: trimodal, layers: 2, width: 32, heads: 2, mlp_width: 64, image_positions: 2d}}
objective: {{kind: masked_diffusion}}
data: {{path: [{paths}], sequence_length: 40, global_batch_rows: 8}}
optim: {{lr: 5e-3, warmup_steps: 1}}
parallel: {{zero: 1}}
checkpoint: {{save_every_steps: null}}
monitor: {{log_every_steps: 2, evaluate_every_steps: null, evaluate_rows: 40, sample_every_steps: 2, tensorboard: true}}
"""


def build_pairs(folder: Path) -> Modalities:
    """`folder`/TASK for every task and `folder`/text: a word is a stripe at its height, and a tone."""
    random = np.random.default_rng(0)
    modalities = make_modalities(random)
    for task in TASKS:
        other = next(name for name in TASKS[task] if name != "text")
        (folder / task).mkdir(parents=True)
        writer = PairWriter(folder / task, task, modalities, slot=2)
        for split, count in (("train", 64), ("validation", 12)):
            for number in range(count):
                word = int(random.integers(4))
                sample = picture(word, random) if other == "image" else sound(word, random)
                ids = {"text": modalities.text_ids(WORDS[word])}
                ids[other] = modalities.ids(other, [sample], "sample")[0]
                given, made = (ids[name] for name in TASKS[task])
                writer.write(split, given, made, len(WORDS[word]), f"{split} {number}")
        writer.close()
    _write_text(folder / "text", modalities)
    return modalities


def make_modalities(random: np.random.Generator) -> Modalities:
    pictures = [picture(word % 4, random) for word in range(40)]
    sounds = [sound(word % 4, random) for word in range(20)]
    image = PatchCodec.train(pictures, codes=12, patch=2)
    audio = SpectralCodec.train(sounds, codes=8, frames=Frames(), codebooks=2)
    return combine(word_tokenizer(WORDS), image, audio, delay=True)


def picture(word: int, random: np.random.Generator) -> np.ndarray:
    """(4, 4) uint8."""
    image = random.integers(0, 60, (4, 4))
    image[word] += 180
    return image.astype(np.uint8)


def sound(word: int, random: np.random.Generator) -> np.ndarray:
    """(656,) float32, three frames."""
    tone = np.sin(np.arange(656) * (0.3 + 0.3 * word)) + random.normal(0, 0.05, 656)
    return (0.5 * tone).astype(np.float32)


def _write_text(folder: Path, modalities: Modalities) -> None:
    folder.mkdir()
    tokenizer = modalities.tokenizer
    records = {}
    for split, copies in (("train", 20), ("validation", 2)):
        writer = TokenShardWriter(folder, split, token_bytes(tokenizer.vocabulary), 10**9)
        for one in range(4 * copies):
            text = f"{WORDS[one % 4]} plus zero equals {WORDS[one % 4]}"
            writer.write(np.append(tokenizer.encode(text), tokenizer.eot), len(text))
        records[split] = writer.close()
    write_dataset(folder, {split: records[split] for split in records}, tokenizer.save(folder))


def write_tiny_config(folder: Path, data: Path) -> Path:
    path = folder / "tiny.yaml"
    paths = ", ".join(str(data / name) for name in ("text", *TASKS))
    path.write_text(TINY.format(folder=folder / "runs", paths=paths))
    return path
