"""Tasks: problems to be solved, their prompts and their grading."""

from llm2.tasks.task import NumberTask, Problem, Task, load_task

__all__ = ["NumberTask", "Problem", "Task", "load_task"]
