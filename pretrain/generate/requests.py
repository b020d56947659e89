"""From what a user asks for to a canvas, and from the filled canvas to a text, a picture or a sound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from data_pipelines.codecs.base import AudioCodec, ImageCodec
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.modalities import Modalities
from data_pipelines.tokens.roles import TARGET, TASK_NAMES, read_roles
from data_pipelines.tokens.vocabulary import TASKS
from pretrain.errors import UserError
from pretrain.generate.canvas import Canvas, canvas
from pretrain.generate.lengths import (
    CaptionLengths,
    Lengths,
    draw_length,
    draw_length_for,
    usual_length,
)
from pretrain.generate.media import read_image, read_sound

FREE_TEXT = TASK_NAMES[0]
MASK = "[MASK]"


@dataclass(frozen=True)
class Requests:
    """Makes canvases for one run.

    row: its sequence length, which no document may exceed.
    captions: by task: how long sounds of a caption are.
    """

    modalities: Modalities
    lengths: Lengths
    row: int
    captions: Mapping[str, CaptionLengths] = field(default_factory=dict)

    def pair(
        self, task: str, condition: str, tokens: int | None = None, seed: tuple[int, int] = (0, 0)
    ) -> Canvas:
        """The target of a pair, all of it to be made.

        Args:
            condition: the text, or the path of the picture or sound.
            tokens: of the target; None: an image's grid, of a text what is most common in the run's data, of a sound
                drawn with `seed` from what captions like this one have there.

        Raises:
            UserError: a task the run has not learned, a condition that cannot be read, a document too long.
        """
        vocabulary = self.modalities.vocabulary
        if task not in vocabulary.tasks():
            known = ", ".join((FREE_TEXT, *vocabulary.tasks()))
            raise UserError(f"--task {task}: this run has {known}")
        given, made = TASKS[task]
        ids = self.condition_ids(given, condition)
        if made == "audio" and tokens is None:
            random, captions = np.random.default_rng(seed), self.captions.get(task, CaptionLengths())
            count = draw_length_for(captions, self.lengths, task, ids, random)
        else:
            count = self._target_tokens(task, made, tokens)
        head = [vocabulary.task(task), vocabulary.begin(given), *ids, vocabulary.end(given)]
        return self._canvas([*head, vocabulary.begin(made), *[vocabulary.mask] * count, vocabulary.end(made)])

    def text(self, prompt: str, tokens: int | None = None, seed: tuple[int, int] = (0, 0)) -> Canvas:
        """Text without a condition: every [MASK] of the prompt is one token to be made; a prompt without one is
        continued, an empty one begun.

        Args:
            tokens: to be made, end-of-text included; None: all in all as many as a document of the data has, for an
                empty prompt drawn with `seed`, else the most common number.
        """
        vocabulary = self.modalities.vocabulary
        if MASK in prompt:
            if tokens is not None:
                raise UserError("--tokens: the prompt's [MASK]s say how many tokens to make; leave it out")
            return self._canvas(self._filled([*self._with_masks(prompt), vocabulary.eot]))
        ids = self.modalities.text_ids(prompt).tolist()
        if tokens is None and not ids:
            tokens = draw_length(self.lengths, FREE_TEXT, np.random.default_rng(seed))
        elif tokens is None:
            tokens = usual_length(self.lengths, FREE_TEXT, above=len(ids)) - len(ids)
        return self._canvas(self._filled([*ids, *[vocabulary.mask] * tokens]))

    def slot(self, task: str) -> int | None:
        """The tokens of a text target where the data has a slot of one size for all, filled with end-of-text."""
        counts = self.lengths.get(task, {})
        return next(iter(counts)) if len(counts) == 1 else None

    def condition_ids(self, modality: str, source: str) -> list[int]:
        """The ids of a text, or of a picture's or sound's file."""
        if modality == "text":
            text = source.strip()  # as captions are
            if not text:
                raise UserError("--prompt is empty: say what to make")
            return [int(i) for i in self.modalities.text_ids(text)]
        sample = self._read(modality, Path(source))
        return [int(i) for i in self.modalities.ids(modality, [sample], source)[0]]

    def sample(self, filled_T: Tensor) -> Any:
        """The target of a filled canvas: a text up to its end, a uint8 picture, a float32 sound."""
        vocabulary = self.modalities.vocabulary
        positions_T = np.arange(len(filled_T))
        roles = read_roles(vocabulary, filled_T[None], filled_T.new_tensor(positions_T)[None])
        target_T = filled_T[roles.role[0] == TARGET]
        task = TASK_NAMES[int(roles.task[0, 0])]
        made = "text" if task == FREE_TEXT else TASKS[task][1]
        return self.modalities.sample(made, target_T.numpy())

    def _read(self, modality: str, path: Path) -> np.ndarray:
        codec = self.modalities.codec(modality)
        if modality == "image":
            return read_image(path, cast(ImageCodec, codec))
        return read_sound(path, cast(AudioCodec, codec))

    def _target_tokens(self, task: str, made: str, tokens: int | None) -> int:
        modality = self.modalities.vocabulary.modality(made)
        if modality.grid is not None:
            count = modality.grid[0] * modality.grid[1] * modality.codebooks
            if tokens not in (None, count):
                raise UserError(
                    f"--tokens {tokens}: every image of this run has {count} tokens; leave it out"
                )
            return count
        if tokens is None:
            return usual_length(self.lengths, task)
        if made == "text":
            self._check_slot(task, tokens, f"--tokens {tokens}")
        least = modality.codebooks * modality.codebooks if modality.delay else modality.codebooks
        if tokens % modality.codebooks or tokens < least:
            raise UserError(
                f"--tokens {tokens}: {made} has {modality.codebooks} tokens in each frame, so a multiple of that, and "
                f"at least {least}"
            )
        return tokens

    def _with_masks(self, prompt: str) -> list[int]:
        """Ids of a text around its [MASK]s. Where tokens are more than bytes, a word's token carries the space before
        it, so the one before a [MASK] is the mask's."""
        mask, pieces = self.modalities.vocabulary.mask, prompt.split(MASK)
        if not isinstance(self.modalities.tokenizer, BytesTokenizer):
            pieces = [*(piece.removesuffix(" ") for piece in pieces[:-1]), pieces[-1]]
        encoded = [self.modalities.text_ids(piece).tolist() for piece in pieces]
        ids: list[int] = encoded[0]
        for piece in encoded[1:]:
            ids += [mask, *piece]
        return ids

    def _filled(self, tokens: list[int]) -> list[int]:
        """Text as long as the data's slot, if there is one: another length would be new to the model."""
        self._check_slot(FREE_TEXT, len(tokens), f"a text of {len(tokens)} tokens")
        slot = self.slot(FREE_TEXT) or 0
        return tokens + [self.modalities.vocabulary.eot] * (slot - len(tokens))

    def _check_slot(self, task: str, tokens: int, what: str) -> None:
        slot = self.slot(task)
        if slot is not None and tokens > slot:
            raise UserError(
                f"{what}: every {task} target that this run learned from fills {slot} tokens; use at most that"
            )

    def _canvas(self, tokens: list[int]) -> Canvas:
        if len(tokens) > self.row:
            raise UserError(
                f"a document of {len(tokens)} tokens: this run learned rows of {self.row} (data.sequence_length); use "
                "a shorter prompt or fewer --tokens"
            )
        return canvas(self.modalities.vocabulary, tokens)
