"""The config: layers, overrides, golden files, and every mistake told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import families
from pretrain.config import Config, config_from_dict, load_config
from pretrain.errors import ConfigError
from pretrain.optim import REFERENCE_WIDTH
from tests.golden import golden_path, runnable_configs

DEMO = Path("configs/sigmoid/demo.yaml")


@pytest.mark.parametrize("path", runnable_configs(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_configs_resolve_to_their_golden_files(path: Path) -> None:
    assert load_config(path).to_yaml() == golden_path(path).read_text(encoding="utf-8"), (
        "the resolved config changed; if that is meant, run `python -m tests.golden` and commit the diff"
    )


@pytest.mark.parametrize("path", runnable_configs(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_resolved_config_reads_back_as_itself(path: Path) -> None:
    config = load_config(path)
    assert config_from_dict(config.to_dict(), origin="again") == config


def test_softmax_twins_differ_in_name_and_family_alone() -> None:
    for path in Path("configs/sigmoid").glob("*.yaml"):
        ours = load_config(path).to_dict()
        twin = load_config(Path("configs/softmax") / path.name).to_dict()
        for values in (ours, twin):
            del values["run"]["name"], values["model"]["family"]
            values["model"].pop("attention_bias", None)
        assert ours == twin


def test_overrides_and_extends(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {DEMO.resolve()}\nrun: {{name: child}}\noptim: {{lr: 5e-4}}\n")
    config = load_config(
        child, ["run.steps=77", "model.kv_heads=3", "data.micro_batch_rows=4", "optim.warmup_steps=1"]
    )
    assert (config.run.name, config.run.steps, config.optim.lr) == ("child", 77, 5e-4)
    assert (config.model.kv_heads, config.data.micro_batch_rows, config.model.family) == (3, 4, "sigmoid")


def test_sources_with_weights() -> None:
    config = load_config(DEMO, ["data.path=[{path: a, weight: 7}, {path: b, weight: 3}]"])
    assert [(source.path, source.weight) for source in config.data.sources] == [("a", 7), ("b", 3)]


MISTAKES: list[tuple[str, list[str], list[str]]] = [
    (
        "neither data nor task",
        ["data.path=null"],
        ["data.path: missing; name a dataset folder, or a synthetic task under data.task"],
    ),
    ("both data and task", ["data.task={name: parity}"], ["data.task: data.path is set too"]),
    (
        "unknown task",
        ["data.path=null", "data.task={name: paritty}"],
        ["data.task", "task paritty is unknown, did you mean parity?"],
    ),
    (
        "task that the length does not hold",
        ["data.path=null", "data.task={name: keep_nth, n: 200}", "monitor.evaluate_length=150"],
        ["data.task.n: 200 must be from 1 to the sequence length, 128", "monitor.evaluate_length = 150"],
    ),
    ("length for text", ["monitor.evaluate_length=150"], ["only synthetic tasks have it"]),
    (
        "fewer rows than sources",
        ["data.path=[{path: a, weight: 1}, {path: b, weight: 2}]", "monitor.evaluate_rows=1"],
        ["monitor.evaluate_rows = 1: some of the 2 sources", "use at least 2"],
    ),
    (
        "misspelt key",
        ["optim.wieght_decay=0.1"],
        ["optim.wieght_decay: no such setting; did you mean optim.weight_decay?"],
    ),
    ("misspelt model key", ["model.layrs=3"], ["model.layrs: no such setting; did you mean model.layers?"]),
    ("misspelt section", ["optm.lr=1"], ["optm: no such section; did you mean optim?"]),
    ("key of another section", ["data.steps=3"], ["data.steps: no such setting; did you mean run.steps?"]),
    ("ill-typed", ["run.steps=many"], ["run.steps = many: ", "valid integer"]),
    ("ill-typed model key", ["model.layers=two"], ["model.layers = two: "]),
    ("out of range", ["optim.lr=-1"], ["optim.lr = -1: should be greater than 0"]),
    ("out of a list", ["parallel.zero=4"], ["parallel.zero = 4: should be 0, 1, 2 or 3"]),
    (
        "unknown family",
        ["model.family=sigmod"],
        ["model.family = sigmod: no such family; did you mean sigmoid?"],
    ),
    ("heads that do not divide the width", ["model.heads=5"], ["model.heads = 5"]),
    ("kv heads that do not divide", ["model.kv_heads=4"], ["model.kv_heads = 4", "6 heads"]),
    (
        "tensor size and heads",
        ["parallel.tensor=4"],
        ["parallel.tensor = 4: heads = 6 and kv_heads = 6 cannot be divided by 4; use 1 or 2"],
    ),
    (
        "sequence parallelism alone",
        ["parallel.sequence=true"],
        ["parallel.sequence = True: ", "above 1, or false"],
    ),
    (
        "offload without ZeRO",
        ["parallel.offload=optimizer", "parallel.zero=0"],
        [
            "parallel.offload = optimizer: only ZeRO's optimizer can lie in host memory: set parallel.zero=1, 2 or 3"
        ],
    ),
    (
        "offload in a pipeline",
        ["parallel.offload=optimizer", "parallel.pipeline=2"],
        [
            "parallel.offload = optimizer: megatron, a pipeline's engine, keeps its optimizer on the device; use none"
        ],
    ),
    (
        "a copy per node without ZeRO 3",
        ["parallel.zero_group=node"],
        ["parallel.zero_group = node: only ZeRO 3 shares parameters"],
    ),
    (
        "positions in unequal parts",
        ["parallel.tensor=3", "parallel.sequence=true"],
        [
            "data.sequence_length = 128: with parallel.sequence 3 ranks share",
            "use 129, or parallel.sequence=false",
        ],
    ),
    ("bf16 with ZeRO 0", ["precision.dtype=bf16", "parallel.zero=0"], ["parallel.zero = 0: bf16"]),
    ("micro-batch", ["data.micro_batch_rows=5"], ["data.micro_batch_rows = 5", "use 4"]),
    ("warm-up", ["optim.warmup_steps=9999"], ["optim.warmup_steps = 9999: should be below run.steps"]),
    ("wsd setting without wsd", ["optim.decay_steps=5"], ["optim.decay_steps = 5: only the wsd schedule"]),
    ("run name", ["run.name=a/b"], ["run.name = a/b"]),
    ("override without =", ["run.steps"], ["run.steps: an override is written key=value"]),
    (
        "many at once",
        ["optim.wieght_decay=1", "run.steps=nay", "model.heads=5", "parallel.zero=9"],
        ["4 problems", "optim.wieght_decay", "run.steps = nay", "model.heads = 5", "parallel.zero = 9"],
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes_are_told(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, overrides)
    for text in expected:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1, 2]", "a config is a mapping of sections"),
        ("run: {name: x", "not valid YAML"),
        ("extends: nowhere.yaml", "nowhere.yaml: no such config file (named by `extends` in"),
        ("extends: bad.yaml", "leads back to this file"),
        ("run: {name: x}", "run.steps: missing"),
    ],
    ids=["list", "yaml", "extends missing file", "extends itself", "missing keys"],
)
def test_bad_files_are_told(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=None) as caught:
        load_config(path)
    assert expected in str(caught.value) and "bad.yaml" in str(caught.value)


def test_a_missing_config_suggests_a_shipped_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*configs/sigmoid/demo\.yaml"):
        load_config("configs/sigmoid/dmo.yaml")


def test_resolved_values_are_hashable_and_frozen() -> None:
    config: Config = load_config(DEMO)
    with pytest.raises(Exception, match="frozen|cannot assign"):
        config.run.steps = 3


@pytest.mark.parametrize("family", ["sigmoid", "softmax"])
def test_the_85m_config_is_the_familys_recipe(family: str) -> None:
    recipe = dict(families[family].recipe)
    assert recipe.pop("matrix_lr_width") == REFERENCE_WIDTH
    optim = load_config(f"configs/{family}/85m.yaml").optim
    assert optim.matrix_lr_multiplier == "auto"
    assert {key: getattr(optim, key) for key in recipe} == recipe
