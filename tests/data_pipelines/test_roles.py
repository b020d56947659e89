"""The vocabulary's ranges and the roles that rows tell of themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.errors import DataError
from data_pipelines.tokens.roles import CONDITION, NO_MODALITY, STRUCTURE, TARGET, grid_positions, read_roles
from data_pipelines.tokens.vocabulary import MODALITIES, Modality, Vocabulary, load_vocabulary

VOCABULARY = Vocabulary(
    text=Modality("text", 0, 20, "words"),
    eot=19,
    image=Modality("image", 20, 8, "patches", grid=(2, 2)),
    audio=Modality("audio", 28, 8, "frames", codebooks=2),
)


def row() -> tuple[torch.Tensor, torch.Tensor]:
    """An image of a word, a sentence, the word of a sound, and padding."""
    v = VOCABULARY
    words = [v.begin("text"), 3, v.end("text")]
    image = [v.task("text-to-image"), *words, v.begin("image"), 20, 21, 22, 23, v.end("image")]
    sound = [v.begin("audio"), 28, 33, v.end("audio")]
    audio = [v.task("audio-to-text"), *sound, v.begin("text"), 4, 19, v.end("text")]
    documents = [image, [5, 6, 19], audio, [v.pad, v.pad]]
    tokens = [token for document in documents for token in document]
    positions = [place for document in documents for place in range(len(document))]
    return torch.tensor([tokens]), torch.tensor([positions])


def test_a_row_tells_what_each_token_is() -> None:
    tokens, positions = row()
    roles = read_roles(VOCABULARY, tokens, positions)
    s, c, t = STRUCTURE, CONDITION, TARGET
    assert roles.role[0].tolist() == [s, s, c, s, s, t, t, t, t, s, t, t, t, s, s, c, c, s, s, t, t, s, s, s]
    assert roles.task[0].tolist() == [1] * 10 + [0] * 3 + [4] * 9 + [0] * 2
    n = NO_MODALITY
    assert roles.modality[0].tolist() == [
        n,
        n,
        0,
        n,
        n,
        1,
        1,
        1,
        1,
        n,
        0,
        0,
        0,
        n,
        n,
        2,
        2,
        n,
        n,
        0,
        0,
        n,
        n,
        n,
    ]
    assert roles.offset[0].tolist() == [
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        2,
        3,
        0,
        0,
        1,
        2,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
    ]


def test_masking_changes_no_layout() -> None:
    tokens, positions = row()
    roles = read_roles(VOCABULARY, tokens, positions)
    masked = torch.where(roles.role == STRUCTURE, tokens, VOCABULARY.mask)
    again = read_roles(VOCABULARY, masked, positions)
    for name in ("role", "modality", "task", "offset"):
        assert torch.equal(getattr(roles, name), getattr(again, name)), name


def test_images_have_rows_and_columns() -> None:
    tokens, positions = row()
    both = grid_positions(VOCABULARY, read_roles(VOCABULARY, tokens, positions), positions)
    assert both[0, 5:9].tolist() == [[5, 5], [5, 6], [6, 5], [6, 6]]
    others = [place for place in range(tokens.shape[1]) if not 5 <= place < 9]
    assert torch.equal(both[0, others, 0], positions[0, others])
    assert torch.equal(both[0, others, 1], positions[0, others])


def test_a_vocabulary_reads_itself_back(tmp_path: Path) -> None:
    VOCABULARY.save(tmp_path)
    assert load_vocabulary(tmp_path) == VOCABULARY
    assert VOCABULARY.size == 36 + 12
    assert len({VOCABULARY.mask, VOCABULARY.pad, *(VOCABULARY.begin(m) for m in MODALITIES)}) == 5


def test_ids_stay_in_their_range() -> None:
    assert VOCABULARY.to_ids("image", np.array([0, 7]), "a.tar, row 0").tolist() == [20, 27]
    with pytest.raises(DataError, match="a.tar, row 0: image code 8 is outside of 0 to 7"):
        VOCABULARY.to_ids("image", np.array([8]), "a.tar, row 0")
    with pytest.raises(DataError, match="id 3 is no audio token"):
        VOCABULARY.to_codes("audio", np.array([3]), "sample 1")
