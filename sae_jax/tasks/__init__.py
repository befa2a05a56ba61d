"""Binary tasks: questions about a token of a text, with their answers.

`examples` are read from files of JSON lines; `python_examples` makes them of Python
source, by the standard library's own `ast` and `tokenize`.
"""

from sae_jax.tasks.examples import (
    LEAST_TASK_ROWS,
    TASK_HELDOUT_EVERY,
    Example,
    list_kinds,
    read_examples,
    write_examples,
)
from sae_jax.tasks.labels import TASKS, Task
from sae_jax.tasks.python import (
    PythonExamples,
    TaskCounts,
    format_counts,
    python_examples,
)

__all__ = [
    "LEAST_TASK_ROWS",
    "TASKS",
    "TASK_HELDOUT_EVERY",
    "Example",
    "PythonExamples",
    "Task",
    "TaskCounts",
    "format_counts",
    "list_kinds",
    "python_examples",
    "read_examples",
    "write_examples",
]
