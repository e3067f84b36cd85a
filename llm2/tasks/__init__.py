"""Tasks: problems to be solved, their prompts and their grading."""

from llm2.tasks.task import NumberTask, Problem, Task, load_task, read_problems, require_distinct_ids

__all__ = ["NumberTask", "Problem", "Task", "load_task", "read_problems", "require_distinct_ids"]
