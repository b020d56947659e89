"""What jobs need of the modules that a run's config names: where they are, and which of them may be imported.

They are no part of the snapshot: every attempt imports them as they are then.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from data_pipelines.codecs.base import TRUSTED as TRUSTED_CODECS
from models.own import TRUSTED as TRUSTED_MODULES


def python_path(code: Path) -> str:
    """The snapshot, then this process's PYTHONPATH: absolute, for a job works in another folder."""
    entries = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join([str(code), *(str(Path(entry).resolve()) for entry in entries)])


def trusted_modules() -> list[str]:
    """Lines of the batch script that trust what is trusted here, also where the site's jobs inherit no environment."""
    names = [name for name in (TRUSTED_MODULES, TRUSTED_CODECS) if name in os.environ]
    return [f"export {name}={shlex.quote(os.environ[name])}" for name in names]
