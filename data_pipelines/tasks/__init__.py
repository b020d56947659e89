"""Synthetic tasks: sequences and their answers, made as they are needed. They measure what a model can compute."""

from data_pipelines.tasks.base import Answers, Task
from data_pipelines.tasks.rows import TaskRows
from data_pipelines.tasks.table import TASKS, build_task

__all__ = ["TASKS", "Answers", "Task", "TaskRows", "build_task"]
