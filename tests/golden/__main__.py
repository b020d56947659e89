"""Renew the frozen configs."""

from pretrain.config import load_config
from tests.golden import golden_path, runnable_configs

for path in runnable_configs():
    golden_path(path).write_text(load_config(path).to_yaml(), encoding="utf-8")
    print(golden_path(path))
