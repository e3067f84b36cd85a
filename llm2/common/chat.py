"""Chat messages -> token ids, through a chat template.

The built-in templates write only what the messages hold: no system preamble, no date. The published triplets were made
with such a template; under a model's stock template their positions are wrong. Stock templates are used unchanged,
including their system prompts, unless they write today's date: those are refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm2.common.files import read_text
from llm2.errors import UserError, as_user_error, quote

Message = dict[str, str]

LLAMA3_PLAIN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_PLAIN = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# For base models without roles: a blank line ends the question, the end-of-sequence token the answer.
BASE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message['content'] + (eos_token if message['role'] == 'assistant' else '\n\n') }}"
    "{% endfor %}"
)
TEMPLATES = {"llama3-plain": LLAMA3_PLAIN, "chatml-plain": CHATML_PLAIN, "base": BASE}
ROLES = ("system", "developer", "user", "assistant", "tool")
# Prepended to a template: its strftime_now writes the digit DAY for each part of a date.
ANOTHER_DAY = (
    "{% macro strftime_now(format) %}{% for part in format.split('%') %}"
    "{{ part if loop.first else 'DAY' ~ part[1:] }}{% endfor %}{% endmacro %}"
)
EXPECTED_TEMPLATE = f"one of {', '.join(TEMPLATES)}, or a readable Jinja file"


def check_messages(messages: Sequence[Any], where: str, key: str = "messages") -> None:
    """Raise UserError, prefixed with `where`, at the first message that lacks a known role or a content."""
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"{where}: key {key!r}: expected objects with role and content, found {quote(message)}")
        if message["role"] not in ROLES:
            raise UserError(
                f"{where}: key {key!r}: expected a role of {', '.join(ROLES)}, found {quote(message['role'])}"
            )


def resolve_template(name: str | None) -> str | None:
    """The Jinja text of a built-in template or a file; None (the tokenizer's own template) is returned unchanged."""
    if name is None or name in TEMPLATES:
        return TEMPLATES.get(name)
    if not Path(name).is_file():
        raise UserError(f"chat template {name!r}: expected {EXPECTED_TEMPLATE}")
    return read_text(name, "chat template")


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    template: str | None = None,
    generation_prompt: bool = False,
) -> list[list[int]]:
    """Token ids of each conversation, without padding.

    Args:
        template: Jinja text as `resolve_template` returns it; the tokenizer's own when None.
        generation_prompt: end with the assistant's header. Positions in triplets are counted without it.
    """
    texts = [render(tokenizer, chat, template, add_generation_prompt=generation_prompt) for chat in conversations]
    conversations_ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    if template is not None:
        _require_bos(tokenizer, template, conversations_ids)
    return conversations_ids


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str | None = None, **options: bool
) -> str:
    """The text of a conversation; `options` go to apply_chat_template, `template` is as for `encode_chats`.

    Raises UserError if there is no template, if it fails, if it leaves out a message, or if it writes today's date,
    since positions counted today would be wrong tomorrow.
    """
    name = f"the tokenizer {tokenizer.name_or_path}"
    if template is None and tokenizer.chat_template is None:
        raise UserError(f"{name} has no chat template of its own; expected chat_template to be {EXPECTED_TEMPLATE}")
    source = f"the chat template of {name}" if template is None else f"the chat_template {quote(template)}"
    with as_user_error(f"{source} fails on the messages {quote(list(messages))}"):
        jinja = tokenizer.get_chat_template(template)
        days = [ANOTHER_DAY.replace("DAY", day) for day in "12"] if "strftime_now" in jinja else []
        text, *others = (
            tokenizer.apply_chat_template(list(messages), chat_template=day + jinja, tokenize=False, **options)
            for day in ["", *days]
        )
    if len({*others}) > 1:
        raise UserError(
            f"{source} writes today's date (strftime_now): triplets and scores of today would not fit tomorrow; "
            f"expected chat_template to be {EXPECTED_TEMPLATE} in which the date is fixed"
        )
    for message in messages:
        content = message["content"].rpartition("</think>")[2].strip()  # many templates trim, and drop old thoughts
        if message["role"] != "tool" and content not in text:  # JSON in some
            raise UserError(
                f"{source} leaves out the message {quote(message)}; expected chat_template to be {EXPECTED_TEMPLATE} "
                "that writes every message"
            )
    return text


def _require_bos(tokenizer: PreTrainedTokenizerBase, template: str, conversations: Sequence[Sequence[int]]) -> None:
    """Raise UserError if the tokenizer begins texts with a BOS token and the template does not: the model was trained
    with it."""
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    if begins and any(ids[:1] != [bos] for ids in conversations):
        raise UserError(
            f"chat_template {quote(template)} leaves out {tokenizer.bos_token!r}, with which the tokenizer "
            f"{tokenizer.name_or_path} begins a text; expected {{{{ bos_token }}}} at its start"
        )
