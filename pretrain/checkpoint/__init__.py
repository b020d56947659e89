"""Checkpoints in model space: one format for every engine and every parallel layout.

`CheckpointStore` saves, finds and loads steps. An engine describes what it owns as `Fragment`s.
"""

from pretrain.checkpoint.fragments import Fragment, Placement, Segment, TrainingState
from pretrain.checkpoint.steps import StepInfo
from pretrain.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore", "Fragment", "Placement", "Segment", "StepInfo", "TrainingState"]
