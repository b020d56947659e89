"""Whether a prompt is text that a tokenizer can say."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from data_pipelines.raw.json_text import has_surrogate
from data_pipelines.raw.report import printable
from data_pipelines.tokens.tokenizer import Tokenizer
from pretrain.errors import UserError

logger = logging.getLogger(__name__)


def check_prompts(prompts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Warn of characters that the tokenizer has no token for.

    Raises:
        UserError: a prompt that is not UTF-8: Python shows such bytes of an argument as half surrogate pairs.
    """
    for prompt in prompts:
        if has_surrogate(prompt):
            raise UserError(
                f"--prompt {printable(prompt)!r}: not UTF-8; give it in UTF-8, as a terminal of today does"
            )
        lost = lost_characters(prompt, tokenizer)
        if lost:
            logger.warning(
                "--prompt %r: the tokenizer has no token for %r, so the model does not see them",
                prompt[:40],
                lost,
            )


def lost_characters(text: str, tokenizer: Tokenizer) -> str:
    """The characters of a text that its tokens do not hold."""
    return "".join(tokenizer.lost(text, tokenizer.encode(text)))
