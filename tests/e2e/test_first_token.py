"""Documents whose entropy is known: what is scored, what a trained model reaches, and what it says unasked."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.prepare.text import BuildOptions, build
from data_pipelines.rows.cut_rows import Source, open_sources
from data_pipelines.rows.evaluation import bytes_per_token, evaluation_batches
from data_pipelines.tokens.tokenizer_loading import load_tokenizer
from models.layers.head import Head
from pretrain.checkpoint_reader import TrainedModel, load_trained_model
from pretrain.config import load_config
from pretrain.evaluation import evaluate
from pretrain.run_folder import RunFolder
from tests.e2e.training import run_forked

LETTERS = "abcdefgh"
CONFIG = """
run: {{name: named, folder: {folder}, steps: 400, device: cpu}}
model: {{{model}}}
data: {{path: {data}, sequence_length: 128, global_batch_rows: 6}}
optim: {{lr: 5e-3, matrix_lr_multiplier: 1.0, betas: [0.9, 0.99], warmup_steps: 20, weight_decay: 1e-4}}
parallel: {{zero: 0}}
checkpoint: {{save_every_steps: null}}
monitor: {{log_every_steps: 50, evaluate_every_steps: null, tensorboard: false, sample_tokens: 4}}
"""
MODELS = {
    "sigmoid": "family: sigmoid, layers: 1, width: 32, heads: 2, norm: pre, qk_norm: false, positions: alibi, "
    "initialisation: small, tied_head: false",
    "gru": "family: pararnn, cell: gru, layers: 1, width: 32, heads: 2, mlp_width: 64",
}


def write_documents(folder: Path, beginning: str, letters: int, documents: int) -> Path:
    """A dataset of documents of uniformly random letters behind a fixed beginning."""
    draw = random.Random(0)
    source = folder / "documents.jsonl"
    texts = (beginning + "".join(draw.choices(LETTERS, k=letters)) for _ in range(documents))
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build(source, folder / "data", BuildOptions(tokenizer="bytes", validation_fraction=0.1))
    return folder / "data"


def build_from(folder: Path, texts: list[str]) -> None:
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build(source, folder, BuildOptions(tokenizer="bytes", validation_fraction=0))


@pytest.mark.parametrize("model", MODELS)
def test_a_fixed_beginning_is_learned_and_said_unasked(tmp_path: Path, model: str) -> None:
    beginning, letters = "Name: ", 6
    data = write_documents(tmp_path, beginning, letters, 3000)
    config = tmp_path / "named.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, data=data, model=MODELS[model]))
    assert run_forked("train", str(config)).code == 0
    trained = load_trained_model(RunFolder(tmp_path / "named"), device="cpu")
    result = evaluate(trained, [str(data)], "validation", rows_per_batch=64)
    scored = len(beginning) + letters + 1  # each character and the end of text
    entropy = letters * math.log(len(LETTERS)) / scored
    assert 0 < result.nats_per_token - entropy < 0.02
    assert result.bits_per_byte is not None
    assert result.bits_per_byte > letters * math.log2(len(LETTERS)) / (len(beginning) + letters)
    said = run_forked("generate", str(tmp_path / "named"), "--prompt", "", "--temperature", "0")
    assert said.code == 0 and said.output.strip().startswith(beginning)


class Oracle(nn.Module):
    """The source of `write_documents` itself: letters with equal chances, then the end of text."""

    def __init__(self, letters: int, vocabulary: int, eot: int) -> None:
        super().__init__()
        self._letters = letters
        self.head = Head(2, vocabulary)
        with torch.no_grad():
            self.head.weight.fill_(-100.0)
            self.head.weight[[ord(letter) for letter in LETTERS], 0] = 0.0
            self.head.weight[eot, 1] = 0.0

    def forward(self, tokens_BT: Tensor, segment_ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        ended_BT = positions_BT == self._letters
        return torch.stack((~ended_BT, ended_BT), dim=-1).float()


@pytest.mark.parametrize("letters", [2, 4, 16, 256])
def test_bits_per_byte_of_the_source_itself_are_its_entropy(tmp_path: Path, letters: int) -> None:
    data = write_documents(tmp_path, "", letters, 200)
    config = tmp_path / "named.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, data=data, model=MODELS["sigmoid"]))
    # Rows of whole documents: the source counts its letters from the row's first token.
    loaded = load_config(config, [f"data.sequence_length={3 * (letters + 1)}"])
    tokenizer = load_tokenizer(data)
    model = Oracle(letters, tokenizer.vocabulary, tokenizer.eot)
    trained = TrainedModel(model, tokenizer, loaded, 0, tmp_path / "named/checkpoints/s", torch.device("cpu"))
    result = evaluate(trained, [str(data)], "validation")
    assert result.bits_per_byte == pytest.approx(math.log2(len(LETTERS)), rel=1e-6)
    assert result.tokens % (letters + 1) == 0
    few = evaluate(trained, [str(data)], "validation", limit_rows=2)
    assert (
        few.bits_per_byte == pytest.approx(math.log2(len(LETTERS)), rel=1e-6) and few.tokens < result.tokens
    )


def test_bits_per_byte_of_some_rows_are_of_their_own_bytes(tmp_path: Path) -> None:
    """Of two sources, and of one whose documents become longer: not of the bytes of what was left out."""
    build_from(tmp_path / "short", ["ab"] * 90)
    build_from(tmp_path / "mixed", ["ab"] * 60 + ["abcdefgh" * 60] * 9)
    tokenizer = load_tokenizer(tmp_path / "short")
    for name, rows, wanted in (("mixed", 10, 2 / 3), ("mixed", None, (120 + 9 * 480) / (180 + 9 * 481))):
        sources = open_sources([Source(tmp_path / name)], "train")
        assert bytes_per_token(sources, tokenizer, 3, rows) == pytest.approx(wanted)
    both = open_sources([Source(tmp_path / "short"), Source(tmp_path / "mixed")], "train")
    tokens = [batch.targets[batch.weights] for batch in evaluation_batches(both, 3, 4, limit_rows=500)]
    per_token = float((torch.cat(tokens) != tokenizer.eot).double().mean())
    assert bytes_per_token(both, tokenizer, 3, 500) == pytest.approx(per_token)
    found = bytes_per_token(both, tokenizer, 3, 500)
    assert found is not None and found > 0.7, "both sources have their share"
