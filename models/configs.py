"""The settings of each family, by its name. Imports no torch."""

from __future__ import annotations

from typing import Any

from models.hybrid.config import HybridConfig
from models.mamba2.config import Mamba2Config
from models.pararnn.config import ParaRNNConfig
from models.sigmoid.config import SigmoidConfig
from models.softmax.config import SoftmaxConfig
from models.trimodal.config import TrimodalConfig

# In the order in which errors name them.
configs: dict[str, Any] = {
    "sigmoid": SigmoidConfig,
    "softmax": SoftmaxConfig,
    "pararnn": ParaRNNConfig,
    "mamba2": Mamba2Config,
    "trimodal": TrimodalConfig,
    "hybrid": HybridConfig,
}
