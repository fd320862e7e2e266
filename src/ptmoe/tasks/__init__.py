"""The tasks: read, prompt, score. Each family of data sets has its own file."""

from ptmoe.tasks.base import Example as Example
from ptmoe.tasks.base import Task as Task
from ptmoe.tasks.loading import GROUPS as GROUPS
from ptmoe.tasks.loading import TASKS as TASKS
from ptmoe.tasks.loading import check_data_dir as check_data_dir
from ptmoe.tasks.loading import check_labels as check_labels
from ptmoe.tasks.loading import check_size as check_size
from ptmoe.tasks.loading import is_file as is_file
from ptmoe.tasks.loading import listed_names as listed_names
from ptmoe.tasks.loading import load_task as load_task
from ptmoe.tasks.loading import stream_task as stream_task
from ptmoe.tasks.loading import task_named as task_named
from ptmoe.tasks.loading import task_names as task_names
from ptmoe.tasks.problems import Problems as Problems
from ptmoe.tasks.scoring import score as score
