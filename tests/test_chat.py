"""Chat templates -> token ids: the same ones in every command, today and tomorrow; what a tokenizer begins a text with
stands there once, and never silently not at all."""

import copy
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_verifier
from tokenizers.processors import TemplateProcessing

import llm2.vllm.serve
from experiments.baselines.config import FinetuneConfig, OutcomeConfig
from experiments.baselines.finetune import finetune
from experiments.baselines.outcome import train_outcome
from llm2 import LLM2
from llm2.common.chat import TEMPLATES, encode_chats
from llm2.common.loading import load_tokenizer
from llm2.common.progress import DecodingBar
from llm2.config import EvaluateConfig, ExploreConfig, Mode, ServeConfig, TrainConfig
from llm2.errors import UserError
from llm2.evaluation.evaluate import Evaluator, evaluate
from llm2.exploration.explore import explore
from llm2.exploration.solutions import tokenize_solutions
from llm2.tasks import load_task
from llm2.tasks.few_shot import with_examples
from llm2.verifier.train import train
from llm2.verifier.triplets import Triplet, load_examples, record_line

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


PROMPT = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"


def stock(content: str, begin: str = "") -> str:
    """A template that writes `begin`, then every message's header and content."""
    header = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>'"
    return f"{begin}{{% for m in messages %}}{{{{ {header} + ({content}) + '<|eot_id|>' }}}}{{% endfor %}}{PROMPT}"


# Like the stock templates of SmolLM2, of Gemma and Llama, of Qwen3, and of Llama 3.2.
DEFAULT_SYSTEM = stock("m['content']", "{% if messages[0]['role'] != 'system' %}You are X.<|eot_id|>{% endif %}")
TRIMS = stock("m['content'] | trim", "{{ bos_token }}")
THINKS = stock(
    "m['content'] if m['role'] != 'assistant' else "
    "('<think></think>' if loop.last else '') + m['content'].split('</think>')[-1]"
)
DATED = stock("m['content']", "{% set today = strftime_now('%d %b %Y') %}{{ bos_token + today }}")
STOCK = {"default system": DEFAULT_SYSTEM, "trims": TRIMS, "thinks": THINKS, "llama3-plain": TEMPLATES["llama3-plain"]}
SPACED = {"role": "user", "content": " How many \n eggs?\n"}
CHATS = {
    "question": [SPACED],
    "system": [{"role": "system", "content": " Be brief.\n"}, SPACED],
    "turns": [SPACED, {"role": "assistant", "content": "<think>Two.</think>2."}, {"role": "user", "content": "And 3?"}],
}


def write_model(folder: Path, system1_folder: str, template: str, bos: bool = False) -> str:
    """System 1 with this stock template and, with `bos`, a tokenizer that begins every text with BOS."""
    shutil.copytree(system1_folder, folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = template
    if bos:
        token = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token[0]} $A", special_tokens=[token])
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_chats(file: Path, chat: list[dict]) -> str:
    line = {"messages": [*chat, {"role": "assistant", "content": "It is 5."}], "answer": 5}
    file.write_text(json.dumps(line) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def bare_verifier(tmp_path_factory) -> str:
    """A verifier of System 1's size, whose folder names no template."""
    folder = tmp_path_factory.mktemp("bare")
    tiny_verifier(folder / "system1", vocab_size=261).save_pretrained(folder / "verifier")
    return str(folder / "verifier")


def served(model: str, verifier: str, chat_template: str | None, chat: list[dict], monkeypatch) -> list[int]:
    """What vLLM's server makes of a chat: it renders the template that `serve` hands over, else the tokenizer's own."""
    commands = []
    monkeypatch.setattr(llm2.vllm.serve, "require_vllm", lambda: None)
    monkeypatch.setattr(llm2.vllm.serve, "check_options", lambda options: None)
    monkeypatch.setattr(runpy, "run_module", lambda *names, **options: commands.append(llm2.vllm.serve.sys.argv))
    monkeypatch.setattr(llm2.vllm.serve.sys, "argv", [])
    llm2.vllm.serve.serve(ServeConfig(model=model, verifier=verifier, chat_template=chat_template, device="cpu"))
    options = dict(zip(commands[0][1:], commands[0][2:], strict=False))
    return load_tokenizer(model).apply_chat_template(
        chat, chat_template=options.get("--chat-template"), add_generation_prompt=True, return_dict=False
    )


@pytest.mark.one_in(5)
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("given", ["the tokenizer's own", "by a file"])
@pytest.mark.parametrize("name", STOCK)
def test_a_chats_ids_are_the_same_in_every_command(
    name, given, chat, system1_folder, bare_verifier, tmp_path, monkeypatch
):
    template, bos = STOCK[name], "bos_token" in STOCK[name]
    own = template if given == "the tokenizer's own" else DATED
    model = write_model(tmp_path / "model", system1_folder, own, bos)
    chat_template = None if own == template else str(tmp_path / "given.jinja")
    (tmp_path / "given.jinja").write_text(template)
    verifier = shutil.copytree(bare_verifier, tmp_path / "verifier")  # and what `train` leaves there
    tokenizer, data = load_tokenizer(model), write_chats(tmp_path / "chats.jsonl", chat)
    task = load_task("chats", data)
    (solution,) = tokenize_solutions(task, task.problems("test"), tokenizer, chat_template and template, [])
    expected = solution.ids[: solution.start]

    triplet = Triplet(solution.end - 2, solution.ids[solution.end - 2], 1)
    (tmp_path / "triplets.jsonl").write_text(record_line(solution.messages, [triplet]))
    ((example,), _) = load_examples(tmp_path / "triplets.jsonl", tokenizer, chat_template and template)
    assert (example.ids, example.ids[: example.start]) == (solution.ids, expected)

    tokenizer.chat_template = template
    tokenizer.save_pretrained(verifier)
    config = EvaluateConfig(
        model=model,
        chat_template=chat_template,
        task="chats",
        data_file=data,
        output_dir="o",
        verifier=str(verifier),
        max_new_tokens=1,
        device="cpu",
    )
    evaluator = Evaluator(config, load_tokenizer(config.model), task, ())
    with DecodingBar(1, 1, disable=True) as bar:
        (decoded,) = evaluator._decode(Mode.GUIDED_GREEDY, task.problems("test"), bar)
    assert decoded.prompt == expected

    loaded = LLM2.from_pretrained(model, str(verifier), device="cpu")  # README.md's example
    inputs = loaded.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert inputs["input_ids"][0].tolist() == expected

    assert served(model, str(verifier), chat_template, chat, monkeypatch) == expected
    assert expected.count(tokenizer.bos_token_id) == bos
    harness = pytest.importorskip("llm2.evaluation.lm_eval_model")
    for options in ({"verifier": str(verifier)}, {"chat_template": chat_template}):
        harness_model = harness.HarnessModel(model, device="cpu", **options)
        assert harness_model._encode(harness_model.apply_chat_template(chat)) == expected


def test_the_harness_adds_no_bos_that_a_chat_template_leaves_out(system1_folder, tmp_path):
    harness = pytest.importorskip("llm2.evaluation.lm_eval_model")
    model = write_model(tmp_path / "model", system1_folder, TEMPLATES["chatml-plain"], bos=True)
    harness_model = harness.HarnessModel(model, device="cpu")
    assert harness_model._encode("How many?")[0] == harness_model.llm2.tokenizer.bos_token_id
    ids = harness_model._encode(harness_model.apply_chat_template(CHATS["question"]))
    assert [ids] == encode_chats(load_tokenizer(model), [CHATS["question"]], generation_prompt=True)


def test_a_verifier_keeps_the_template_it_was_trained_with(system1_folder, tmp_path):
    """Also where the file is gone that it was read from; other templates are refused, by every name."""
    file, model = tmp_path / "t.jinja", write_model(tmp_path / "model", system1_folder, TEMPLATES["llama3-plain"])
    file.write_text(TRIMS)
    chats = [[{**CHAT[0], "content": f"{i} {CHAT[0]['content']}"}, *CHAT[1:]] for i in range(4)]
    lines = [
        record_line(chat, [Triplet(len(ids) - 2, ids[-2], 1)])
        for chat, ids in zip(chats, encode_chats(load_tokenizer(model), chats, TRIMS), strict=True)
    ]
    (tmp_path / "triplets.jsonl").write_text("".join(lines))
    config = TrainConfig(
        model=model,
        train_file=str(tmp_path / "triplets.jsonl"),
        output_dir=str(tmp_path / "verifier"),
        device="cpu",
        chat_template=str(file),
        num_train_epochs=1.0,
        evaluations=1,
    )
    train(config)
    file.unlink()
    verifier = config.output_dir
    assert LLM2.from_pretrained(model, verifier, device="cpu").tokenizer.chat_template == TRIMS
    expected = f"found 'llama3-plain', expected '{verifier}/chat_template.jinja'"
    with pytest.raises(UserError, match=expected):
        LLM2.from_pretrained(model, verifier, chat_template="llama3-plain", device="cpu")
    with pytest.raises(UserError, match="found None, expected"):
        llm2.vllm.serve.check(ServeConfig(model=model, verifier=verifier, device="cpu"))
    llm2.vllm.serve.check(ServeConfig(model=model, verifier=verifier, chat_template=f"{verifier}/chat_template.jinja"))


@pytest.mark.parametrize("date", ["strftime_now('%d %b %Y')", "strftime_now('%Y') | int + 1", "strftime_now('%A')[:3]"])
def test_a_template_that_writes_the_date_is_refused_and_one_that_only_reads_it_is_not(tokenizer, date):
    begin = f"{{% set today = {date} %}}{{% if messages | length == 1 %}}{{{{ today }}}}{{% endif %}}"
    with pytest.raises(UserError, match="writes today's date .* expected chat_template to be one of llama3-plain"):
        encode_chats(tokenizer, [CHAT[:1]], stock("m['content']", begin))
    undated = encode_chats(tokenizer, [CHAT], stock("m['content']"))
    assert encode_chats(tokenizer, [CHAT], stock("m['content']", begin)) == undated


PARTS = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] if part['type'] == 'text' }}{% endfor %}"
WITHOUT_DEVELOPER = "{% for m in messages %}{% if m['role'] in ('system', 'user') %}{{ m['content'] }}{% endif %}"


@pytest.mark.parametrize(("template", "role"), [(PARTS, "user"), (WITHOUT_DEVELOPER, "developer")])
def test_a_template_that_leaves_out_a_message_is_refused(tokenizer, template, role):
    """As those of image models do with texts that are no list, and many with a developer's message."""
    template += "{% endfor %}"
    with pytest.raises(UserError, match=rf"leaves out the message .*'{role}', 'content': 'How many\?'\}}; exp"):
        encode_chats(tokenizer, [[{"role": role, "content": "How many?"}]], template)


def test_a_template_may_trim_messages_drop_thoughts_and_write_a_tools_answer_as_json(tokenizer):
    template = "{% for m in messages %}{{ (m['content'] | tojson if m['role'] == 'tool' else m['content'].split("
    template += "'</think>')[-1] | trim) + '|' }}{% endfor %}"
    chat = [SPACED, {"role": "assistant", "content": "<think>Two.</think> 2."}, {"role": "tool", "content": '"5"'}]
    assert tokenizer.decode(encode_chats(tokenizer, [chat], template)[0]) == 'How many \n eggs?|2.|"\\"5\\""|'


def test_a_dated_template_is_refused_in_every_command_before_weights_load(system1_folder, bare_verifier, tmp_path):
    model = write_model(tmp_path / "model", system1_folder, DATED)
    Path(model, "model.safetensors").write_text("nothing that could be loaded")
    data = {"task": "chats", "data_file": write_chats(tmp_path / "chats.jsonl", CHATS["question"])}
    (tmp_path / "triplets.jsonl").write_text(record_line(CHAT, [Triplet(1, 2, 3)]) * 4)
    folder, triplets = str(tmp_path / "o"), str(tmp_path / "triplets.jsonl")
    base = {"model": model, "device": "cpu"}
    explored = ExploreConfig(**base, **data, output=folder)
    commands = [
        lambda: explore(explored),
        lambda: explore(replace(explored, solutions="own")),
        lambda: train(TrainConfig(**base, train_file=triplets, output_dir=folder)),
        lambda: evaluate(EvaluateConfig(**base, **data, output_dir=folder, verifier=bare_verifier)),
        lambda: llm2.vllm.serve.check(ServeConfig(**base, verifier=bare_verifier)),
        lambda: LLM2.from_pretrained(model, bare_verifier, device="cpu"),
        lambda: finetune(FinetuneConfig(**base, **data, output_dir=folder)),
        lambda: finetune(FinetuneConfig(**base, **data, output_dir=folder, solutions="own")),
        lambda: train_outcome(OutcomeConfig(**base, **data, output_dir=folder)),
    ]
    for command in commands:
        with pytest.raises(UserError, match=f"chat template of the tokenizer {model} writes today's date"):
            command()
