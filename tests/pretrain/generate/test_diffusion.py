"""Samplers of masked diffusion, against distributions that are known exactly."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.tokens.vocabulary import Modality, Vocabulary
from models import families
from models.initialise import initialise
from pretrain.config.objective import MaskedDiffusionSection
from pretrain.errors import UserError
from pretrain.generate.canvas import Canvas, canvas
from pretrain.generate.denoiser import model_denoiser
from pretrain.generate.diffusion import Sampler, pad_rows
from pretrain.generate.draw import draw, gumbel_noise, log_score
from pretrain.generate.plan import mask_ratio, masked_counts, plan_steps
from pretrain.generate.settings import DEFAULTS, SAMPLERS, SCORES, SamplerSettings, settings_for
from tests.pretrain.generate.toys import PAIRS, WORDS, ExactWords, RandomLogits

CPU = torch.device("cpu")
SAMPLES = 1500
CHI_SQUARE_26_AT_1_IN_1000 = 54.05


def draw_words(toy: ExactWords, chosen: SamplerSettings, given_words: dict[int, int] | None = None) -> list:
    length = toy.outcomes_KT.shape[1]
    tokens = [(given_words or {}).get(place, WORDS.mask) for place in range(length)]
    sampler = Sampler(toy, WORDS, chosen, CPU, rows_at_once=SAMPLES)
    return sampler([canvas(WORDS, tokens)] * SAMPLES)


@pytest.mark.parametrize(
    "chosen",
    [
        SamplerSettings("ancestral", steps=120),
        SamplerSettings("ancestral", steps=120, schedule="cosine"),
        SamplerSettings("first_hitting"),
        SamplerSettings("confidence", steps=3, score="random"),
        SamplerSettings("confidence", steps=3, score="random", block=2),
        SamplerSettings("ancestral", steps=9, block=1),
    ],
    ids=lambda chosen: f"{chosen.sampler}-{chosen.schedule}-{chosen.block}",
)
def test_with_exact_conditionals_the_joint_distribution_comes_out(chosen: SamplerSettings) -> None:
    toy = ExactWords(3, seed=1)
    assert toy.chi_square(draw_words(toy, chosen)) < CHI_SQUARE_26_AT_1_IN_1000


@pytest.mark.parametrize("score", [score for score in SCORES if score != "random"])
def test_the_order_may_follow_scores_of_the_place(score: str) -> None:
    """Margin and entropy look at a place's distribution, not at what was drawn there: any order that depends on
    known words alone gives the joint distribution. The drawn word's own probability does not: likely words win."""
    toy = ExactWords(3, seed=2)
    found = toy.chi_square(draw_words(toy, SamplerSettings("confidence", steps=3, score=score)))
    assert (found < CHI_SQUARE_26_AT_1_IN_1000) == (score != "max_probability")


def test_few_ancestral_steps_are_not_exact() -> None:
    toy = ExactWords(3, seed=1)
    assert toy.chi_square(draw_words(toy, SamplerSettings("ancestral", steps=1))) > 300


def test_remasking_goes_on_making_samples_of_the_joint_distribution() -> None:
    """Steps that mask and fill a word from its conditional leave the joint distribution as it is."""
    toy = ExactWords(2, seed=3)
    found = draw_words(toy, SamplerSettings("ancestral", steps=120, remask=0.04))
    assert toy.calls > 5  # for two words: some were made again, and again
    assert toy.chi_square(found) < 26.12  # 8 degrees of freedom at 1 in 1,000


def test_infilling_follows_the_conditional() -> None:
    toy = ExactWords(3, seed=1)
    samples = draw_words(toy, SamplerSettings("first_hitting"), {1: 2})
    assert all(int(one[1]) == 2 for one in samples)
    fits_K = toy.outcomes_KT[:, 1] == 2
    expected_K = (toy.p_K * fits_K / toy.p_K[fits_K].sum())[fits_K] * SAMPLES
    found = toy.counts(samples)[fits_K]
    assert float(((found - expected_K) ** 2 / expected_K).sum()) < 26.12  # 8 degrees of freedom


def test_ancestral_asks_the_model_only_when_a_word_appears() -> None:
    toy = ExactWords(3, seed=1)
    Sampler(toy, WORDS, SamplerSettings("ancestral", steps=1000), CPU)([canvas(WORDS, [WORDS.mask] * 3)] * 2)
    assert toy.calls <= 3


settings_strategy = st.builds(
    lambda sampler, steps, schedule, score, gumbel, block, remask, temperature, top_p, guidance, seed: (
        SamplerSettings(
            sampler,
            None if sampler == "first_hitting" else steps,
            "linear" if sampler == "first_hitting" else schedule,
            score if sampler == "confidence" else "max_probability",
            gumbel if sampler == "confidence" and score != "random" else 0.0,
            block,
            0.0 if sampler == "first_hitting" else remask,
            temperature,
            top_p,
            guidance,
            seed,
        )
    ),
    st.sampled_from(SAMPLERS),
    st.none() | st.integers(1, 12),
    st.sampled_from(["linear", "cosine"]),
    st.sampled_from(SCORES),
    st.sampled_from([0.0, 1.0, 4.0]),
    st.none() | st.integers(1, 5),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, 0.7, 1.0, 3.0]),
    st.sampled_from([0.1, 0.9, 1.0]),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.integers(0, 10),
)


def pair(task: str, given_ids: list[int], made: int, source: str, target: str) -> list[int]:
    v = PAIRS
    condition = [v.begin(source), *given_ids, v.end(source)]
    return [v.task(task), *condition, v.begin(target), *[v.mask] * made, v.end(target)]


DOCUMENTS = (
    pair("text-to-image", [3, 19], 4, "text", "image"),
    pair("text-to-audio", [5], 6, "text", "audio"),
    pair("audio-to-text", [28, 33], 3, "audio", "text"),
    [4, PAIRS.mask, 7, PAIRS.mask, 19],
    # Both sides have something to make.
    pair("image-to-text", [20, PAIRS.mask, 22, 23], 2, "image", "text"),
    [1, 2, 19],
)


@settings(deadline=None, max_examples=30)
@given(chosen=settings_strategy, rows_at_once=st.integers(1, 6))
def test_all_is_filled_in_range_and_the_given_stays(chosen: SamplerSettings, rows_at_once: int) -> None:
    canvases = [canvas(PAIRS, tokens) for tokens in DOCUMENTS]
    made = Sampler(RandomLogits(PAIRS), PAIRS, chosen, CPU, rows_at_once=rows_at_once)(canvases)
    for one, filled in zip(canvases, made, strict=True):
        was_masked = one.tokens_T == PAIRS.mask
        assert torch.equal(filled[~was_masked], one.tokens_T[~was_masked])
        low, high = one.ranges_T2[was_masked].unbind(1)
        assert ((filled[was_masked] >= low) & (filled[was_masked] < high)).all()


def test_ranges_are_those_of_the_modality_and_the_level() -> None:
    sound = canvas(PAIRS, DOCUMENTS[1])
    assert sound.ranges_T2[5:11].tolist() == [[28, 32], [32, 36]] * 3
    assert canvas(PAIRS, DOCUMENTS[0]).ranges_T2[6:10].tolist() == [[20, 28]] * 4
    with pytest.raises(ValueError, match="place 1 is \\[MASK\\] but stands in no modality"):
        canvas(PAIRS, [PAIRS.task("text-to-image"), PAIRS.mask, PAIRS.begin("text"), 3, PAIRS.end("text")])


def test_a_delayed_pattern_has_its_filling_where_a_level_has_no_frame() -> None:
    audio = Modality("audio", 20, 8, "frames", codebooks=2, delay=True)  # per level 3 codes and the filling
    v = Vocabulary(text=Modality("text", 0, 20, "words"), eot=19, audio=audio)
    tokens = [v.task("text-to-audio"), v.begin("text"), 3, v.end("text"), v.begin("audio"), *[v.mask] * 6]
    one = canvas(v, [*tokens, v.end("audio")])
    # Frames 0, 1 of level 0 at columns 0, 1; of level 1 at columns 1, 2.
    levels = [[20, 23], [27, 28], [20, 23], [24, 27], [23, 24], [24, 27]]
    assert one.ranges_T2[5:11].tolist() == levels


@settings(deadline=None, max_examples=25)
@given(chosen=settings_strategy)
def test_what_stands_beside_a_sample_changes_nothing_of_it(chosen: SamplerSettings) -> None:
    canvases = [canvas(PAIRS, tokens) for tokens in DOCUMENTS]
    together = Sampler(RandomLogits(PAIRS), PAIRS, chosen, CPU)(canvases)
    for number in (0, 3, 4):
        alone = Sampler(RandomLogits(PAIRS), PAIRS, chosen, CPU)([canvases[number]], number)
        assert torch.equal(alone[0], together[number])


def test_seeds_and_numbers_give_other_samples() -> None:
    one = canvas(WORDS, [WORDS.mask] * 40)
    toy = RandomLogits(WORDS, scale=0.1)

    def draw_one(seed: int, number: int) -> list[int]:
        chosen = SamplerSettings("ancestral", seed=seed)
        return Sampler(toy, WORDS, chosen, CPU)([one], number)[0].tolist()

    found = [draw_one(0, 0), draw_one(0, 1), draw_one(1, 0), draw_one(1, 1)]
    assert found[0] == draw_one(0, 0) and len({tuple(row) for row in found}) == 4


def test_guidance_of_one_is_none_and_costs_nothing() -> None:
    canvases = [canvas(PAIRS, tokens) for tokens in DOCUMENTS]
    plain, guided = RandomLogits(PAIRS), RandomLogits(PAIRS)
    chosen = SamplerSettings("first_hitting", seed=4)
    without = Sampler(plain, PAIRS, chosen, CPU)(canvases)
    with_one = Sampler(guided, PAIRS, dataclasses.replace(chosen, guidance=1.0), CPU)(canvases)
    assert all(torch.equal(a, b) for a, b in zip(without, with_one, strict=True))
    assert {len(call) for call in guided.calls} <= set(range(1, len(canvases) + 1))


def test_guidance_doubles_the_rows_and_masks_the_condition_in_the_second_half() -> None:
    toy = RandomLogits(PAIRS)
    one = canvas(PAIRS, DOCUMENTS[0])
    Sampler(toy, PAIRS, SamplerSettings(guidance=2.0, steps=1), CPU)([one, one])
    (tokens_BT,) = toy.calls
    assert torch.equal(tokens_BT[:2], torch.stack([one.tokens_T] * 2))
    assert tokens_BT[2].tolist() == [
        PAIRS.mask if c else t for t, c in zip(one.tokens_T.tolist(), one.condition_T, strict=True)
    ]
    assert one.condition_T.sum() == 2


@given(w=st.floats(0, 8), seed=st.integers(0, 99))
def test_guidance_scales_log_odds_as_the_formula_says(w: float, seed: int) -> None:
    """w moves the log-odds of any two ids from u's by w times the difference; confidence is what comes out."""
    random = torch.Generator().manual_seed(seed)
    c_NV, u_NV = torch.randn(2, 1, 6, generator=random).double()
    settings_ = SamplerSettings(guidance=w, temperature=0.0)
    ranges = torch.tensor([[1, 4]])
    token, score = draw(c_NV, u_NV, ranges, settings_, random)
    guided_V = (u_NV + w * (c_NV - u_NV))[0, 1:4]
    assert int(token) == 1 + int(guided_V.argmax())
    assert float(score) == pytest.approx(float(guided_V.log_softmax(-1).max()), abs=1e-9)


def test_noise_has_64_bits_and_the_right_distribution() -> None:
    noise = gumbel_noise((200_000,), torch.Generator().manual_seed(0))
    assert noise.dtype == torch.float64
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.03)
    # In 32 bits nothing above -log(2^-24) = 16.6 can come; 2^-53 allows 36.7.
    largest = -torch.log(-torch.log(torch.tensor(1 - 2.0**-53, dtype=torch.float64)))
    assert float(largest) > 36


def test_scores() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    chosen = torch.tensor([1])
    expected = {
        "max_probability": torch.tensor(0.3).log(),
        "margin": torch.tensor(0.2).log(),
        "entropy": sum(p * torch.tensor(p).log() for p in (0.5, 0.3, 0.2)),
        "random": torch.tensor(0.0),
    }
    for score, value in expected.items():
        assert float(log_score(score, logits, chosen)) == pytest.approx(float(value), abs=1e-6), score


@given(tokens=st.integers(1, 80), steps=st.integers(1, 100), schedule=st.sampled_from(["linear", "cosine"]))
def test_every_step_makes_something_and_the_last_leaves_nothing(
    tokens: int, steps: int, schedule: str
) -> None:
    plan = plan_steps(tokens, SamplerSettings(steps=steps, schedule=schedule))
    masked = [tokens, *(step.masked_after for step in plan)]
    assert all(before > after for before, after in itertools.pairwise(masked)) and masked[-1] == 0
    assert len(plan) == min(steps, tokens)


@given(tokens=st.integers(1, 60), block=st.integers(1, 60), steps=st.integers(1, 60))
def test_blocks_cover_the_places_once_in_order(tokens: int, block: int, steps: int) -> None:
    plan = plan_steps(tokens, SamplerSettings("ancestral", steps=steps, block=block))
    ends = list(dict.fromkeys((step.first, step.end) for step in plan))
    assert [place for first, end in ends for place in range(first, end)] == list(range(tokens))
    assert all(end - first <= block for first, end in ends)
    assert all(
        step.after == 0 for step in plan if step is plan[-1] or plan[plan.index(step) + 1].first != step.first
    )


def test_the_noise_falls_linearly_and_does_not_compound() -> None:
    plan = plan_steps(8, SamplerSettings(steps=8, gumbel=2.0))
    assert [step.gumbel for step in plan] == pytest.approx([2 * (1 - i / 8) for i in range(1, 9)])


def test_schedules_as_published() -> None:
    assert mask_ratio("linear", 0.25) == 0.75
    assert mask_ratio("cosine", 1 / 3) == pytest.approx(0.8660254)
    # MaskGIT's cosine, 16 tokens in 8 steps: few tokens first.
    assert masked_counts(16, [mask_ratio("cosine", i / 8) for i in range(9)]) == [
        16,
        15,
        14,
        13,
        11,
        8,
        6,
        3,
        0,
    ]


def test_greedy_confidence_takes_the_surest_first() -> None:
    """The first place is certain, the second is not before the first is known."""

    def denoiser(tokens_BT, segment_ids_BT, positions_BT, wanted_BT):  # type: ignore[no-untyped-def]
        logits_BTV = torch.zeros(*tokens_BT.shape, WORDS.size)
        logits_BTV[:, 1, 2] = 9.0
        logits_BTV[:, 0, 0] = 0.1
        logits_BTV[:, 0, 1] = torch.where(tokens_BT[:, 1] == 2, 5.0, 0.0)
        return logits_BTV[wanted_BT]

    made = Sampler(denoiser, WORDS, SamplerSettings(temperature=0.0), CPU)([canvas(WORDS, [WORDS.mask] * 2)])
    assert made[0].tolist() == [1, 2]


def test_ranks_go_on_with_what_they_agreed_on() -> None:
    seen: list[torch.Tensor] = []

    def agree(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        return torch.where(tokens == 0, 1, tokens)

    one = canvas(WORDS, [WORDS.mask] * 30)
    made = Sampler(RandomLogits(WORDS), WORDS, SamplerSettings(steps=5), CPU, agree=agree)([one])
    assert len(seen) == 5 and not (made[0] == 0).any()


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "sampler": {"sampler": "gibbs"},
        "schedule": {"schedule": "quadratic"},
        "score": {"sampler": "ancestral", "score": "margin"},
        "steps": {"sampler": "first_hitting", "steps": 3},
        "gumbel": {"sampler": "ancestral", "gumbel": 1.0},
        "block": {"block": 0},
        "remask": {"remask": 1.0},
        "temperature": {"temperature": -0.5},
        "top_p": {"top_p": 0.0},
        "guidance": {"guidance": float("inf")},
        "seed": {"seed": -1},
    }.items(),
)
def test_a_wrong_setting_is_named(key: str, values: dict) -> None:
    with pytest.raises(UserError, match=f"^{key} = "):
        SamplerSettings(**values)


def test_noise_on_a_random_order_is_refused() -> None:
    with pytest.raises(UserError, match="^gumbel = 1.0: must be left out: score = random"):
        SamplerSettings(score="random", gumbel=1.0)


def test_rows_at_once_keep_the_logits_small() -> None:
    """700,000 masked places of 48 ids are 33.6e6 logits a row; 2^28 hold 7 of those, 3 with guidance."""
    one = canvas(PAIRS, [PAIRS.mask] * 700_000)
    for guidance, rows in ((1.0, 7), (2.0, 3)):
        sampler = Sampler(RandomLogits(PAIRS), PAIRS, SamplerSettings(guidance=guidance), CPU)
        assert sampler._fitting_rows([one] * 16) == rows


def test_defaults_give_way_to_what_was_chosen() -> None:
    objective = MaskedDiffusionSection(kind="masked_diffusion")
    assert settings_for("image", objective) == SamplerSettings(sampler="ancestral", guidance=1.5)
    assert settings_for("image", objective, steps=None, temperature=0.5).temperature == 0.5
    assert settings_for("image", objective, sampler="confidence") == SamplerSettings(guidance=1.5)
    assert settings_for("text", objective, sampler="first_hitting").temperature == 0.0
    assert DEFAULTS["text"].steps_for(100) == 64


@pytest.mark.parametrize(
    ("values", "guidance"),
    [
        ({"condition_dropout": 0.1}, 1.5),
        ({"condition_dropout": 0}, 1.0),
        ({"condition": "joint"}, 1.0),  # condition_dropout means nothing there
        ({"condition": "joint", "whole_modality": 0.2}, 1.5),
    ],
)
def test_images_are_guided_where_training_masked_conditions_whole(values: dict, guidance: float) -> None:
    objective = MaskedDiffusionSection(kind="masked_diffusion", **values)
    assert settings_for("image", objective).guidance == guidance
    assert settings_for("image", objective, guidance=3.0).guidance == 3.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("block", [None, 3])
def test_confidence_takes_extra_steps_to_remask(schedule: str, block: int | None) -> None:
    one = canvas(PAIRS, DOCUMENTS[0])
    tokens = int((one.tokens_T == PAIRS.mask).sum())
    passes = {}
    for remask in (0.0, 0.4):
        settings = SamplerSettings(steps=8 * tokens, remask=remask, schedule=schedule, block=block)
        toy = RandomLogits(PAIRS)
        (filled,) = Sampler(toy, PAIRS, settings, CPU)([one])
        given = one.tokens_T != PAIRS.mask
        assert torch.equal(filled[given], one.tokens_T[given]) and PAIRS.mask not in filled
        passes[remask] = len(toy.calls)
    assert passes[0.0] == tokens and passes[0.4] > tokens


def test_a_canvas_without_masks_is_left_alone() -> None:
    toy = RandomLogits(WORDS)
    whole = Canvas(torch.tensor([0, 1]), torch.tensor([[0, 3]] * 2), torch.tensor([False] * 2))
    assert Sampler(toy, WORDS, SamplerSettings(), CPU)([whole])[0].tolist() == [0, 1] and not toy.calls


@pytest.mark.parametrize("image_positions", ["1d", "2d"])
def test_a_networks_logits_are_those_of_the_document_alone(image_positions: str) -> None:
    family = families["trimodal"]
    config = family.config(layers=2, width=32, heads=2, mlp_width=32, image_positions=image_positions)
    model = family.build(config.resolved(vocabulary=64, sequence_length=32))
    initialise(model, 0)
    documents = [torch.tensor(tokens) for tokens in DOCUMENTS]
    batch = pad_rows(documents, PAIRS.pad)
    wanted_BT = batch[0] == PAIRS.mask
    denoiser = model_denoiser(model, PAIRS)
    with torch.no_grad():
        together_NV = denoiser(*batch, wanted_BT)
        alone = [
            denoiser(*pad_rows([one], PAIRS.pad), (one == PAIRS.mask)[None])
            for one in documents
            if PAIRS.mask in one
        ]
    assert together_NV.shape == (int(wanted_BT.sum()), 64)
    assert torch.allclose(together_NV, torch.cat(alone), atol=1e-5)
