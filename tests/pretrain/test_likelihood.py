"""The ELBO of given answers, against distributions that are known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.generate.canvas import canvas
from pretrain.likelihood import Answer, Estimate, Likelihood, Masks, Share, choose
from tests.pretrain.generate.toys import WORDS, ExactWords

CPU = torch.device("cpu")


def answer(words: list[int], given_words: dict[int, int] | None = None) -> Answer:
    """`words` for the places that are not given."""
    length = len(words) + len(given_words or {})
    tokens = [(given_words or {}).get(place, WORDS.mask) for place in range(length)]
    return Answer(canvas(WORDS, tokens), torch.tensor(words))


def test_exact_conditionals_have_the_exact_likelihood_as_their_bound() -> None:
    """The mean over all orders of -log p is -log p itself, so the bound is tight and only the draws vary."""
    toy = ExactWords(3, seed=1)
    likelihood = Likelihood(toy, WORDS, CPU)
    for outcome, words in enumerate(toy.outcomes_KT.tolist()):
        found = likelihood.negative_elbo(answer(words), Masks.draw(400, 3, seed=outcome))
        exact = -math.log(float(toy.p_K[outcome]))
        assert abs(found.nats - exact) < 1.5 * found.half_width, (words, found, exact)


def test_all_masks_together_give_the_exact_bound() -> None:
    toy = ExactWords(3, seed=4)
    found = Likelihood(toy, WORDS, CPU).exact_negative_elbo(answer([2, 0, 1]))
    outcome = toy.outcomes_KT.tolist().index([2, 0, 1])
    assert found.nats == pytest.approx(-math.log(float(toy.p_K[outcome])), abs=1e-12)
    assert found.half_width == 0


def test_given_words_are_not_scored() -> None:
    toy = ExactWords(3, seed=1)
    found = Likelihood(toy, WORDS, CPU).negative_elbo(answer([0], {0: 1, 2: 2}), Masks.draw(9, 1, 0))
    fits = (toy.outcomes_KT[:, 0] == 1) & (toy.outcomes_KT[:, 2] == 2)
    exact = toy.p_K[fits & (toy.outcomes_KT[:, 1] == 0)] / toy.p_K[fits].sum()
    assert found.nats == pytest.approx(-math.log(float(exact)), abs=1e-12)
    assert found.half_width == 0 and found.tokens == 1


def test_confidence_takes_the_surest_place_first() -> None:
    toy = ExactWords(2, seed=7)
    words = toy.outcomes_KT[4].tolist()
    found = Likelihood(toy, WORDS, CPU).confidence_nats(answer(words))
    # With exact conditionals any order that depends on the known words alone gives log p.
    assert found.nats == pytest.approx(-math.log(float(toy.p_K[4])), abs=1e-12)


@pytest.mark.parametrize(("by", "draws"), [("elbo", 7), ("elbo", 6), ("confidence", 1)])
def test_the_likeliest_choice_wins(by: str, draws: int) -> None:
    toy = ExactWords(3, seed=1)
    likelihood = Likelihood(toy, WORDS, CPU)
    order = toy.p_K.argsort(descending=True)
    answers = [answer(toy.outcomes_KT[k].tolist()) for k in order[[9, 0, 20, 4]]]
    verdict = choose(likelihood, answers, by=by, draws=draws, seed=3)
    assert verdict.chosen == 1
    assert [one.half_width == 0 for one in verdict.estimates] == [draws != 6] * 4


def test_answers_share_their_masks() -> None:
    """Equal answers get equal figures, and shorter ones the beginning of the same random numbers."""
    toy = ExactWords(3, seed=1)
    likelihood = Likelihood(toy, WORDS, CPU)
    one, two = choose(likelihood, [answer([0, 1, 2])] * 2, draws=5, seed=8).estimates
    assert one == two
    masks = Masks.draw(5, 3, seed=8)
    assert all(set(masks.places(d, 2)) <= {0, 1} for d in range(5))


@given(draws=st.integers(1, 40), tokens=st.integers(1, 30), seed=st.integers(0, 1000))
def test_masked_counts_are_stratified(draws: int, tokens: int, seed: int) -> None:
    masks = Masks.draw(draws, tokens, seed)
    counts = np.asarray([len(masks.places(d, tokens)) for d in range(draws)])
    assert counts.min() >= 1 and counts.max() <= tokens
    # Of D draws, D / n fall on each count, give or take one.
    hits = np.bincount(counts, minlength=tokens + 1)[1:]
    assert np.abs(hits - draws / tokens).max() <= 1 + 1e-9


def test_the_interval_shrinks_with_the_draws_and_covers() -> None:
    toy = ExactWords(3, seed=1)
    likelihood = Likelihood(toy, WORDS, CPU, rows_at_once=1000)
    words = toy.outcomes_KT[5].tolist()
    exact = -math.log(float(toy.p_K[5]))
    found = [likelihood.negative_elbo(answer(words), Masks.draw(50, 3, seed)) for seed in range(100)]
    assert sum(abs(one.nats - exact) < one.half_width for one in found) >= 90
    wide = np.mean([one.half_width for one in found])
    narrow = likelihood.negative_elbo(answer(words), Masks.draw(800, 3, 1)).half_width
    assert narrow == pytest.approx(wide / 4, rel=0.3)


def test_shares_and_their_intervals() -> None:
    share = Share(80, 100)
    low, high = share.interval
    assert (
        share.share == 0.8
        and low == pytest.approx(0.7112, abs=1e-3)
        and high == pytest.approx(0.8666, abs=1e-3)
    )
    assert Share(5, 5).interval[1] == 1.0
    with pytest.raises(UserError, match="no question"):
        _ = Share(0, 0).share
    assert Estimate(6.0, 0.1, 3).nats_per_token == 2.0


def test_an_empty_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens to score"):
        Likelihood(ExactWords(1, 0), WORDS, CPU).negative_elbo(answer([], {0: 1}), Masks.draw(1, 1, 0))
