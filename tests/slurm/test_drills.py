"""Drills on a real Slurm: what can go wrong with a job, done to a real training run of 2 nodes x 2 ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from benchmarks.kills import check_steps
from launch.job import LaunchedRun
from tests.slurm.cluster import until
from tests.slurm.drill import STEPS, Drill, Losses

pytestmark = [pytest.mark.drill, pytest.mark.timeout(300)]


def test_a_run_finishes_and_can_be_watched(drill: Drill, undisturbed: Losses) -> None:
    run = drill.launch()
    again = drill.command("launch", str(drill.folder / "drill.yaml"), "--gpus-per-node", "0", "--nodes", "1")
    assert again.returncode == 2 and "launched already" in again.stderr
    drill.wait_step(run, 2)
    table = drill.command("status", "--runs", str(run.run.parent), "drill").stdout
    assert "drill" in table and "running" in table and f"/{STEPS}" in table
    assert "step" in drill.command("logs", "--runs", str(run.run.parent), "drill").stdout
    drill.check(run, undisturbed)
    assert "done" in drill.command("status", "--runs", str(run.run.parent), "--details").stdout
    commit = (run.code.parent / "commit.txt").read_text().strip()
    assert (
        commit == subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    )


def test_the_signal_before_the_time_limit_saves_and_comes_back(drill: Drill, undisturbed: Losses) -> None:
    run = drill.launch(f"checkpoint.save_every_steps={STEPS}")
    drill.wait_step(run, 7)
    drill.cluster.call("scancel", "--signal=USR2", drill.job(run))
    drill.check(run, undisturbed, "resume")
    assert 7 <= drill.ledger(run, "attempt_end")[0]["step"] < STEPS, "it saved where it was asked to"


@pytest.mark.slow
def test_a_real_time_limit(drill: Drill) -> None:
    # Slurm sends the signal up to a minute before its time, and ends a job up to half a minute late.
    run = drill.launch("--time", "1", steps=3000, signal_seconds=10)
    drill.wait(lambda: "resume" in drill.endings(run), 150, "a restart", run)
    drill.wait_attempt(run, 2)


@pytest.mark.slow
def test_a_time_limit_that_nobody_was_told_of(drill: Drill) -> None:
    """Slurm ends the job as it would end one whose save took longer than the time before the limit."""
    run = drill.launch("--time", "1", "--sbatch", "signal=URG@10", steps=3000, signal_seconds=10)
    drill.wait(lambda: drill.endings(run), 150, "the end of the first attempt", run)
    end = drill.ledger(run, "attempt_end")[0]
    assert end["ending"] in ("resume", "crash") and "the time limit came" in end["reason"], end
    drill.wait_attempt(run, 2)


@pytest.mark.parametrize("partition", ["train", "grace"])
def test_preemption(drill: Drill, undisturbed: Losses, partition: str) -> None:
    run = drill.launch("--partition", partition)
    drill.wait_step(run, 8)
    urgent = [
        "sbatch",
        "--parsable",
        "-p",
        "high",
        "-N",
        "4",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 2",
    ]
    job = drill.cluster.call(*urgent)
    drill.cluster.wait_state(job, "COMPLETED", timeout_s=60)
    drill.wait_finished(run)
    assert drill.losses(run) == undisturbed
    # A job with grace has the time to save; one without may be killed before.
    assert drill.endings(run)[-1] == "done" and len(drill.endings(run)) == 2, drill.report(run)
    if partition == "grace":
        assert drill.ledger(run, "attempt_end")[0]["step"] >= 8


def test_kill_9_of_a_rank(drill: Drill, undisturbed: Losses) -> None:
    run = drill.launch()
    drill.wait_step(run, 8)
    drill.wait(lambda: run.newest_step() >= 5, 60, "a whole save", run)  # which goes on beside the steps
    killed = time.time()
    os.kill(drill.rank(run, 3).pid, signal.SIGKILL)
    drill.wait_attempt(run, 2)
    again = datetime.fromisoformat(drill.ledger(run, "start")[1]["time"]).timestamp()
    print(f"training again {again - killed:.1f} s after the kill")
    drill.check(run, undisturbed, "crash")
    assert drill.ledger(run, "attempt_end")[0]["step"] >= 5


@pytest.mark.timeout(600)
def test_random_kills_leave_whole_checkpoints(drill: Drill, undisturbed: Losses) -> None:
    run = drill.launch()
    kill_at_random(drill, run, kills=5, seed=0)
    drill.check(run, undisturbed, *["crash"] * 5)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fifty_random_kills(drill: Drill) -> None:
    run = drill.launch(steps=1500)
    kill_at_random(drill, run, kills=50, seed=1)
    drill.wait_finished(run, timeout_s=600)


def has_ended(drill: Drill, run: LaunchedRun, attempts: int) -> bool:
    return len(drill.endings(run)) >= attempts


def kill_at_random(drill: Drill, run: LaunchedRun, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    for number in range(1, kills + 1):
        drill.wait_attempt(run, number)
        # By steps, not seconds: the run must not be over before the last kill, however fast the machine.
        before = drill.ledger(run, "attempt")[-1]["step_before"]
        drill.wait_step(run, before + 6 + draw.randrange(3))
        drill.wait_saved(run, before + 5)  # three starts in a row that save nothing end a run
        os.kill(drill.rank(run, draw.randrange(4)).pid, signal.SIGKILL)
        drill.wait(partial(has_ended, drill, run, number), 60, "the attempt's end", run)
        check_steps(run.run / "checkpoints")


def test_a_node_that_loses_power(drill: Drill, undisturbed: Losses) -> None:
    run = drill.launch()
    drill.wait_step(run, 8)
    dead = drill.nodes(run)[0][1]
    drill.cluster.kill_node(dead)
    drill.wait_attempt(run, 2)
    assert dead not in drill.nodes(run)[1]
    drill.wait_finished(run)
    assert drill.losses(run) == undisturbed and drill.endings(run)[-1] == "done"


def test_a_drained_node_is_left_at_the_next_start(drill: Drill, undisturbed: Losses) -> None:
    run = drill.launch()
    drill.wait_step(run, 8)
    drained = drill.nodes(run)[0][0]
    drill.cluster.call("scontrol", "update", f"nodename={drained}", "state=drain", "reason=drill")
    drill.cluster.call("scancel", "--signal=USR2", drill.job(run))
    drill.check(run, undisturbed, "resume")
    assert drained not in drill.nodes(run)[1]


def test_scancel_ends_it_and_launching_again_goes_on(drill: Drill, undisturbed: Losses) -> None:
    run = drill.launch()
    drill.wait_step(run, 8)
    done = drill.command("cancel", "--runs", str(run.run.parent), "drill")
    assert "asked Slurm to end" in done.stdout
    drill.cluster.wait_state(drill.job(run), "CANCELLED")
    time.sleep(3)
    assert len(drill.ledger(run, "attempt")) == 1, "a cancelled run does not come back"
    drill.launch()
    drill.wait_finished(run)
    assert drill.losses(run) == undisturbed


def test_a_chain_of_jobs_where_requeueing_is_forbidden(drill: Drill, undisturbed: Losses) -> None:
    run = drill.launch("--chain")
    drill.wait_step(run, 8)
    first = run.job()["jobs"][0]
    process = drill.rank(run, 1, job=first)
    os.kill(process.pid, signal.SIGKILL)
    drill.wait_finished(run)
    assert drill.losses(run) == undisturbed and drill.endings(run) == ["crash", "done"]
    jobs = run.job()["jobs"]
    assert until(
        lambda: all(drill.cluster.state(job) in ("CANCELLED", "COMPLETED", "FAILED") for job in jobs), 20
    )


def kill_before_it_saves(drill: Drill, run: LaunchedRun, number: int) -> None:
    """A rank of an attempt, as soon as there is one."""
    drill.wait(lambda: len(drill.ledger(run, "attempt")) >= number, 60, f"attempt {number}", run)
    os.kill(drill.wait_rank(run, 1).pid, signal.SIGKILL)
    drill.wait(lambda: len(drill.endings(run)) >= number, 60, "the attempt's end", run)


def kill_while_another_cannot_answer(drill: Drill, run: LaunchedRun) -> None:
    """Rank 1 of the first attempt. Slurm then asks the others to stop: ranks 0 and 2 answer, 3 dies of it, and its
    signal, the greater one, hides the killed rank's in srun's exit code."""
    os.kill(drill.wait_rank(run, 3).pid, signal.SIGSTOP)
    for number in (0, 2):
        drill.wait(run.log(number, 1).is_file, 60, f"rank {number}, which listens to signals", run)
    time.sleep(0.5)
    os.kill(drill.rank(run, 1).pid, signal.SIGKILL)
    drill.wait(lambda: drill.endings(run), 60, "the attempt's end", run)


def test_a_crash_loop_is_ended_with_a_clear_last_line(drill: Drill) -> None:
    run = drill.launch()
    kill_while_another_cannot_answer(drill, run)
    for number in (2, 3):
        kill_before_it_saves(drill, run, number)
    drill.wait(run.outcome_file.is_file, 120, "the end", run)
    outcome = json.loads(run.outcome_file.read_text())
    assert outcome["ending"] == "crash" and "3 attempts in a row saved nothing" in outcome["message"]
    assert drill.endings(run) == ["crash"] * 3
    assert drill.cluster.wait_state(drill.job(run), "FAILED")


def broken_dataset(drill: Drill) -> Path:
    """A dataset that is not there is told at launch; of this one only a rank finds that a shard is missing."""
    broken = drill.folder / "nothing"
    shutil.copytree(drill.corpus, broken)
    (broken / "train-000000.tar").unlink()
    return broken


def test_a_configuration_error_is_not_repeated(drill: Drill) -> None:
    run = drill.launch(f"data.path={broken_dataset(drill)}")
    drill.wait(run.outcome_file.is_file, 60, "the end", run)
    outcome = json.loads(run.outcome_file.read_text())
    assert outcome["ending"] == "configuration" and "nothing" in outcome["message"]
    assert len(drill.ledger(run, "attempt")) == 1


def test_a_hung_rank_is_found_and_its_node_left(drill: Drill, undisturbed: Losses) -> None:
    run = drill.launch("monitor.watchdog_seconds=6")
    drill.wait_step(run, 8)
    hung = drill.rank(run, 2)
    node = drill.nodes(run)[0][1]
    os.kill(hung.pid, signal.SIGSTOP)
    drill.check(run, undisturbed, "node fault")
    end = drill.ledger(run, "attempt_end")[0]
    assert end["bad_nodes"] == [node] and "first silent rank is 2" in end["reason"]
    assert node not in drill.nodes(run)[1]
    stacks = list(run.launch.attempt(1).stacks.glob("*.txt"))
    assert len(stacks) >= 3 and all("Thread" in path.read_text() for path in stacks)
    recorded = [json.loads(path.read_bytes()) for path in run.launch.attempt(1).stacks.glob("*.json")]
    assert any(entry["profiling_name"] == "gloo:all_reduce" for rank in recorded for entry in rank["entries"])


def test_a_full_disk(drill: Drill, undisturbed: Losses) -> None:
    on_small = Drill(drill.cluster, drill.corpus, drill.cluster.small_disk)
    run = on_small.launch()
    on_small.wait_step(run, 8)
    filler = drill.cluster.small_disk / "filler"
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={filler}", "bs=1M", "status=none"], capture_output=True, timeout=60
    )
    on_small.wait(lambda: not on_small.has_ranks(run), 90, "the end of the ranks", run)
    filler.unlink()  # before the batch script gives up
    on_small.wait_finished(run)
    assert on_small.losses(run) == undisturbed and on_small.endings(run)[-1] == "done"


def test_slurmctld_restarts_under_a_run(drill: Drill, undisturbed: Losses) -> None:
    run = drill.launch()
    drill.wait_step(run, 8)
    drill.cluster.stop_controller()
    time.sleep(1)
    drill.cluster.start_controller()
    drill.check(run, undisturbed)


def test_a_cut_network_link(network_drill: Drill, undisturbed: Losses) -> None:
    drill = network_drill
    run = drill.launch()
    drill.wait_step(run, 8)
    cut = drill.nodes(run)[0][1]
    drill.cluster.cut_link(cut)
    try:
        drill.wait_attempt(run, 2)
        assert cut not in drill.nodes(run)[1]
        drill.wait_finished(run)
    finally:
        drill.cluster.mend_link(cut)
    assert drill.losses(run) == undisturbed and drill.endings(run)[-1] == "done"


def test_a_preflight_alone(drill: Drill) -> None:
    drill.dry_step = True
    done = drill.launch_command("--preflight-only")
    assert done.returncode == 0 and "all nodes are well" in done.stdout and "dry_step_seconds" in done.stdout
    assert not (drill.folder / "runs" / "drill" / "checkpoints" / "step_00000060").exists()


def test_the_preflight_finds_a_node_that_does_not_share_the_run_folder(
    drill: Drill, undisturbed: Losses
) -> None:
    (drill.folder / "runs").mkdir()
    drill.cluster.mount_empty("node2", drill.folder / "runs")
    try:
        run = drill.launch("--preflight")
        drill.wait_finished(run)
    finally:
        drill.cluster.unmount("node2", drill.folder / "runs")
    assert drill.losses(run) == undisturbed
    assert drill.endings(run) == ["node fault", "done"]
    assert (
        drill.ledger(run, "attempt_end")[0]["bad_nodes"] == ["node2"] and "node2" not in drill.nodes(run)[1]
    )


@pytest.mark.slow
def test_the_preflight_names_the_node_of_a_rank_that_hangs_in_it(drill: Drill, undisturbed: Losses) -> None:
    run = drill.launch("--preflight", preflight_seconds=60)
    report = run.launch.attempt(1).path / "preflight" / "report.00002.json"
    drill.wait(report.is_file, 60, "a rank's report", run)
    node = drill.nodes(run)[0][1]
    os.kill(drill.rank(run, 2).pid, signal.SIGSTOP)
    drill.wait_finished(run)
    assert drill.losses(run) == undisturbed and drill.endings(run) == ["node fault", "done"]
    assert drill.ledger(run, "attempt_end")[0]["bad_nodes"] == [node] and node not in drill.nodes(run)[1]


def test_the_preflight_stops_a_run_that_no_node_could_run(drill: Drill) -> None:
    run = drill.launch("--preflight", f"data.path={broken_dataset(drill)}")
    drill.wait(run.outcome_file.is_file, 90, "the end", run)
    outcome = json.loads(run.outcome_file.read_text())
    assert outcome["ending"] == "configuration" and "nothing" in outcome["message"]
    assert not drill.ledger(run, "start")


def test_what_slurm_would_refuse_is_refused_with_the_reason(drill: Drill) -> None:
    for options, part in (
        (("--partition", "fast"), "partition = fast: there is none; there are: train"),
        (("--nodes", "8"), "--nodes 8: partition train has 4"),
        (("--constraint", "warp"), "likely: no node has this feature"),
        (("--sbatch", "mem=900G"), "likely: no node has that many"),
        (("--sbatch", "speed=high"), "is no option of this Slurm"),
        (("--time", "1"), "lower signal_seconds"),
    ):
        done = drill.launch_command(*options)
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_sweep_is_an_array(drill: Drill) -> None:
    done = drill.launch_command("--sweep", "optim.lr=[1e-3,5e-3]", "run.steps=8")
    assert done.returncode == 0 and "optim.lr" in done.stdout, done.stderr
    runs = drill.folder / "runs"
    outcomes = [runs / f"drill-lr-{rate}" / "launch" / "outcome.json" for rate in ("0.001", "0.005")]
    assert until(lambda: all(path.is_file() for path in outcomes), 120)
    table = drill.command("status", "--runs", str(runs), "drill-lr-*").stdout
    assert table.count("done") == 2 and table.count("8/8") == 2
    assert "optim.lr" in table and " 0.001 " in table and " 0.005 " in table


def test_a_run_after_another(drill: Drill) -> None:
    first = drill.launch("run.steps=5")
    done = drill.launch_command("--after", "drill", "run.name=second", "run.steps=5")
    assert done.returncode == 0, done.stderr
    second = drill.folder / "runs" / "second" / "ledger.jsonl"
    drill.wait_finished(first)
    assert until(lambda: '"end"' in second.read_text(), 90)
    ended = drill.ledger(first, "end")[0]["time"]
    began = next(
        line for line in map(json.loads, second.read_text().splitlines()) if line["event"] == "attempt"
    )
    assert began["time"] >= ended
