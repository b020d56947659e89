"""Classes of one's own, named `module:Class` in a config. Imports no torch by itself.

A config, and a run's files with it, may come from anyone, and importing a module runs it: only modules that the user
names in the environment are imported.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, TypeVar

T = TypeVar("T")

TRUSTED = "TRIPTYCH_MODULES"
"""Environment variable: modules that a config may name, several with commas between them."""


def own_class(name: str, kind: type[T]) -> type[T]:
    """The class, under `kind`, that `module:Class` names on PYTHONPATH. Raises ValueError that says what to do."""
    module_name, _, class_name = name.partition(":")
    trusted = [one.strip() for one in os.environ.get(TRUSTED, "").split(",")]
    if not module_name or not class_name:
        raise ValueError(f"{name}: should be module:Class")
    if module_name not in trusted:
        raise ValueError(
            f"{name}: a module of your own is code, and is imported only where you say so: export "
            f"{TRUSTED}={','.join([*filter(None, trusted), module_name])}"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{name}: {module_name} cannot be imported ({error}); is it on PYTHONPATH?"
        ) from None
    except Exception as error:  # whatever the module does when it is imported
        message = f"{name}: importing {module_name} fails with {type(error).__name__}: {error}"
        raise ValueError(message) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ValueError(f"{name}: {module_name} has no {class_name}")
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"{name}: is no {kind.__module__}.{kind.__name__}")
    return found


def named(path: str) -> Any:
    """What code itself, not a config, names as `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
