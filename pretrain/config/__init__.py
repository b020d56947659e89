"""A run as a value: typed sections, validated all at once.

A config file is YAML. `extends: other.yaml` (relative to the file) is merged under it, then come the command
line's `key=value` overrides (`merge`). `load_config` returns a `Config`, or raises one `ConfigError` that lists
every problem with its path, its value, what would be right, and a near miss for a misspelt key.

Files of this package import one another, never the package: `sections` what a config has, `loading` how one is
read, `validation` each section by itself, `checks` rules between them, `layout` and `world` which ranks a model, its
rows and the processes allow, `nearest` the layout next to a wrong one. Nothing here imports torch.
"""

from pretrain.config.data import DataSection, SourceSection
from pretrain.config.loading import config_from_dict, load_config, load_resolved
from pretrain.config.sections import SECTIONS, Config, ParallelSection

__all__ = [
    "SECTIONS",
    "Config",
    "DataSection",
    "ParallelSection",
    "SourceSection",
    "config_from_dict",
    "load_config",
    "load_resolved",
]
