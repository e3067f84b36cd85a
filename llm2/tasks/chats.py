"""Gold solutions from JSON Lines of chats: `messages` that end in the solution, and optionally `answer`."""

from itertools import islice

from llm2.common.chat import check_messages
from llm2.common.jsonl import read_jsonl
from llm2.errors import UserError
from llm2.tasks.task import NumberTask, Problem


class Chats(NumberTask):
    """Chats from a file. Answers are compared as numbers, unless `grader` is set."""

    def problems(self, split: str, limit: int | None = None) -> list[Problem]:
        """An id is the line's `id`, else line-NUMBER; the gold answer is its `answer`, else the gold solution."""
        if self.data_file is None:
            raise UserError("task: chats needs data_file=<JSON lines of messages>, found none")
        lines = islice(read_jsonl(self.data_file, "chats"), limit)
        return [_problem(record, number, f"{self.data_file}, line {number}") for number, record in lines]


def _problem(record: dict, number: int, where: str) -> Problem:
    messages = record.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise UserError(f"{where}: expected the key 'messages' with a prompt and a gold solution")
    check_messages(messages, where)
    roles = [message["role"] for message in messages[-2:]]
    if roles != ["user", "assistant"]:
        raise UserError(
            f"{where}: key 'messages': expected the user's question and the assistant's solution at the end, "
            f"found messages by {' and '.join(roles)}"
        )
    *history, question, solution = ({"role": m["role"], "content": m["content"]} for m in messages)
    answer = record.get("answer", solution["content"])
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise UserError(f"{where}: key 'answer': expected a text or a number, found {answer!r}")
    return Problem(
        str(record.get("id", f"line-{number}")), question["content"], str(answer), solution["content"], history
    )
