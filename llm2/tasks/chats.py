"""Gold solutions from any JSON lines of chats: `messages` that end in the solution, and `answer` where there is one.

Knows that format and what can be wrong with a line. Leaves whether an answer is right to a checker.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from llm2.errors import UserError

Message = dict[str, str]


@dataclass(frozen=True)
class Chat:
    """A conversation whose last message is a gold solution. It serves where a Problem does."""

    id: str
    conversation: list[Message]
    gold: str  # what the checker compares an answer with; the gold solution itself where the line has no `answer`

    @property
    def prompt(self) -> list[Message]:
        return self.conversation[:-1]

    @property
    def solution(self) -> str:
        return self.conversation[-1]["content"]


def load_chats(path: str, checker: Callable[[str, str], bool], limit: int | None = None) -> list[Chat]:
    """The first `limit` lines (all when None), each with its own `id` or else line-NUMBER; blank lines are skipped.

    Raises UserError at the first line that cannot be read, or whose gold solution the checker does not accept.
    """
    return list(islice(_chats(path, checker), limit))


def _chats(path: str, checker: Callable[[str, str], bool]) -> Iterator[Chat]:
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    chat = _parse(line, number, f"{path}, line {number}")
                    if not checker(chat.solution, chat.gold):
                        raise UserError(
                            f"{path}, line {number}: key 'answer': the checker does not accept the gold solution, "
                            f"which ends in {chat.solution[-40:]!r}, for the answer {chat.gold[-40:]!r}"
                        )
                    yield chat
    except OSError as error:
        raise UserError(f"cannot read the chats {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from None


def _parse(line: str, number: int, where: str) -> Chat:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or len(messages) < 2:
        raise UserError(f"{where}: expected an object with the key 'messages' that holds a prompt and a gold solution")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"{where}: key 'messages': expected objects with 'role' and 'content', found {message!r}")
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is by {messages[-1]['role']!r}; expected the assistant's solution")
    answer = record.get("answer", messages[-1]["content"])
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise UserError(f"{where}: key 'answer': expected a text or a number, found {answer!r}")
    conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Chat(str(record.get("id", f"line-{number}")), conversation, str(answer))
