"""Configs that come from anywhere: what they may not do, and how soon and how briefly that is told."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.settings import ClusterSettings, load_settings
from models import families
from models.layers.limits import LIMITS
from pretrain.config import SECTIONS, config_from_dict, load_config, load_resolved
from pretrain.config.kinds import settings_of
from pretrain.config.merge import merged_values
from pretrain.config.objective import OBJECTIVES
from pretrain.errors import ConfigError
from pretrain.yaml_text import parse_yaml

DEMO = Path("configs/sigmoid/demo.yaml")
SECONDS = 1.0


def refused(content: str, folder: Path) -> str:
    """The error of a config with this content. It is one line, and comes at once."""
    path = folder / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    began = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        merged_values(path)
    assert time.perf_counter() - began < SECONDS
    message = str(caught.value)
    assert "bad.yaml" in message and len(message) < 1000
    return message


# ------------------------------------------------------------------------------------------- YAML


ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(20)
)
MERGE_BOMB = "a: &a {k: v}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join([f'*{chr(97 + n)}'] * 9)}]}}\n" for n in range(20)
)
BAD_YAML: dict[str, tuple[str, list[str]]] = {
    "alias bomb": (ALIAS_BOMB, ["values, aliases written out"]),
    "alias bomb of merge keys": (MERGE_BOMB, ["values, aliases written out"]),
    "alias inside of itself": ("a: &a [1, *a]\n", ["line 1", "*a stands inside of itself"]),
    "3,000 open brackets": ("run: " + "[" * 3000, ["line 1", "nested more than 40 deep"]),
    "3,000 brackets": ("run: " + "[" * 3000 + "]" * 3000, ["line 1", "nested more than 40 deep"]),
    "3,000 braces": ("run: " + "{a: " * 3000, ["nested more than 40 deep"]),
    "3,000 levels of blocks": (
        "".join(" " * n + "a:\n" for n in range(900)),
        ["line 41", "nested more than 40 deep"],
    ),
    "300,000 dashes": ("- " * 300_000, ["nested more than 40 deep"]),
    "a section twice": (
        "run: {name: a}\noptim: {lr: 1}\nrun:\n  steps: 3\n",
        ["line 3", "run stands twice, in line 1"],
    ),
    "a key twice": (
        "optim:\n  lr: 1e-3\n  clip_norm: 1\n  lr: 1e-2\n",
        ["line 4", "lr stands twice, in line 2"],
    ),
    "a key twice in an inner list": (
        "data:\n  path:\n    - {path: a, weight: 1, path: b}\n",
        ["line 3", "path stands twice"],
    ),
    "an anchor's key twice": ("a: &a {x: 1, x: 2}\nb: *a\n", ["line 1", "x stands twice"]),
    "python objects": ("run: !!python/object/apply:os.system ['true']\n", ["line 1", "not valid YAML"]),
    "bytes": ("run: {name: !!binary aGVsbG8=}\n", ["run.name is a bytes"]),
    "a set": ("run: !!set {a, b}\n", ["run is a set"]),
    "a time": ("run: {name: !!timestamp 2001-12-14}\n", ["run.name is a date"]),
    "no time": ("run: {name: !!timestamp x}\n", ["not valid YAML"]),
    "no number": ("run: {steps: !!int abc}\n", ["not valid YAML"]),
    "no truth": ("run: {steps: !!bool abc}\n", ["not valid YAML"]),
    "key that is no name": ("run: {3: 4}\n", ["the key 3 under run is no name"]),
    "key that is a list": ("run: {[a]: 4}\n", ["not valid YAML in line 1"]),
    "an octal number": ("run: {steps: 010}\n", ["010 begins with 0; write 10, or '010' in quotes"]),
    "no octal number": ("run: {steps: 08}\n", ["08 begins with 0"]),
    "a number of 5,000 digits": ("run: {steps: " + "9" * 5000 + "}\n", ["not valid YAML"]),
    "control characters": ("run: {name: 'a\x07'}\n", ["not valid YAML"]),
    "two documents": ("run: {}\n---\nrun: {}\n", ["not valid YAML"]),
    "too large": ("# " + "x" * (1 << 20) + "\n", ["bytes, which is no config"]),
}


@pytest.mark.parametrize(("content", "expected"), BAD_YAML.values(), ids=BAD_YAML)
def test_files_that_are_no_configs_end_in_one_line_at_once(
    content: str, expected: list[str], tmp_path: Path
) -> None:
    message = refused(content, tmp_path)
    assert "\n" not in message
    for text in expected:
        assert text in message


def test_the_command_line_refuses_them_before_it_imports_what_is_slow(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(ALIAS_BOMB)
    program = (
        "import sys\nfrom launch.cli import main\n"
        f"sys.argv = ['triptych', sys.argv[1], {str(path)!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    for verb in ("train", "plan", "launch"):
        ended = subprocess.run(
            [sys.executable, "-c", program, verb], capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.count("\n") == 1 and ended.stderr.startswith(f"error: {path}: line ")


def test_aliases_and_merge_keys_of_a_usual_size_are_fine() -> None:
    found = parse_yaml("base: &b {x: 1, y: 2}\none: {<<: *b, y: 3}\ntwo: [*b, *b]\n", "text")
    assert found["one"] == {"x": 1, "y": 3} and found["two"] == [{"x": 1, "y": 2}] * 2


def test_numbers_times_and_dates_are_what_people_mean() -> None:
    text = "[1e-3, 1_000, 0x10, 12:00:00, 2024-01-01, .5, -3, 0, 0.5, on, null]"
    wanted = [1e-3, 1000, 16, "12:00:00", "2024-01-01", 0.5, -3, 0, 0.5, True, None]
    assert parse_yaml(text, "text") == wanted


# ------------------------------------------------------------------------------------------- references


def given(tmp_path: Path, content: str, **options: Any) -> dict[str, Any]:
    path = tmp_path / "some.yaml"
    path.write_text(content, encoding="utf-8")
    return merged_values(path, **options)


def test_references_to_other_keys(tmp_path: Path) -> None:
    found = given(
        tmp_path,
        r"""
a: {x: 3, list: [5, {y: 7}], name: x}
b: {same: '${a.x}', text: 'n-${a.x}-${a.list[0]}', inner: '${a.list[1].y}', whole: '${a}', beside: '${.same}'}
c: {up: '${..a.x}', nested: '${a.${a.name}}', plain: '\${a.x}', through: '${b.whole.x}', chain: '${.up}'}
""",
    )
    assert found["b"] == {
        "same": 3,
        "text": "n-3-5",
        "inner": 7,
        "whole": {"x": 3, "list": [5, {"y": 7}], "name": "x"},
        "beside": 3,
    }
    assert found["c"] == {"up": 3, "nested": 3, "plain": "${a.x}", "through": 3, "chain": 3}


def reference(letter: int) -> str:
    return "${" + chr(letter) + "}"


BAD_REFERENCES: dict[str, tuple[str, list[str]]] = {
    "environment": ("run: {name: '${oc.env:HOME}'}", ["run.name = ${oc.env:HOME}", "only with --allow-env"]),
    "environment with a default": ("run: {name: '${oc.env:NOT_THERE,x}'}", ["only with --allow-env"]),
    "environment by a detour": (
        "run: {name: '${oc.${a}:HOME}', note: '${oc.${b.c}:X}'}\na: env\nb: {c: env}",
        ["run.name", "--allow-env"],
    ),
    "environment within a text": ("run: {name: 'x${oc.env:HOME}y'}", ["run.name", "--allow-env"]),
    "environment in a list": ("monitor: {sample_prompts: ['${oc.env:HOME}']}", ["monitor.sample_prompts[0]"]),
    "another resolver": ("run: {name: '${oc.decode:1}'}", ["oc.decode is no function of configs"]),
    "a resolver that is not there": ("run: {name: '${eval:1}'}", ["eval is no function of configs"]),
    "not closed": ("run: {name: '${a'}", ["run.name = ${a: the reference is not closed"]),
    "nothing in it": ("run: {name: '${}'}", ["write a reference as ${section.key}"]),
    "a key that is not there": ("run: {name: '${optim.lr}'}", ["there is no optim.lr to refer to"]),
    "to itself": ("run: {name: '${run.name}'}", ["run.name", "leads back to itself"]),
    "in a circle": ("a: '${b}'\nb: {c: '${a}'}", ["leads back to itself"]),
    "a mapping that holds it": ("a: {b: '${a}'}", ["leads back to itself"]),
    "above the file": ("a: '${...b}'", ["more dots than there are levels"]),
    "a mapping in a text": ("a: {b: 1}\nc: 'x${a}'", ["a list or a mapping cannot stand inside of a text"]),
    "still to be given": ("a: ???", ["a = ???: is still to be given; set it"]),
    "nested": ("a: '" + "${" * 500 + "'", ["more than 8 deep"]),
    "a chain": (
        "".join(f"a{n}: '${{a{n + 1}}}'\n" for n in range(400)) + "a400: 1",
        ["a chain of more than 50"],
    ),
    "a bomb of texts": (
        "a: " + "x" * 100 + "\n" + "".join(f"{chr(98 + n)}: '{reference(97 + n) * 9}'\n" for n in range(20)),
        ["characters"],
    ),
    "a bomb of lists": (
        "a: [1, 2]\n"
        + "".join(f"{chr(98 + n)}: [{', '.join([repr(reference(97 + n))] * 9)}]\n" for n in range(20)),
        ["which no config needs"],
    ),
}


@pytest.mark.parametrize(("content", "expected"), BAD_REFERENCES.values(), ids=BAD_REFERENCES)
def test_references_that_are_refused(content: str, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    began = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        merged_values(path)
    assert time.perf_counter() - began < 2 * SECONDS
    for text in expected:
        assert text in str(caught.value)


def test_overrides_read_no_environment_either() -> None:
    with pytest.raises(ConfigError, match=r"run.name = .*--allow-env"):
        load_config(DEMO, ["run.name=${oc.env:HOME}"])


def test_the_environment_is_read_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIED_NAME", "from-the-environment")
    monkeypatch.setenv("TRIED_LR", "2e-3")
    overrides = [
        "run.name=${oc.env:TRIED_NAME}",
        "optim.lr=${oc.env:TRIED_LR}",
        "run.steps=${oc.env:NOT_THERE,77}",
        "monitor.tensorboard=${oc.env:NOT_THERE,'false'}",
        "optim.warmup_steps=1",
    ]
    config = load_config(DEMO, overrides, allow_env=True)
    assert (config.run.name, config.optim.lr, config.run.steps) == ("from-the-environment", 2e-3, 77)
    assert config.monitor.tensorboard is False
    with pytest.raises(ConfigError, match="the environment has no NOT_THERE; export it"):
        load_config(DEMO, ["run.name=${oc.env:NOT_THERE}"], allow_env=True)


def test_a_resolved_config_holds_no_references(tmp_path: Path) -> None:
    """A prompt may contain ${x}: what was written as text is read back as text."""
    config = load_config(DEMO, [r"monitor.sample_prompts=['\${oc.env:HOME}']"])
    assert config.monitor.sample_prompts == ("${oc.env:HOME}",)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_resolved(path) == config


# ------------------------------------------------------------------------------------------- overrides


BAD_OVERRIDES: dict[str, tuple[str, list[str]]] = {
    "a list for a section": ("optim=[1]", ["optim = [1]: should be settings of its own"]),
    "a list for the model": ("model=[1]", ["model = [1]: should be settings of its own"]),
    "a number for the model": ("model=3", ["model = 3: should be settings of its own"]),
    "a list for the family": (
        "model.family=[a]",
        ["model.family = ['a']: no such family; choose one of sigmoid"],
    ),
    "a mapping for the family": ("model.family={a: b}", ["model.family = {'a': 'b'}: no such family"]),
    "a list for the objective": ("objective.kind=[a]", ["objective.kind = ['a']"]),
    "a reference that is not closed": ("run.name=${a", ["run.name = ${a: the reference is not closed"]),
    "brackets that are not closed": ("optim.betas=[0.9", ["optim.betas=[0.9: not understood"]),
    "3,000 brackets": ("optim.betas=" + "[" * 3000, ["nested more than 40 deep"]),
    "no key": ("a b=3", ["a b is no key"]),
    "an index": ("data.path[0]=x", ["a list is set as a whole"]),
    "dots": ("optim..lr=3", ["optim..lr is no key"]),
    "a thousand dots": ("a" + ".a" * 1000 + "=1", ["is no key"]),
    "twice in a value": ("optim={lr: 1, lr: 2}", ["lr stands twice"]),
}


@pytest.mark.parametrize(("override", "expected"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES)
def test_overrides_that_are_told(override: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, [override])
    for text in expected:
        assert text in str(caught.value)
    assert len(str(caught.value)) < 8000


# ------------------------------------------------------------------------------------------- values


def leaves(prefix: str, kind: Any) -> dict[str, Any]:
    """Every setting below `kind` that has no settings of its own, by its dotted key, with its annotation."""
    found: dict[str, Any] = {}
    for name, inner in settings_of(kind).items():
        parts = [part for part in _parts(inner) if settings_of(part)]
        for part in parts:
            found |= leaves(f"{prefix}.{name}", part)
        if not parts:
            found[f"{prefix}.{name}"] = inner
    return found


def _parts(kind: Any) -> list[Any]:
    from pretrain.config.kinds import _alternatives

    return list(_alternatives(kind))


SECTION_LEAVES = {
    key: kind for name, section in SECTIONS.items() for key, kind in leaves(name, section).items()
}
DIFFUSION_LEAVES = leaves("objective", OBJECTIVES["masked_diffusion"])
NUMBERS = {
    key for key, kind in {**SECTION_LEAVES, **DIFFUSION_LEAVES}.items() if {int, float} & {*_parts(kind)}
}


def problems_with(key: str, value: Any) -> str:
    values = load_config("configs/trimodal/demo.yaml" if key in DIFFUSION_LEAVES else DEMO).to_dict()
    place: Any = values
    *outer, last = key.split(".")
    for name in outer:
        place[name] = place.get(name) or {}
        place = place[name]
    place[last] = value
    began = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values, "here")
    assert time.perf_counter() - began < SECONDS
    return str(caught.value)


def test_there_are_numbers_to_test() -> None:
    assert (
        len(NUMBERS) > 50
        and {"optim.lr", "data.workers", "optim.scaling.base_tokens", "launch.nodes"} <= NUMBERS
    )


@pytest.mark.parametrize("key", sorted(NUMBERS))
def test_every_number_has_a_bound_and_is_no_boolean_and_no_text(key: str) -> None:
    for number in (1e30, -1e30):
        assert re.search(rf"{key} = (-?1e\+30|{int(number)}): should be ", problems_with(key, number))
    assert f"{key} = True: should be a number, not yes or no" in problems_with(key, True)
    assert f"{key} = 1: should be a number, not text" in problems_with(key, "1")
    assert f"{key} = nan: should be a finite number" in problems_with(key, float("nan"))


@pytest.mark.parametrize("value", [10**9, 10**18, 10**30, 1e300, -1, 0, 2**53 + 1])
@pytest.mark.parametrize("key", sorted(NUMBERS))
def test_no_number_takes_long_to_judge(key: str, value: float) -> None:
    """Whether it is refused or not: nothing loops over it."""
    values = load_config("configs/trimodal/demo.yaml" if key in DIFFUSION_LEAVES else DEMO).to_dict()
    place: Any = values
    *outer, last = key.split(".")
    for name in outer:
        place[name] = place.get(name) or {}
        place = place[name]
    place[last] = value
    began = time.perf_counter()
    try:
        config_from_dict(values, "here")
    except ConfigError as error:
        assert key.rpartition(".")[0] in str(error)
    assert time.perf_counter() - began < SECONDS


FAMILIES = {
    "sigmoid": "configs/sigmoid/demo.yaml",
    "softmax": "configs/softmax/demo.yaml",
    "mamba2": "configs/mamba2/demo.yaml",
    "pararnn": "configs/pararnn/gru/demo.yaml",
    "trimodal": "configs/trimodal/demo.yaml",
}
MODEL_NUMBERS = [
    (family, key.removeprefix("model."))
    for family in FAMILIES
    for key, kind in leaves("model", families[family].config).items()
    if {int, float} & {*_parts(kind)}
]


@pytest.mark.parametrize(("family", "key"), MODEL_NUMBERS)
def test_every_number_of_every_model_has_limits(family: str, key: str) -> None:
    assert key in LIMITS, "give it its least and its most in models.layers.limits"
    base = load_config(FAMILIES[family]).to_dict()
    *outer, last = key.split(".")
    for value, message in (
        (10**9 if key not in ("rope_base",) else 10**30, "must be from"),
        (10**30, ""),
        (True, "should be a number, not yes or no"),
        ("4", "should be a number, not text"),
        (float("nan"), "should be a finite number"),
        (float("inf"), "should be a finite number"),
    ):
        values = {**base, "model": {**base["model"]}}
        place = values["model"]
        for name in outer:
            place[name] = (
                {"width": 768, "layers": 12, **(place.get(name) or {})}
                if name == "transfer"
                else {**place[name]}
            )
            place = place[name]
        place[last] = value
        began = time.perf_counter()
        with pytest.raises(ConfigError) as caught:
            config_from_dict(values, "here")
        assert time.perf_counter() - began < SECONDS
        assert f"model.{key} = " in str(caught.value) and message in str(caught.value)


def test_booleans_are_no_numbers_and_no_texts() -> None:
    booleans = [key for key, kind in SECTION_LEAVES.items() if _parts(kind) == [bool]]
    assert len(booleans) >= 4
    for key in booleans:
        assert f"{key} = 3: should be true or false, not a number" in problems_with(key, 3)
        assert f"{key} = yes: should be true or false, not text" in problems_with(key, "yes")


def test_options_of_tasks_have_a_bound_too() -> None:
    with pytest.raises(ConfigError, match="data.task.*n = 1000000000 should be at most 1,000,000"):
        load_config(DEMO, ["data.path=null", "data.task={name: keep_nth, n: 1000000000}"])


def test_cluster_settings_are_read_as_strictly(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    for content, expected in (
        ("wait_seconds: 1\nwait_seconds: 2\n", "wait_seconds stands twice"),
        ("wait_seconds: true\n", "wait_seconds = True: should be a number"),
        ("wait_seconds: 1000000000\n", "wait_seconds = 1000000000"),
        ("preflight: {seconds: true}\n", "preflight.seconds = True: should be a number"),
        ("sbatch: [1]\n", "sbatch = [1]: should be options of sbatch"),
        ("setup: " + "[" * 3000, "nested more than 40 deep"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError) as caught:
            load_settings(path, {})
        assert expected in str(caught.value)
    numbers = [key for key, kind in leaves("", ClusterSettings).items() if {int, float} & {*_parts(kind)}]
    for key in (key.lstrip(".") for key in numbers):
        outer, _, last = key.rpartition(".")
        with pytest.raises(ConfigError, match=last):
            load_settings(None, {outer: {last: 1e30}} if outer else {last: 1e30})
