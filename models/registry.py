"""The families by their names."""

from __future__ import annotations

from models.family import Family
from models.hybrid.family import hybrid
from models.mamba2.family import mamba2
from models.pararnn.family import pararnn
from models.sigmoid.family import sigmoid
from models.softmax.family import softmax
from models.trimodal.family import trimodal

families: dict[str, Family] = {
    family.name: family for family in (sigmoid, softmax, pararnn, mamba2, trimodal, hybrid)
}
