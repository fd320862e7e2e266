"""The tasks: read, prompt, score. Each family of data sets has its own file."""

from ptmoe.tasks.base import Example, Task
from ptmoe.tasks.loading import (
    GROUPS,
    TASKS,
    check_labels,
    check_size,
    is_file,
    listed_names,
    load_task,
    stream_task,
    task_named,
    task_names,
)
from ptmoe.tasks.problems import Problems
from ptmoe.tasks.scoring import score

__all__ = [
    "GROUPS",
    "TASKS",
    "Example",
    "Problems",
    "Task",
    "check_labels",
    "check_size",
    "is_file",
    "listed_names",
    "load_task",
    "score",
    "stream_task",
    "task_named",
    "task_names",
]
