"""The check before the ranks start: every rank runs it, on every node of the allocation.

    python -m launch.preflight RUN FOLDER

It says that it is here before it imports torch, which takes long from a cold storage: where a node fails at once and
ends the step for all, the others have been heard. Then come `launch.preflight_checks`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
import time
from pathlib import Path

from launch.job import LaunchedRun
from launch.preflight_reports import ALIVE_S, FIRST_STAGE, Report


def main() -> None:
    run, folder = LaunchedRun(Path(sys.argv[1])), Path(sys.argv[2])
    report = Report(int(os.environ["SLURM_PROCID"]), platform.node())
    report.write(folder, FIRST_STAGE)
    threading.Thread(target=_show_life, args=(report.path(folder),), name="alive", daemon=True).start()
    from launch.preflight_checks import check

    check(run, folder, report)


def _show_life(path: Path) -> None:
    """For as long as this process runs. The times are the storage's, and need no clocks that agree."""
    while True:
        time.sleep(ALIVE_S)
        with contextlib.suppress(OSError):  # it shows by the time that stands still
            os.utime(path)


if __name__ == "__main__":
    main()
