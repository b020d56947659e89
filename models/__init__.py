"""The networks, one folder per family.

`families[name]` is all that other rooms need of one, `configs[name]` its settings alone: these need no torch, which
`families`, imported when it is asked for, does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.configs import configs

if TYPE_CHECKING:
    from models.family import Family
    from models.registry import families

__all__ = ["Family", "configs", "families"]


def __getattr__(name: str) -> Any:
    if name == "families":
        from models.registry import families

        return families
    if name == "Family":
        from models.family import Family

        return Family
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
