"""Renew the frozen configs of all shipped runs; read the diff before committing it.

python -m tests.golden
"""

import argparse

from pretrain.config import load_config
from tests.golden import golden_path, runnable_configs

argparse.ArgumentParser(
    prog="python -m tests.golden",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
).parse_args()
for path in runnable_configs():
    golden_path(path).write_text(load_config(path).to_yaml(), encoding="utf-8")
    print(golden_path(path))
