"""What the programs here share: the machine in words, tables, and the JSON they leave behind."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pretrain.json_text import to_json


def machine() -> dict[str, Any]:
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def save(results: dict[str, Any], out: Path | None, *, quiet: bool = False) -> None:
    """Write `results` with date and machine to `out`, if given, and say so unless `quiet`."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    dated = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), **results}
    out.write_text(to_json(dated, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        print(f"written to {out}")


def demo_dataset(path: Path = Path("data/demo")) -> Path:
    """The quickstart's corpus, built on first use."""
    if not (path / "dataset.json").exists():
        command = [sys.executable, "-m", "pretrain.cli", "data", "demo", "--out", str(path)]
        subprocess.run(command, check=True, timeout=600)
    return path
