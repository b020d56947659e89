"""The batch script, settings, sweeps, and what is refused before Slurm is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.batch_script import script
from launch.cli import _options
from launch.dependencies import dependency_on
from launch.durations import minutes_of
from launch.job import LaunchedRun
from launch.policy import Attempt, Ending
from launch.request import Request, absolute
from launch.settings import ClusterSettings, load_settings
from launch.slurm import Partition, explain, past_states
from launch.submission_checks import check_shape
from launch.sweep import sweep_configs
from pretrain.attempts import write_json
from pretrain.config import load_config
from pretrain.errors import ConfigError, UserError

DEMO = "configs/sigmoid/demo.yaml"


def request(folder: Path, *overrides: str, nodes: int = 2, **settings: object) -> Request:
    config = absolute(load_config(DEMO, [f"run.folder={folder}", *overrides]))
    given = {"gpus_per_node": 0, "tasks_per_node": 2, **settings}
    return Request("demo", (config,), ClusterSettings.model_validate(given), nodes)


def test_the_script_says_what_slurm_must_know(tmp_path: Path) -> None:
    text = script(request(tmp_path, partition="train", account="me", time="2-00:00:00", sbatch={"mem": 0}))
    for line in (
        "#SBATCH --partition=train",
        "#SBATCH --account=me",
        "#SBATCH --time=2880",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --mem=0",
    ):
        assert line in text, line
    assert "--kill-on-bad-exit=1 --wait=60" in text
    before, after = text.index("launch.batch begin"), text.index("launch.batch end")
    assert before < text.index("srun --unbuffered") < text.index("trap '' TERM CONT") < after
    assert "--gpus-per-node" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_modules_from_outside_are_found_in_the_jobs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"examples/token_file{os.pathsep}/opt/mine")
    monkeypatch.setenv("TRIPTYCH_MODULES", "token_file,other")
    monkeypatch.delenv("TRIPTYCH_CODECS", raising=False)
    monkeypatch.syspath_prepend(str(Path("examples/token_file").resolve()))
    own = 'data.own={name: "token_file:Tokens", train: a.bin, validation: /data/b.bin, vocabulary: 9}'
    asked = request(tmp_path, "data.path=null", own)
    text = script(asked)
    code, here = asked.runs[0].code, Path.cwd()
    assert (
        f"export PYTHONPATH={code}:{here}/examples/token_file:/opt/mine${{PYTHONPATH:+:$PYTHONPATH}}" in text
    )
    assert "export TRIPTYCH_MODULES=token_file,other\n" in text and "TRIPTYCH_CODECS" not in text
    assert asked.configs[0].data.own == {
        "name": "token_file:Tokens",
        "train": f"{here}/a.bin",
        "validation": "/data/b.bin",
        "vocabulary": 9,
    }


def test_a_chain_waits_for_its_turn_and_a_container_is_passed_on(tmp_path: Path) -> None:
    text = script(request(tmp_path, requeue=False, container="img.sqsh", mounts=("/a:/a",)))
    assert "#SBATCH --no-requeue" in text and "#SBATCH --dependency=singleton" in text
    assert "--container-image=img.sqsh --container-mounts=/a:/a" in text


def test_a_run_after_another_waits_also_as_a_chain(tmp_path: Path) -> None:
    text = script(replace(request(tmp_path, requeue=False), after="afterok:7"))
    assert "#SBATCH --dependency=afterok:7,singleton" in text and "#SBATCH --kill-on-invalid-dep=yes" in text
    alone = replace(request(tmp_path, requeue=False), preflight_only=True)
    assert alone.copies == 1 and "--dependency" not in script(alone)


def test_what_a_run_waits_for(tmp_path: Path) -> None:
    first, chain = LaunchedRun(tmp_path / "first"), LaunchedRun(tmp_path / "chain")
    first.write_job(ClusterSettings(), nodes=1, name="first", jobs=["7"])
    settings = ClusterSettings(requeue=False, chain_jobs=2)
    chain.write_job(settings, nodes=1, name="chain", jobs=["8"])
    with pytest.raises(UserError, match="not all known"):
        dependency_on([chain])
    chain.write_jobs(["8", "9"])
    assert dependency_on([first]) == "afterok:7"
    assert dependency_on([chain]) == "afterok:8?afterok:9"  # the jobs that are not needed are cancelled
    with pytest.raises(UserError, match="name one run"):
        dependency_on([first, chain])
    write_json(first.outcome_file, {"ending": "done", "message": "finished"})
    assert dependency_on([first]) is None
    write_json(first.outcome_file, {"ending": "crash", "message": "it broke"})
    with pytest.raises(UserError, match="it broke"):
        dependency_on([first])


def test_bad_nodes_of_an_earlier_launch_stay_out_and_its_failures_are_not_counted(tmp_path: Path) -> None:
    wanted = request(tmp_path, sbatch={"exclude": "node[1-2]"}, cpus_per_task=12)
    run = wanted.runs[0]
    run.write_job(wanted.settings, nodes=2, name="demo", jobs=["7"])
    run.exclude(("node9",))
    run.launch.begin(1)
    run.write_ended(Attempt(1, Ending.crash, 0, 0, "why"))
    assert [attempt.number for attempt in run.ended_attempts()] == [1]
    text = script(wanted)
    assert "#SBATCH --exclude='node[1-2],node9'" in text
    assert "export SRUN_CPUS_PER_TASK=12" in text, "or each rank has one core, from Slurm 22.05 on"
    run.write_job(wanted.settings, nodes=2, name="demo", jobs=[])
    assert run.ended_attempts() == []


def test_sbatch_options_are_passed_on_as_they_are_written() -> None:
    given = ["comment=it's a run", "--mem=0", "spread-job", "dependency=a=b"]
    assert _options(given) == {"comment": "it's a run", "mem": "0", "spread-job": True, "dependency": "a=b"}


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (
            "echo '7|PREEMPTED'; echo '7|COMPLETED'; echo '8_1|CANCELLED by 0'",
            {"7": "COMPLETED", "8_1": "CANCELLED"},
        ),
        ("echo 'Slurm accounting storage is disabled' >&2; exit 1", {}),
    ],
)
def test_the_accounting_is_asked_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: dict[str, str]
) -> None:
    program = tmp_path / "sacct"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert past_states(["7", "8_1"]) == found


def test_a_partitions_time_limit() -> None:
    limits = [
        Partition("a", 4, True, text).most_minutes for text in ("1-00:00:00", "30:00", "infinite", "n/a")
    ]
    assert limits == [1440, 30, None, None]


def test_a_sweep_is_an_array_of_runs_with_names_of_their_own(tmp_path: Path) -> None:
    configs = sweep_configs(DEMO, [f"run.folder={tmp_path}"], ["optim.lr=[1e-3,3e-3]", "run.seed=[1,2]"])
    assert [(c.run.name, c.optim.lr, c.run.seed) for c in configs] == [
        ("demo-lr-0.001-seed-1", 1e-3, 1),
        ("demo-lr-0.001-seed-2", 1e-3, 2),
        ("demo-lr-0.003-seed-1", 3e-3, 1),
        ("demo-lr-0.003-seed-2", 3e-3, 2),
    ]
    many = Request("demo", configs, ClusterSettings(gpus_per_node=0), 1)
    text = script(many)
    assert "#SBATCH --array=0-3%4" in text and "SLURM_ARRAY_TASK_ID" in text
    with pytest.raises(ConfigError, match="more than one would be called demo-lr-0.001"):
        sweep_configs(DEMO, [], ["optim.lr=[1e-3,0.001]"])
    with pytest.raises(ConfigError, match="key=\\[value, value\\]"):
        sweep_configs(DEMO, [], ["optim.lr=1e-3"])


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("2:00:00", 120), ("1-0", 1440), ("1-12:30", 2190), ("0:0:30", 1)],
)
def test_time_limits(text: str, minutes: int) -> None:
    assert minutes_of(text) == minutes


def test_settings_tell_every_mistake(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("partitoin: a\ntime: tomorrow\nwait_seconds: 0\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(path, {})
    text = str(caught.value)
    assert "3 problems" in text and "partitoin: no such setting" in text
    assert "'tomorrow' is no time limit" in text and "wait_seconds = 0" in text
    with pytest.raises(ConfigError, match="error in --time, 1 problem"):
        load_settings(None, {"time": "tomorrow"})
    with pytest.raises(ConfigError, match="site.yaml and --gpus-per-node, 4 problems"):
        load_settings(path, {"gpus_per_node": -1})
    with pytest.raises(ConfigError, match="no such cluster settings"):
        load_settings(tmp_path / "none.yaml", {})


@pytest.mark.parametrize("path", sorted(Path("configs/cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_settings_are_valid_and_the_default_file_tells_the_defaults(path: Path) -> None:
    settings = load_settings(path, {})
    if path.stem == "default":
        assert settings == ClusterSettings()


def test_a_shape_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="12"):
        check_shape(request(tmp_path, nodes=5))
    with pytest.raises(ConfigError, match="leaves 0 s to train"):
        check_shape(request(tmp_path, time="2", signal_seconds=120))


def test_sbatchs_refusals_come_with_their_likely_cause() -> None:
    text = explain(
        "sbatch", "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed"
    )
    assert text.startswith("sbatch refused: invalid partition specified: x") and "sinfo -s" in text
    assert "likely" not in explain("sbatch", "something new")
    limits = explain(
        "sbatch", "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    )
    assert "of your account or QOS" in limits


def command(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_slurm_a_dry_run_works_and_a_launch_says_where_to_go(tmp_path: Path) -> None:
    arguments = (
        "launch",
        DEMO,
        f"run.folder={tmp_path}",
        "model.vocabulary=512",
        "--gpus-per-node",
        "0",
        "--nodes",
        "2",
    )
    dry = command(*arguments, "--dry-run", path="/usr/bin/nowhere")
    assert dry.returncode == 0 and "#SBATCH --nodes=2" in dry.stdout and "memory per GPU" in dry.stdout
    assert not list(tmp_path.iterdir())
    refused = command(*arguments, path="/usr/bin/nowhere")
    assert refused.returncode == 2 and "sbatch is not on the PATH" in refused.stderr
    assert "Traceback" not in refused.stderr
