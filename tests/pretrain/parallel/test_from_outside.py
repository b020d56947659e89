"""An objective, data and a hook from outside of the tree (`examples/`): they train alike in every layout, resume as if
never stopped, and what is wrong with their settings is in the one report of the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.errors import DataError
from data_pipelines.stream.batch import Batch, Cursor
from pretrain.config import Config, load_config
from pretrain.errors import ConfigError, UserError
from pretrain.hooks.base import Hook, Hooks
from pretrain.run_data import open_run_data
from tests.e2e.training import metrics, run_forked
from tests.pretrain.parallel.runs import Datasets, train_in, write_run
from tests.pretrain.parallel.table import LAYERS, LAYOUTS

EXAMPLES = ("goldfish", "token_file", "gradient_spikes")
GOLDFISH = 'objective={kind: "goldfish:Goldfish", every: 3, context: 4}'
SPIKES = 'monitor.hooks={"gradient_spikes:Spikes": {every: 1, above: 1.2}}'


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXAMPLES:
        monkeypatch.syspath_prepend(str(Path("examples", name).resolve()))
    monkeypatch.setenv("TRIPTYCH_MODULES", ",".join(EXAMPLES))


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Settings of data with 41 rows of 32 tokens to train on, and 11 to validate with."""
    folder = tmp_path_factory.mktemp("tokens")
    for name, rows in (("train", 41), ("validation", 11)):
        ids = np.arange(32 * rows + 9) * 7 % 61
        ids.astype("<u2").tofile(folder / f"{name}.bin")
    files = f"train: {folder}/train.bin, validation: {folder}/validation.bin"
    return f'data.own={{name: "token_file:Tokens", {files}, vocabulary: 61}}'


@pytest.mark.parametrize("kind", ["objective and hook", "data"])
def test_every_layout_trains_as_one_process_does(
    kind: str, tmp_path: Path, data: Datasets, token_file: str
) -> None:
    own = ["data.path=null", token_file] if kind == "data" else [GOLDFISH, SPIKES]
    alone = train_in(tmp_path / "alone", data, "sigmoid", 1, [LAYERS, *own], 3)
    plain = train_in(tmp_path / "plain", data, "sigmoid", 1, [LAYERS], 3)
    assert alone.gradient_norms[0] != pytest.approx(plain.gradient_norms[0], rel=1e-3)
    for name in ("dp2 ZeRO 3", "cp2 pp2"):
        layout = LAYOUTS[name]
        curve = train_in(tmp_path / name, data, "sigmoid", layout.ranks, [LAYERS, *layout.settings, *own], 3)
        assert curve.losses == pytest.approx(alone.losses, rel=1e-5), name
        assert curve.gradient_norms == pytest.approx(alone.gradient_norms, rel=1e-5), name


def test_a_resumed_run_is_as_if_never_stopped(tmp_path: Path, data: Datasets, token_file: str) -> None:
    own = ["data.path=null", token_file, SPIKES, "checkpoint.keep_last=9"]
    whole = train_in(tmp_path / "whole", data, "sigmoid", 1, own, 8)
    train_in(tmp_path / "parts", data, "sigmoid", 1, own, 8, stop_at=3)
    train_in(tmp_path / "parts", data, "sigmoid", 1, own, 8)
    spikes = [
        [
            (record["step"], record["spikes/worst"], record["spikes/count"])
            for record in metrics(folder / "runs" / "tiny")
            if "spikes/count" in record
        ]
        for folder in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert spikes[0] == spikes[1] and [step for step, *_ in spikes[0]] == [1, 2, 3, 4, 5, 6, 7, 8]
    parts = {
        f"{record['step']} loss/train": record["loss/train"]
        for record in metrics(tmp_path / "parts" / "runs" / "tiny")
        if "loss/train" in record
    }
    assert parts.items() <= whole.losses.items()


def goldfish_rows(config: Path) -> tuple[Config, Any]:
    from pretrain.objectives import build_objective

    settings = load_config(config, [GOLDFISH])
    opened = open_run_data(settings)
    return settings, build_objective(opened.config).rows(opened.train)


def test_goldfish_leaves_out_one_target_in_so_many_and_the_same_ones_of_equal_passages(
    tmp_path: Path, data: Datasets
) -> None:
    _, rows = goldfish_rows(write_run(tmp_path, data, "sigmoid", 3))
    batch = rows.batch(range(200))
    left_out = batch.weights.logical_not() & (batch.targets >= 0)
    deciding = batch.positions >= 3
    assert not left_out[~deciding].any(), "a target whose document has too few tokens before it"
    count, share = int(deciding.sum()), float(left_out[deciding].float().mean())
    # Equal contexts decide alike, so that there are fewer draws than targets: contexts, not targets, are counted.
    contexts: dict[tuple[int, ...], bool] = {}
    for row, place in deciding.nonzero().tolist():
        context = tuple(batch.tokens[row, place - 3 : place + 1].tolist())
        assert contexts.setdefault(context, bool(left_out[row, place])) == bool(left_out[row, place])
    drawn = np.array(list(contexts.values()))
    assert abs(drawn.mean() - 1 / 3) < 4 * np.sqrt(2 / 9 / len(drawn)), (drawn.mean(), len(drawn))
    assert count > 1000 and 0 < share < 1


def test_goldfish_rows_are_a_function_of_their_numbers(tmp_path: Path, data: Datasets) -> None:
    _, rows = goldfish_rows(write_run(tmp_path, data, "sigmoid", 3))
    one, other = rows.batch([5, 9]), rows.batch([9])
    assert torch.equal(one.weights[1:], other.weights) and torch.equal(one.sequences[1:], other.sequences)
    assert rows.fingerprint == rows._rows.fingerprint, "the order of the data is as without it"


def test_every_stretch_of_a_token_file_comes_once_per_epoch(
    tmp_path: Path, data: Datasets, token_file: str
) -> None:
    config = write_run(tmp_path, data, "sigmoid", 3)
    opened = open_run_data(load_config(config, ["data.path=null", token_file]))
    assert opened.config.model.vocabulary == 64
    epochs = [opened.train.batch(range(41 * epoch, 41 * (epoch + 1))).sequences for epoch in range(2)]
    stretches = [sorted(map(tuple, epoch.tolist())) for epoch in epochs]
    ids = np.arange(32 * 41 + 9) * 7 % 61
    assert stretches[0] == stretches[1] == sorted(tuple(ids[32 * n : 32 * n + 33]) for n in range(41))
    assert not torch.equal(*epochs), "in another order"
    batches = [list(opened.validation_batches(2, rank, 2)) for rank in range(2)]
    scored = [batch.rows[batch.weights.any(1)].tolist() for rank in batches for batch in rank]
    assert sorted(row for rows in scored for row in rows) == list(range(8)), "monitor.evaluate_rows of them"


def test_a_model_of_token_files_is_evaluated_and_has_no_text(
    tmp_path: Path, data: Datasets, token_file: str
) -> None:
    config = write_run(tmp_path, data, "sigmoid", 3)
    own = ("data.path=null", token_file, SPIKES)
    ended = run_forked("train", str(config), *own)
    assert ended.code == 0 and "again, longer" not in ended.output and "more text" not in ended.output, ended
    run = str(tmp_path / "runs" / "tiny")
    last = [record for record in metrics(Path(run)) if "loss/validation" in record][-1]
    evaluated = run_forked("evaluate", run, "--json")
    assert json.loads(evaluated.output)["nats_per_token"] == pytest.approx(last["loss/validation"], rel=1e-5)
    generated = run_forked("generate", run)
    assert generated.code == 2 and "trained on token_file:Tokens, not on text" in generated.errors
    refused = run_forked("evaluate", run, "--length", "64")
    assert refused.code == 2 and "this run learned from data.own" in refused.errors
    planned = run_forked("plan", str(config), *own)
    assert planned.code == 0, planned.errors


def test_a_trained_model_needs_no_module_of_a_hook(
    tmp_path: Path, data: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_run(tmp_path, data, "sigmoid", 3)
    assert run_forked("train", str(config), SPIKES).code == 0
    monkeypatch.delenv("TRIPTYCH_MODULES")
    generated = run_forked("generate", str(tmp_path / "runs" / "tiny"), "--tokens", "2")
    assert generated.code == 0, generated.errors
    again = run_forked("train", str(config), "run.steps=4", SPIKES)
    assert again.code == 2 and "export TRIPTYCH_MODULES=gradient_spikes" in again.errors
    without = run_forked("train", str(config), "run.steps=4")
    told = "monitor.hooks does not name gradient_spikes:Spikes any more: what it had saved is dropped"
    assert without.code == 0 and told in " ".join(without.errors.split()), without.errors


WRONG = {
    'monitor.hooks={"gradient_spikes:Spikes": {evry: 3}}': "monitor.hooks.gradient_spikes:Spikes.evry: no such setting",
    'monitor.hooks={"gradient_spikes:Spikes": {above: 0.5}}': "above = 0.5: should be greater than 1",
    'monitor.hooks={"gradient_spikes:Spikes": {every: true}}': "every = True: should be a number, not yes or no",
    'monitor.hooks={"gradient_spikes:Nothing": {}}': "gradient_spikes has no Nothing",
    'monitor.hooks={"gradient_spikes:GradientSpikes": {}}': "is no pretrain.config.own.HookSection",
    "monitor.hooks={spikes: {}}": "monitor.hooks.spikes: spikes: should be module:Class",
    'monitor.hooks={"os:environ": {}}': "export TRIPTYCH_MODULES=goldfish,token_file,gradient_spikes,os",
    'objective={kind: "goldfish:Goldfish", every: 1}': "objective.every = 1: should be greater than or equal to 2",
    'objective={kind: "goldfish:Goldfish", evry: 3}': "objective.evry: no such setting; did you mean objective.every?",
    'objective={kind: "goldfish:Fish"}': "objective.kind: goldfish:Fish: goldfish has no Fish",
    "data.own={name: 3}": "data.own.name: missing; name a module:Class of your own",
    'data.own={name: "token_file:Tokens", train: a}': "data.own.validation: missing; it has no default",
    'data.own={name: "token_file:Tokens", train: a, validation: b, vocabulary: 9}': (
        "data.own: data.path is set too; set one of them to null"
    ),
}


@pytest.mark.parametrize("override", sorted(WRONG))
def test_what_is_wrong_is_in_the_report_of_the_config(override: str, tmp_path: Path, data: Datasets) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_run(tmp_path, data, "sigmoid", 3), [override, "run.steps=0"])
    assert WRONG[override] in str(caught.value)
    assert "run.steps = 0" in str(caught.value), "all that is wrong is told at once"


def test_whole_documents_do_not_come_from_a_token_file(
    tmp_path: Path, data: Datasets, token_file: str
) -> None:
    with pytest.raises(ConfigError, match="masked_diffusion learns whole documents, which data.path has"):
        load_config(write_run(tmp_path, data, "trimodal", 3), ["data.path=null", token_file])


@pytest.mark.parametrize(
    ("name", "vocabulary", "message"),
    [
        ("missing", 61, "missing.bin: cannot be read as 16-bit tokens"),
        ("good", 9, "good.bin: it has the id 60; name more than 9 ids"),
        ("short", 61, "short.bin: 30 tokens make no row of 32 and the one after it"),
    ],
)
def test_a_token_file_that_is_wrong_is_named(
    name: str, vocabulary: int, message: str, tmp_path: Path, data: Datasets
) -> None:
    (np.arange(99) % 61).astype("<u2").tofile(tmp_path / "good.bin")
    np.zeros(30, "<u2").tofile(tmp_path / "short.bin")
    files = f"train: {tmp_path / name}.bin, validation: {tmp_path}/good.bin"
    own = f'data.own={{name: "token_file:Tokens", {files}, vocabulary: {vocabulary}}}'
    config = load_config(write_run(tmp_path, data, "sigmoid", 3), ["data.path=null", own])
    with pytest.raises(DataError, match=message):
        open_run_data(config).train.batch([0, 1, 2])


def test_a_scalar_that_nobody_explains_is_told_by_name(tmp_path: Path) -> None:
    from pretrain.monitoring import TensorBoardSink

    sink = TensorBoardSink(tmp_path, 0, {"spikes/count": "Steps."})
    sink.write(1, {"spikes/count": 1.0, "validation_spikes/count": 1.0})
    with pytest.raises(UserError, match="the scalar spikes/other has no help text; say what it means"):
        sink.write(1, {"spikes/other": 1.0})


def test_a_hook_of_the_same_name_twice_is_two() -> None:
    """Names come from the config, in which each stands once."""
    one, other = Hook(), Hook()
    one.name, other.name = "a:A", "a:B"
    hooks = Hooks([one, other])
    assert hooks.state() == {"a:A": {}, "a:B": {}}


def test_rows_of_one_number_are_asked_for_in_any_order(
    tmp_path: Path, data: Datasets, token_file: str
) -> None:
    opened = open_run_data(
        load_config(write_run(tmp_path, data, "sigmoid", 3), ["data.path=null", token_file])
    )
    one: Batch = opened.train.batch([3, 50, 7], Cursor(51, opened.train.fingerprint))
    for number, row in enumerate((3, 50, 7)):
        assert torch.equal(one.sequences[number], opened.train.batch([row]).sequences[0])
