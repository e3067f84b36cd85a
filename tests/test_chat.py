"""Chat templates -> token ids: what a tokenizer begins a text with stands there once, and never silently not at all."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from llm2.common.chat import TEMPLATES, encode_chats
from llm2.common.loading import load_tokenizer
from llm2.errors import UserError
from llm2.tasks.few_shot import with_examples

CHAT = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "2."}]


@pytest.fixture
def tokenizer():
    return load_tokenizer("testbed")


@pytest.fixture
def with_bos(tokenizer):
    """A tokenizer that begins every text with BOS, as Gemma's and Llama's do."""
    tokenizer = copy.deepcopy(tokenizer)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def test_the_template_for_base_models_writes_question_and_answer(tokenizer, with_bos):
    for each in (tokenizer, with_bos):
        (ids,) = encode_chats(each, [CHAT], TEMPLATES["base"])
        assert each.decode(ids) == f"{each.bos_token}How many?\n\n2.{each.eos_token}"
        (prompt,) = encode_chats(each, [CHAT[:1]], TEMPLATES["base"], generation_prompt=True)
        assert ids[: len(prompt)] == prompt
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    assert without.decode(encode_chats(without, [CHAT[:1]], TEMPLATES["base"])[0]) == "How many?\n\n"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_bos_stands_there_once_or_the_template_is_refused(with_bos, template):
    if "bos_token" in template:
        (ids,) = encode_chats(with_bos, [CHAT], template)
        assert ids[0] == with_bos.bos_token_id and ids.count(with_bos.bos_token_id) == 1
        return
    with pytest.raises(UserError, match=r"leaves out '<\|begin_of_text\|>', .*; expected {{ bos_token }} at its start"):
        encode_chats(with_bos, [CHAT], template)


def test_a_tokenizers_own_template_is_taken_as_it_is(with_bos):
    with_bos.chat_template = TEMPLATES["chatml-plain"]
    (ids,) = encode_chats(with_bos, [CHAT])
    assert with_bos.bos_token_id not in ids


def test_a_model_without_a_template_is_told_of_the_built_in_ones(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="expected chat_template to be one of llama3-plain, chatml-plain, base, or a"):
        encode_chats(tokenizer, [CHAT])


def test_examples_stand_after_the_system_prompt():
    system, examples = {"role": "system", "content": "Be brief."}, [{"role": "user", "content": "1?"}, CHAT[1]]
    assert with_examples(examples, [system, CHAT[0]]) == [system, *examples, CHAT[0]]
    assert with_examples(examples, CHAT[:1]) == [*examples, CHAT[0]]
