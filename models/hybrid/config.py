"""Settings of models whose layers differ: a pattern of mixers, each with settings of its own."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from models.hybrid.mixers import (
    GRUMixer,
    LSTMMixer,
    Mamba2Mixer,
    MixerSettings,
    RecurrentMixer,
    Shape,
    SigmoidMixer,
    SoftmaxMixer,
)
from models.layers.config import Problem, not_positive, swiglu_width, unknown_choices
from models.layers.work import Work
from models.own import own_class
from models.pararnn.config import NewtonConfig

INITIALISATIONS = ("fan_in", "dclm", "small", "torch")


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """A decoder whose layers are of several kinds.

    `mixers`: the kind of each layer, from the first on: a pattern that repeats, or all of them. A name is that of the
    settings beside it (`pararnn_gru: {...}`), or `module:Class`, a `MixerSettings` of one's own (`models.own`),
    whose settings stand in `own` under that name. `mlp_width` None means `swiglu_width(width)`; Mamba-2 layers have no
    feed-forward part. `vocabulary` None means that the dataset's tokenizer decides. `initialisation` of all matrices as
    in the pararnn family.
    """

    causal: ClassVar[bool] = True
    row_order: ClassVar[Literal["contiguous", "balanced"]] = "contiguous"
    """Recurrences need their positions in one run."""

    family: Literal["hybrid"] = "hybrid"
    layers: int
    width: int
    mixers: tuple[str, ...]
    vocabulary: int | None = None
    mlp_width: int | None = None
    tied_head: bool = False
    norm_epsilon: float = 1e-5
    initialisation: Literal["fan_in", "dclm", "small", "torch"] = "fan_in"
    # One line per mixer. The name is what `mixers` calls it.
    sigmoid: SigmoidMixer | None = None
    softmax: SoftmaxMixer | None = None
    pararnn_gru: GRUMixer | None = None
    pararnn_lstm: LSTMMixer | None = None
    mamba2: Mamba2Mixer | None = None
    own: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def hidden_width(self) -> int:
        return swiglu_width(self.width) if self.mlp_width is None else self.mlp_width

    @property
    def shape(self) -> Shape:
        return Shape(
            layers=self.layers,
            width=self.width,
            hidden_width=self.hidden_width,
            norm_epsilon=self.norm_epsilon,
        )

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The name of each layer's mixer."""
        return tuple(self.mixers[layer % len(self.mixers)] for layer in range(self.layers))

    @cached_property
    def used(self) -> dict[str, MixerSettings]:
        """The settings of the mixers that layers have, in the order in which they first appear. What `problems` has to
        say of a name, it leaves out."""
        names = dict.fromkeys(self.layer_mixers if self.mixers else ())
        return {name: self.settings(name) for name in names if not any(self._name_problems(name))}

    def settings(self, name: str) -> MixerSettings:
        """Of one mixer. Raises ValueError for what has none."""
        found = own_settings(name, self.own.get(name, {})) if ":" in name else getattr(self, name, None)
        if not isinstance(found, MixerSettings):
            raise ValueError(f"model.{name}: no settings of this mixer")
        return found

    @property
    def changeable(self) -> tuple[str, ...]:
        """Settings that a resumed run may change: how recurrences are solved, and what the alarm advises."""
        recurrent = [name for name, one in self.used.items() if isinstance(one, RecurrentMixer)]
        places = [f"own.{name}" if ":" in name else name for name in recurrent]
        return tuple(f"{place}.{key}" for place in places for key in ("newton", "recurrent_clip"))

    @property
    def newton(self) -> NewtonConfig | None:
        """How the recurrences are solved; None without any."""
        found = [settings.newton for settings in self.used.values() if isinstance(settings, RecurrentMixer)]
        return found[0] if found else None

    @property
    def newton_at(self) -> str:
        """Where the settings of the recurrences stand, below `model`."""
        name = next(name for name, one in self.used.items() if isinstance(one, RecurrentMixer))
        return f"own.{name}." if ":" in name else f"{name}."

    @property
    def conv_width(self) -> int:
        """The longest reach of a convolution, and the present position."""
        return 1 + max((settings.reach for settings in self.used.values()), default=0)

    def block_products(self, sequence_length: int) -> float:
        """Multiply-adds of a layer's matrix products per token, forward: the mean of all layers."""
        used, shape = self.used, self.shape
        each = [used[name].block_products(shape, sequence_length) for name in self.layer_mixers]
        return sum(each) / len(each)

    def layer_work(self) -> Mapping[Work, int]:
        """What the layers make a device do, and how many layers each."""
        each = {name: one.layer_work(self.shape) for name, one in self.used.items()}
        return Counter(each[name] for name in self.layer_mixers)

    def division_problems(self, parts: int) -> list[str]:
        """Why the model cannot be divided into so many parts by heads and features; none if it can."""
        return self._of_mixers(lambda settings: settings.division_problems(self.shape, parts))

    def swap_problems(self, parts: int) -> list[str]:
        """Why so many ranks cannot exchange positions for heads and channels; none if they can."""
        return self._of_mixers(lambda settings: settings.swap_problems(self.shape, parts))

    def other_swap_problems(self, parts: int) -> list[str]:
        """The same where recurrences exchange summaries instead."""
        return self._of_mixers(
            lambda settings: (
                [] if isinstance(settings, RecurrentMixer) else settings.swap_problems(self.shape, parts)
            )
        )

    def summary_problems(self) -> list[Problem]:
        """Settings with which ranks that share rows cannot solve the recurrences by exchanging summaries."""
        recurrent = {name: one for name, one in self.used.items() if isinstance(one, RecurrentMixer)}
        if not recurrent:
            return [("mixers", "there is no recurrence that Newton's method solves")]
        return [
            (f"{name}.{key}", message)
            for name, settings in recurrent.items()
            for key, message in settings.config(self.shape).summary_problems()
        ]

    def _of_mixers(self, ask: Any) -> list[str]:
        return [f"{name}: {message}" for name, settings in self.used.items() for message in ask(settings)]

    def resolved(self, *, vocabulary: int, sequence_length: int) -> HybridConfig:
        """The same settings with the vocabulary, and a sigmoid's bias, filled in where they were None."""
        size = vocabulary if self.vocabulary is None else self.vocabulary
        found = {name: settings.resolved(sequence_length) for name, settings in self.used.items()}
        filled: dict[str, Any] = {name: one for name, one in found.items() if ":" not in name}
        own = {name: dataclasses.asdict(one) for name, one in found.items() if ":" in name}
        return replace(self, vocabulary=size, own=own, **filled)

    def problems(self, sequence_length: int) -> list[Problem]:
        """(key, what is wrong and what would be right) of every invalid value, all at once."""
        found = not_positive(self, ("layers", "width", "vocabulary"), ("norm_epsilon",))
        found += unknown_choices(self, {"initialisation": INITIALISATIONS})
        if sequence_length < 1:
            found.append(("sequence_length", f"{sequence_length} must be at least 1"))
        if self.mlp_width is not None and self.mlp_width < 0:
            found.append(("mlp_width", f"{self.mlp_width} must be at least 0; 0 leaves the layer out"))
        of_pattern = list(self._pattern_problems())
        has_mlp = any(one.has_mlp for one in self.used.values())
        if self.mlp_width is not None and not of_pattern and not has_mlp:
            found.append(("mlp_width", f"{self.mlp_width} has no effect: no layer has a feed-forward part"))
        if found or of_pattern:
            return found + of_pattern
        shared = {one.name for one in dataclasses.fields(self)} - set(MIXERS)
        for name, settings in self.used.items():
            where = f"own.{name}" if ":" in name else name
            for key, message in settings.problems(self.shape, sequence_length):
                path = key if key in shared and not hasattr(settings, key) else f"{where}.{key}"
                if (path, message) not in found:
                    found.append((path, message))
        return found + list(self._solver_problems())

    def _solver_problems(self) -> Iterator[Problem]:
        """One alarm watches all recurrences: they are solved alike."""
        recurrent = [(name, one) for name, one in self.used.items() if isinstance(one, RecurrentMixer)]
        for name, one in recurrent[1:]:
            first, expected = recurrent[0]
            for key, value in dataclasses.asdict(one.newton).items():
                right = getattr(expected.newton, key)
                if value != right:
                    where = f"own.{name}" if ":" in name else name
                    message = (
                        f"must be {right}, as {first}.newton.{key} is: one alarm watches all recurrences"
                    )
                    yield f"{where}.newton.{key}", message

    def _pattern_problems(self) -> Iterator[Problem]:
        if not self.mixers:
            yield "mixers", f"name at least one of {', '.join(MIXERS)}, or a module:Class of your own"
        if len(self.mixers) > max(1, self.layers):
            yield "mixers", f"{len(self.mixers)} mixers for {self.layers} layers; name at most {self.layers}"
        for name in dict.fromkeys(self.mixers):
            yield from self._name_problems(name)
        for name in (*(name for name in MIXERS if getattr(self, name) is not None), *self.own):
            if name not in self.mixers:
                where = f"model.own.{name}" if name in self.own else f"model.{name}"
                yield "mixers", f"does not name {name}, which has settings: name it, or remove {where}"

    def _name_problems(self, name: str) -> Iterator[Problem]:
        if ":" in name:
            yield from _own_problems(name, self.own.get(name, {}))
        elif name not in MIXERS:
            yield "mixers", f"{name!r} is unknown; use {' or '.join(MIXERS)}, or a module:Class of your own"
        elif getattr(self, name) is None:
            yield name, "missing: the settings of this mixer, which model.mixers names; e.g. {heads: 8}"


def _mixers() -> Mapping[str, type[MixerSettings]]:
    """The fields of `HybridConfig` that hold a mixer's settings, by name."""
    kinds = {
        name: [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, MixerSettings)]
        for name, hint in get_type_hints(HybridConfig).items()
    }
    return {name: found[0] for name, found in kinds.items() if found}


MIXERS = _mixers()
"""Every mixer by the name that `model.mixers` calls it."""


def own_settings(name: str, values: Mapping[str, Any]) -> MixerSettings:
    """Of a `module:Class` on PYTHONPATH. Raises ValueError that says what is wrong with it."""
    kind = own_class(name, MixerSettings)
    known = [one.name for one in dataclasses.fields(kind)]
    strange = [key for key in values if key not in known]
    if strange:
        raise ValueError(
            f"{name}: no such setting: {', '.join(strange)}; there are: {', '.join(known) or 'none'}"
        )
    hints = get_type_hints(kind)
    for key, value in values.items():
        if not _is_a(value, hints[key]):
            raise ValueError(f"{name}: {key} = {value!r} should be {_shown(hints[key])}")
    try:
        return kind(**{key: _built(value, hints[key]) for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value of a config is of the kind that a field declares; whole numbers are floats too, true is no 1."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if inner and get_origin(kind) in (Union, type(int | str)):
        return any(_is_a(value, one) for one in inner)
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return all(key in hints and _is_a(one, hints[key]) for key, one in value.items())
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind in (int, bool, str):
        return type(value) is kind
    return get_origin(kind) is not None and isinstance(value, get_origin(kind))


def _built(value: Any, kind: Any) -> Any:
    """The dataclass of settings within settings."""
    kinds = [
        one for one in (kind, *get_args(kind)) if isinstance(one, type) and dataclasses.is_dataclass(one)
    ]
    return kinds[0](**value) if isinstance(value, dict) and kinds else value


def _shown(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    return names.get(kind, str(kind))


def _own_problems(name: str, values: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        own_settings(name, values)
    except ValueError as error:
        yield "mixers", str(error)
