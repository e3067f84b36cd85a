"""The interface of a task: load problems of a split, make the prompt, grade solutions."""

import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm2.common.chat import Message
from llm2.common.code import load_code
from llm2.errors import UserError, as_user_error, origin, quote, reason
from llm2.tasks.grading import Grade, extract_answer, grade_numbers

GRADER_SECONDS = 60.0  # for one solution
BUILT_IN = {
    "gsm8k": "llm2.tasks.gsm8k:GSM8K",
    "math500": "llm2.tasks.math500:Math500",
    "mawps": "llm2.tasks.word_problems:Mawps",
    "svamp": "llm2.tasks.word_problems:Svamp",
    "testbed": "llm2.tasks.testbed:Testbed",
    "chats": "llm2.tasks.chats:Chats",
}


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer; exploration also needs the gold solution."""

    id: str  # unique within its split
    question: str
    gold: str  # the answer, as the task's `grade` compares it
    solution: str = ""
    history: Sequence[Message] = ()  # messages before the question: a system prompt, earlier turns


class Task:
    """Base class of all tasks. A subclass needs only `problems` and `extract_answer`.

    Args:
        data_file: local JSON Lines in the task's format, read instead of its source, without network.
    """

    def __init__(self, data_file: str | None = None) -> None:
        self.data_file = data_file

    def problems(self, split: str, limit: int | None = None) -> list[Problem]:
        """The first `limit` problems (all when None) of a split. Raises UserError for a user's mistake."""
        raise NotImplementedError

    def prompt(self, problem: Problem) -> list[Message]:
        """The chat that the model continues; it ends with the user's turn."""
        return [*problem.history, {"role": "user", "content": problem.question}]

    def conversation(self, problem: Problem) -> list[Message]:
        """The prompt and the gold solution."""
        return [*self.prompt(problem), {"role": "assistant", "content": problem.solution}]

    def extract_answer(self, text: str) -> str | None:
        """A solution's final answer, None if there is none. Equal answers must be equal strings, for voting."""
        raise NotImplementedError

    def grade(self, texts: Sequence[str], gold: str) -> list[Grade]:
        """One grade per solution of the problem with this gold answer."""
        answers = [self.extract_answer(text) for text in texts]
        return [Grade(answer, answer == gold, answer == gold) for answer in answers]

    def can_compare(self, gold: str) -> bool:
        """Whether `grade` can compare solutions with this gold answer."""
        return True

    def close(self) -> None:
        """Release resources such as processes."""


class NumberTask(Task):
    """A task whose answers are numbers (llm2/tasks/grading.py)."""

    def extract_answer(self, text: str) -> str | None:
        return extract_answer(text)

    def grade(self, texts: Sequence[str], gold: str) -> list[Grade]:
        return grade_numbers(texts, gold)

    def can_compare(self, gold: str) -> bool:
        """Not an answer of several numbers, such as 3 1/2 or 10:30: solutions are read at the first one behind "answer
        is". A gold answer of more than four words may be a solution, whose last number counts."""
        number = extract_answer(gold)
        of_one = len(gold.split()) > 4 or number == extract_answer(f"The answer is {gold}")
        return number is not None and of_one


def load_task(name: str, data_file: str | None = None, grader: str | None = None, key: str = "task") -> Task:
    """A task by its name or as MODULE:CLASS, installed or in the working directory.

    Args:
        grader: MODULE:FUNCTION of (text, gold) -> bool that replaces the task's grading.
        key: name of the key in errors.
    """
    cls = load_code(key, BUILT_IN.get(name, name), f"one of {', '.join(BUILT_IN)}, or MODULE:CLASS")
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise UserError(f"key {key!r}: {name!r} is no subclass of llm2.tasks.Task")
    with as_user_error(f"key {key!r}: {name!r} fails on data_file={data_file}"):
        task = cls(data_file)
    if grader is not None:
        task.can_compare = lambda gold: True
        is_correct = _guard(grader, load_code("grader", grader, "MODULE:FUNCTION"))
        task.grade = lambda texts, gold: [_grade(task, text, gold, is_correct(text, gold)) for text in texts]
    return task


def read_problems(task: Task, split: str, limit: int | None = None) -> list[Problem]:
    """The problems of a task. Raises UserError if there are none, or if a gold answer cannot be compared."""
    where = task.data_file or f"the split {split!r} of {type(task).__name__}"
    with as_user_error(f"{where}: the problems could not be read"):
        problems = task.problems(split, limit)
    if not problems:
        raise UserError(f"{where}: expected at least one problem, found none")
    for problem in problems:
        for key in ("id", "question", "gold", "solution"):
            if not isinstance(value := getattr(problem, key), str):
                raise UserError(f"{where}: problem {problem.id!r}: {key}: found {quote(value)}, expected a text")
        if not task.can_compare(problem.gold):
            raise UserError(
                f"{where}: problem {problem.id}: expected one number as gold answer, found {quote(problem.gold)}; "
                "grader=MODULE:FUNCTION compares other answers"
            )
    return problems


def require_distinct_ids(task: Task, problems: Sequence[Problem]) -> None:
    """Raise UserError if two problems have the same id."""
    name, count = Counter(problem.id for problem in problems).most_common(1)[0]
    if count > 1:
        where = f"{task.data_file}: " if task.data_file else ""
        raise UserError(f"{where}the id {name!r} stands for {count} problems, expected different ids")


def _guard(name: str, grader: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    """Wrap a user's grader: an exception, a timeout or an answer other than yes or no becomes a UserError with its
    arguments."""

    def too_slow(*_) -> None:
        raise UserError(f"no answer in {GRADER_SECONDS:g} seconds")

    def guarded(text: str, gold: str) -> bool:
        # Only the main thread can set an alarm; all commands grade in it.
        alarmed = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGALRM, too_slow) if alarmed else None
        try:
            if alarmed:
                signal.setitimer(signal.ITIMER_REAL, GRADER_SECONDS)
            correct = grader(text, gold)
            if correct not in (False, True):  # a text such as "False", or None where a return was forgotten
                raise UserError(f"returned {quote(correct)}, expected True or False")
            return bool(correct)
        except Exception as error:
            asked = f"key 'grader': {name!r} fails on the solution {quote(text)} with the gold answer {quote(gold)}"
            place = "" if isinstance(error, UserError) else f" ({origin(error)})"
            raise UserError(f"{asked}: {reason(error)}{place}") from error
        finally:
            if alarmed:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)

    return guarded


def _grade(task: Task, text: str, gold: str, correct: bool) -> Grade:
    """Correct solutions vote for gold, wrong ones for their extracted answer, or for their text if there is none."""
    answer = gold if correct else task.extract_answer(text) or text
    return Grade(None if answer == gold and not correct else answer, correct, correct)
