"""The tasks by name. A new one is a file beside this one and a line in this table (app/README.md)."""

from app.evaluation.task import Task
from app.evaluation.tasks.boolq import BOOLQ

TASKS: dict[str, Task] = {task.name: task for task in (BOOLQ,)}
