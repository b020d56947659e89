"""Which libraries this is."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version


def library_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("triptych", "torch", "deepspeed", "megatron-core"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
