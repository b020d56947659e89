"""How a masked-diffusion model is sampled: the settings, their defaults per modality, and what is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.config.objective import MaskedDiffusionSection

SAMPLERS = ("ancestral", "first_hitting", "confidence")
SCHEDULES = ("linear", "cosine")
SCORES = ("max_probability", "margin", "entropy", "random")
USUAL_STEPS = {"confidence": 64, "ancestral": 256}
"""Where `steps` is None. Confidence: at most; ancestral: of the grid, of which only those steps cost a forward pass
in which a token appears."""


def _one_of(key: str, value: str, names: tuple[str, ...]) -> None:
    _check(key, value, value in names, f"one of {', '.join(names)}")


def _check(key: str, value: object, right: bool, wanted: str) -> None:
    if not right:
        raise UserError(f"{key} = {value}: must be {wanted}")


@dataclass(frozen=True)
class SamplerSettings:
    """pretrain/generate/README.md has the formulas.

    Raises UserError, naming the key, for a value that means nothing or belongs to another sampler.
    """

    sampler: str = "confidence"
    """ancestral: each token appears by itself, at random. first_hitting: one token at a time, in random order.
    confidence: in each step the tokens that the model is surest of."""
    steps: int | None = None
    """None: confidence as many as there are tokens, up to 64; ancestral 256. first_hitting has one per token.
    confidence takes more steps than tokens only with `remask`, to make again what it masked again."""
    schedule: str = "linear"
    """linear or cosine: which share of the tokens is still masked after each step."""
    score: str = "max_probability"
    """confidence: max_probability, margin, entropy or random decides which tokens stay."""
    gumbel: float = 0.0
    """confidence: scale of the Gumbel noise on the score's logarithm, which falls linearly to 0 at the last step."""
    block: int | None = None
    """Make this many tokens at a time, from the left; None: all at once."""
    remask: float = 0.0
    """Probability that a token made earlier is masked again in a step."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Draw among the most likely tokens that together have this probability."""
    guidance: float = 1.0
    """w in l = u + w (c - u), where c are the logits given the condition and u those with the condition masked.
    1 is none, 0 forgets the condition."""
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("sampler", self.sampler, SAMPLERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("score", self.score, SCORES)
        _check("steps", self.steps, self.steps is None or self.steps >= 1, "1 or more")
        _check("gumbel", self.gumbel, 0 <= self.gumbel < float("inf"), "0 or more")
        _check("block", self.block, self.block is None or self.block >= 1, "1 or more")
        _check("remask", self.remask, 0 <= self.remask < 1, "at least 0 and below 1")
        _check("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("guidance", self.guidance, 0 <= self.guidance < float("inf"), "0 or more (1 is none)")
        _check("seed", self.seed, self.seed >= 0, "0 or more")
        self._refuse_what_the_sampler_ignores()

    def _refuse_what_the_sampler_ignores(self) -> None:
        confident = self.sampler == "confidence"
        for key, idle in (("gumbel", 0.0), ("score", "max_probability")):
            value = getattr(self, key)
            _check(key, value, confident or value == idle, "left out: only sampler = confidence has scores")
        vain = self.score == "random" and self.gumbel != 0
        _check("gumbel", self.gumbel, not vain, "left out: score = random is noise alone, whatever its scale")
        if self.sampler == "first_hitting":
            _check("steps", self.steps, self.steps is None, "left out: first_hitting has one step per token")
            _check("remask", self.remask, self.remask == 0, "0: first_hitting masks nothing again")
            ordered = self.schedule == "linear"
            _check("schedule", self.schedule, ordered, "left out: first_hitting takes its times from no grid")

    def steps_for(self, tokens: int) -> int:
        """How many steps `tokens` tokens take."""
        if self.sampler == "first_hitting":
            return tokens
        steps = USUAL_STEPS[self.sampler] if self.steps is None else self.steps
        more = self.sampler == "ancestral" or (self.remask > 0 and self.steps is not None)
        return steps if more else min(steps, tokens)


DEFAULTS = {
    "image": SamplerSettings(sampler="ancestral", guidance=1.5),
    "audio": SamplerSettings(steps=8),
    "text": SamplerSettings(temperature=0.0),
    "free text": SamplerSettings(sampler="ancestral"),
}
"""By what is made: images and sounds, answers in text, and text without a condition."""


def settings_for(kind: str, objective: MaskedDiffusionSection, **chosen: Any) -> SamplerSettings:
    """The defaults of a kind (a key of DEFAULTS) with what was chosen, None being no choice.

    Another sampler than the default one keeps what all samplers share of the default: temperature and guidance.

    objective: of the run. Where it never masked a condition whole, there is no guidance by default.
    """
    chosen = {key: value for key, value in chosen.items() if value is not None}
    base = DEFAULTS[kind]
    if not learns_without_condition(objective):
        base = dataclasses.replace(base, guidance=1.0)
    if chosen.get("sampler", base.sampler) != base.sampler:
        base = SamplerSettings(temperature=base.temperature, guidance=base.guidance)
    return dataclasses.replace(base, **chosen)


def learns_without_condition(objective: MaskedDiffusionSection) -> bool:
    """Whether training masks some conditions whole, which is what guidance compares with."""
    return (objective.condition_dropout if objective.condition == "clean" else objective.whole_modality) > 0
