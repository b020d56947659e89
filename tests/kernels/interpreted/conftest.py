"""Tests of the Triton kernels in Triton's interpreter: a process of its own, begun with TRITON_INTERPRET=1.

A kernel is interpreted or compiled by what the environment said when it was decorated, so these files are
collected only there (`make test` runs both).
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels.interpreted.bfloat16 import compute_bfloat16_as_numbers

    compute_bfloat16_as_numbers()
else:
    collect_ignore_glob = ["test_*.py"]
