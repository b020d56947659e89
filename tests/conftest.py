"""One thread per process, whichever tests are chosen; and the order of files: the longest first, so that no process is
left with one of them at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch: idle threads of two processes on two cores wait actively, and take three times the CPU's time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST_FIRST = (
    "e2e/test_kills.py",
    "e2e/test_malicious.py",
    "e2e/test_hurt_runs.py",
    "e2e/test_recurrent.py",
    "pretrain/parallel/test_table.py",
    "e2e/test_state_tracking.py",
    "pretrain/parallel/test_pipeline.py",
    "pretrain/parallel/test_pipeline_checkpoints.py",
    "pretrain/generate/test_diffusion.py",
    "e2e/test_diffusion.py",
    "pretrain/checkpoint/test_layouts.py",
    "kernels/test_sigmoid_attention.py",
    "kernels/test_offline_sigmoid.py",
    "pretrain/test_not_finite.py",
    "launch/test_local.py",
    "launch/test_typed.py",
    "e2e/test_bad_input.py",
    "pretrain/plan/test_estimate.py",
    "e2e/test_resume.py",
    "e2e/test_layouts.py",
    "pretrain/objectives/test_exact_bound.py",
    "pretrain/parallel/test_context_mixers.py",
    "e2e/test_generate_diffusion.py",
    "pretrain/test_config_safety.py",
    "kernels/test_newton_rnn_cpu.py",
)
"""By the CPU's seconds, below `tests`: what takes more than some ten."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`--dist loadfile --no-loadscope-reorder` hands files out in this order. Files and tests else keep theirs."""
    folder = Path(__file__).parent
    place = {folder / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
