"""Bad input other than models: YAML, overrides, paths, JSON Lines, templates, graders and tasks, servers, results."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.robustness.bad_input import Case, Stock

EVALUATE = ("evaluate", "model=testbed", "device=cpu", "task=testbed", "limit=2", "modes=[plain_greedy]")
EVALUATE += ("max_new_tokens=8", "output_dir=out")
EXPLORE = ("explore", "model=testbed", "device=cpu", "task=testbed", "limit=2", "max_new_tokens=8", "output=out.jsonl")
TRAIN = ("train", "model=testbed", "device=cpu", "train_file=triplets.jsonl", "output_dir=out")
PRETRAIN = ("pretrain", "output_dir=out", "documents=8", "max_steps=1")
Make = Callable[[Path, Stock], list[str]]


def files(arguments: tuple[str, ...], **contents: str | bytes) -> Make:
    """Write files (`_` stands for the dot of a name) and return these arguments."""

    def make(folder: Path, stock: Stock) -> list[str]:
        for name, content in contents.items():
            data = content if isinstance(content, bytes) else content.encode()
            (folder / name.replace("_", ".")).write_bytes(data)
        return list(arguments)

    return make


def yaml(name: str, text: str | bytes, *says: str, command: str = "evaluate") -> Case:
    named = () if "study's unknown name" in name else ("c.yaml",)
    return Case(name, "YAML", files((command, "c.yaml"), c_yaml=text), (*named, *says))


def override(name: str, arguments: tuple[str, ...], *says: str) -> Case:
    return Case(name, "overrides", files(arguments), says)


def path(name: str, make: Make, *says: str, **options) -> Case:
    return Case(name, "paths", make, says, **options)


def check(name: str, line: str | bytes, *says: str, lines: int = 1) -> Case:
    """A line of triplets after a good one, checked with the testbed's tokenizer."""

    def make(folder: Path, stock: Stock) -> list[str]:
        data = line if isinstance(line, bytes) else line.encode()
        (folder / "t.jsonl").write_bytes(stock.triplets[0].encode() + b"\n" + data + b"\n")
        return ["check", "t.jsonl", "--tokenizer", "testbed"]

    return Case(name, "JSON Lines", make, ("t.jsonl", *says), lines)


def sample(name: str, change: Callable[[list], list], *says: str) -> Case:
    """The first triplet of a good line, changed."""

    def make(folder: Path, stock: Stock) -> list[str]:
        record = json.loads(stock.triplets[0])
        record["samples"][0] = change(record["samples"][0])
        (folder / "t.jsonl").write_text(json.dumps(record))
        return ["check", "t.jsonl", "--tokenizer", "testbed"]

    return Case(name, "JSON Lines", make, ("t.jsonl", "line 1", *says), lines=3)


def chats(name: str, text: str, *says: str) -> Case:
    arguments = ("explore", "model=testbed", "device=cpu", "task=chats", "data_file=c.jsonl", "output=out.jsonl")
    return Case(name, "JSON Lines", files(arguments, c_jsonl=text), ("c.jsonl", *says))


def problems(name: str, text: str, *says: str) -> Case:
    arguments = (*EVALUATE, "data_file=c.jsonl")
    return Case(name, "JSON Lines", files(arguments, c_jsonl=text), ("c.jsonl", *says))


def messages(*turns: tuple[str, str], **more) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns], **more})


def train(name: str, change: Callable[[dict], object], *says: str, arguments: tuple[str, ...] = ()) -> Case:
    """Each line of good triplets changed in place, and trained on."""

    def make(folder: Path, stock: Stock) -> list[str]:
        records = [json.loads(line) for line in stock.triplets]
        for record in records:
            change(record)
        (folder / "triplets.jsonl").write_text("\n".join(map(json.dumps, records)))
        return [*TRAIN, *arguments]

    return Case(name, "JSON Lines", make, says)


def template(name: str, text: str, *says: str, arguments: tuple[str, ...] = EVALUATE) -> Case:
    return Case(name, "chat templates", files((*arguments, "chat_template=t.jinja"), t_jinja=text), says)


def code(name: str, text: str, setting: str, *says: str, arguments: tuple[str, ...] = EXPLORE) -> Case:
    return Case(name, "code of the user's", files((*arguments, setting), mine_py=text), says)


def server(name: str, answer: object, *says: str, models: object = None, evaluates: bool = False, **options) -> Case:
    def make(folder: Path, stock: Stock) -> list[str]:
        stock.answers[name.replace(" ", "-")] = answer
        if models is not None:
            stock.models[name.replace(" ", "-")] = models
        arguments = EVALUATE if evaluates else (*EXPLORE, "top_k=3")
        return [*arguments, "engine=vllm", f"server={stock.server(name.replace(' ', '-'))}"]

    return Case(name, "servers", make, ("server: ", "http://127.0.0.1", *says), **options)


def results(name: str, contents: dict[str, str], *says: str, arguments: tuple[str, ...] = ("report", "out")) -> Case:
    """A results folder with these files."""

    def make(folder: Path, stock: Stock) -> list[str]:
        (folder / "out").mkdir()
        for file, content in contents.items():
            (folder / "out" / file).write_text(content)
        return list(arguments)

    return Case(name, "results folders", make, says)


def _mode(path: str, mode: int, make: Make) -> Make:
    def changed(folder: Path, stock: Stock) -> list[str]:
        arguments = make(folder, stock)
        (folder / path).chmod(mode)
        return arguments

    return changed


def _folder(path: str, make: Make) -> Make:
    def changed(folder: Path, stock: Stock) -> list[str]:
        (folder / path).mkdir(parents=True)
        return make(folder, stock)

    return changed


def _choice(**more) -> dict:
    return {"choices": [{"index": 0, "token_ids": [5, 6], **more}]}


GOOD = "model: testbed\ntask: testbed\noutput_dir: out\n"
PROBLEM = json.dumps({"question": "Two and two?", "answer": "2 + 2 = 4\n#### 4"})
METRICS = json.dumps({"benchmark": "b", "split": "test", "n": 1, "modes": {"plain_greedy": {"accuracy": 1.0}}})

CASES = [
    # --- YAML
    yaml("unknown key", GOOD + "num_sample: 3\n", "line 4", "unknown key 'num_sample'", "did you mean 'num_samples'"),
    yaml("missing key", "model: testbed\ntask: testbed\n", "the key 'output_dir' is missing"),
    yaml("duplicate key", GOOD + "model: other\n", "line 4", "the key 'model' is already on line 1"),
    yaml("nested duplicate key", "axes: {a: {x: {}, x: {}}}\n", "line 1", "'x' is already on", command="study"),
    yaml("text for a number", GOOD + "num_samples: many\n", "line 4", "'num_samples'", "'many'", "valid integer"),
    yaml("number for a text", GOOD + "verifier: 3\n", "line 4", "'verifier'", "found 3", "valid string"),
    yaml("fraction for a count", GOOD + "limit: 2.5\n", "line 4", "'limit'", "found 2.5", "valid integer"),
    yaml("true for a count", GOOD + "limit: true\n", "line 4", "'limit'", "found True", "valid integer"),
    yaml("out of range", GOOD + "alpha: 1.5\n", "line 4", "'alpha'", "found 1.5", "less than or equal to 1"),
    yaml("negative", GOOD + "beta: -0.1\n", "line 4", "'beta'", "found -0.1", "greater than or equal to 0"),
    yaml("zero count", GOOD + "batch_size: 0\n", "line 4", "'batch_size'", "found 0"),
    yaml("NaN", GOOD + "temperature: .nan\n", "line 4", "'temperature'", "found nan", "finite"),
    yaml("infinity", GOOD + "beta: .inf\n", "line 4", "'beta'", "found inf", "finite"),
    yaml("negative seed", GOOD + "seed: -1\n", "line 4", "'seed'", "found -1", "greater than or equal to 0"),
    yaml("huge seed", GOOD + f"seed: {2**32}\n", "line 4", "'seed'", "less than 4294967296"),
    yaml("unknown mode", GOOD + "modes: [greedy]\n", "line 4", "'modes'", "'greedy'", "plain_greedy"),
    yaml("list for a value", GOOD + "limit: [1]\n", "line 4", "'limit'", "valid integer"),
    yaml("unknown device", GOOD + "device: tpu\n", "line 4", "'device'", "'tpu'", "'cuda'"),
    yaml("a list of keys", "- model\n- task\n", "expected `key: value` lines, found a list"),
    yaml("broken", "model: [testbed\n", "line 2", "not valid YAML"),
    yaml("tabs", "model: testbed\n\ttask: testbed\n", "line 2", "not valid YAML"),
    yaml("a date that is none", GOOD + "verifier: 2024-13-45\n", "not valid YAML", "month"),
    yaml("number for a key", GOOD + "1: 2\n", "line 4", "unknown key '1'"),
    yaml("Python object", "model: !!python/object:os.system {}\n", "line 1", "not valid YAML"),
    yaml("Latin-1", GOOD.encode() + "verifier: caf\xe9\n".encode("latin-1"), "expected UTF-8 text, found byte 0xe9"),
    yaml("control characters", GOOD + "verifier: \x00\n", "not valid YAML"),
    yaml("deep nesting", "model: " + "[" * 1500, "line 1", "not valid YAML: nested more than 50 deep"),
    yaml("a list within itself", GOOD + "modes: &a [*a]\n", "not valid YAML", "recursive"),
    yaml("a study's unknown key", "output_dir: o\nreportt: r\n", "line 2", "did you mean 'report'", command="study"),
    yaml(
        "a study's unknown name in braces",
        "output_dir: o\nreport: r\naxes: {}\nbaseline: {}\nover: null\n"
        "steps: [{name: a, command: generate, set: {output: x}, done: '{nothing}'}]\n",
        "steps: a",
        "'{nothing}'",
        "expected only study, run",
        command="study",
    ),
    # --- overrides and keys that do not fit together
    override("no equals sign", ("evaluate", "model=testbed", "limit"), "'limit' is not of the form key=value"),
    override("broken value", (*EVALUATE, "modes=[plain"), "'modes=[plain' is not valid YAML"),
    override("misspelt override", (*EVALUATE, "num_smaples=2"), "did you mean 'num_samples'"),
    override("NaN override", (*EVALUATE, "beta=.nan"), "override 'beta=.nan'", "found nan", "finite"),
    override("empty modes", (*EVALUATE, "modes=[]"), "modes", "found none"),
    override("guided without a verifier", (*EVALUATE, "modes=[guided_greedy]"), "verifier=<folder>"),
    override("more votes than samples", (*EVALUATE, "majority_at=[50]"), "majority_at: found 50", "num_samples=20"),
    override("unknown split", (*EVALUATE, "split=dev"), "no split 'dev'", "validation"),
    override("unknown task", (*EVALUATE, "task=gsm"), "key 'task'", "'gsm'", "gsm8k"),
    override("a GPU where there is none", (*EVALUATE, "device=cuda"), "device cuda needs a CUDA GPU"),
    override("a bad regular expression", (*EXPLORE, "stop_pattern=("), "stop_pattern", "no regular expression"),
    override("rollouts of a wrong order", (*EXPLORE, "min_rollouts=9"), "min_rollouts: found 9", "max_rollouts=8"),
    override("a shape that does not divide", (*PRETRAIN, "hidden_size=161"), "hidden_size", "161"),
    override("a vocabulary below the alphabet", (*PRETRAIN, "vocab_size=10"), "vocab_size", "found 10"),
    override("a server without its engine", (*EVALUATE, "server=http://h/v1"), "server", "expected engine vllm"),
    override("a server that is no URL", (*EVALUATE, "engine=vllm", "server=h:8000"), "'h:8000'", "expected a URL"),
    # --- paths
    path("no config", files(("evaluate", "no.yaml")), "cannot read the config no.yaml: No such file"),
    path("a folder for a config", _folder("c.yaml", files(("evaluate", "c.yaml"))), "c.yaml: Is a directory"),
    path("no triplets", files(TRAIN), "cannot read the triplets triplets.jsonl: No such file"),
    path("a folder for triplets", _folder("triplets.jsonl", files(TRAIN)), "triplets.jsonl: Is a directory"),
    path("no data file", files((*EVALUATE, "data_file=no.jsonl")), "no.jsonl: No such file"),
    path("a file for an output folder", files(EVALUATE, out="mine"), "out", "exists"),
    path("a file within the output's path", files((*EVALUATE, "output_dir=out/x"), out="mine"), "Not a directory"),
    path("an output that exists", files(EXPLORE, out_jsonl="mine"), "out.jsonl exists already"),
    path("a folder for an output", _folder("out.jsonl", files(EXPLORE)), "out.jsonl exists already"),
    path("no model", files((*EVALUATE, "model=./no")), "model './no'", "expected a folder with config.json"),
    path("a file for a model", files((*EVALUATE, "model=./m"), m="mine"), "model './m'", "expected a folder"),
    path("no verifier", files((*EVALUATE, "verifier=./no")), "verifier './no'", "expected a folder"),
    path("no template", files((*EVALUATE, "chat_template=no.jinja")), "chat template 'no.jinja'", "llama3-plain"),
    path("no few-shot file", files((*EVALUATE, "few_shot=no.jsonl")), "no.jsonl: No such file"),
    path(
        "nothing to reuse", files((*EVALUATE, "reuse_from=[nowhere]")), "reuse_from: nowhere holds no predictions.jsonl"
    ),
    path("no results to report", files(("report", "no")), "cannot read no/metrics.json"),
    path(
        "an unreadable config",
        _mode("c.yaml", 0, files(("evaluate", "c.yaml"), c_yaml=GOOD)),
        "c.yaml: Permission denied",
        process=True,
    ),
    path(
        "an unwritable output",
        _mode("locked", 0o555, _folder("locked", files((*EVALUATE, "output_dir=locked/out")))),
        "locked/out: Permission denied",
        process=True,
        slow=True,
    ),
    path(
        "unreadable triplets",
        _mode("triplets.jsonl", 0, files(TRAIN, triplets_jsonl="")),
        "triplets.jsonl: Permission denied",
        process=True,
        slow=True,
    ),
    path(
        "an unwritable results folder",
        _mode("out", 0o555, _folder("out", files(TRAIN, triplets_jsonl=""))),
        "out/.lock: Permission denied",
        process=True,
        slow=True,
    ),
    # --- JSON Lines
    check("broken JSON", '{"messages": [', "line 2", "not valid JSON"),
    check("a torn last line", '{"messages": [{"role": "user", "content": "Tw', "line 2", "not valid JSON"),
    check("a list for an object", "[1, 2]", "line 2", "expected an object, found a list"),
    check("NaN in JSON", '{"messages": [], "samples": [], "quality": NaN}', "line 2", "NaN is no number of JSON"),
    check("half a surrogate pair", messages(("user", "\ud800"), samples=[]), "line 2", "Unicode text"),
    check("deep JSON", "[" * 100_000, "line 2", "not valid JSON"),
    check("a huge number", '{"samples": ' + "9" * 5000 + "}", "line 2", "not valid JSON"),
    check("Latin-1", b'{"messages": "caf\xe9"}', "expected UTF-8 text, found byte 0xe9"),
    check("UTF-16", '{"messages": []}'.encode("utf-16"), "expected UTF-8 text, found byte 0xff"),
    check("no messages", '{"samples": [[1, 2, 3]]}', "line 2", "expected the key 'messages' with a list"),
    check("empty messages", '{"messages": [], "samples": [[1, 2, 3]]}', "line 2", "at least one message"),
    check("messages as a text", '{"messages": "hi", "samples": []}', "line 2", "'messages' with a list"),
    check("a message without content", '{"messages": [{"role": "user"}], "samples": []}', "line 2", "role and content"),
    check("an unknown role", messages(("alien", "hi"), samples=[]), "line 2", "role", "'alien'", "assistant"),
    check("a number for content", '{"messages": [{"role": "user", "content": 3}], "samples": []}', "line 2", "3"),
    check("a huge bad value", json.dumps({"messages": ["x" * 5_000_000], "samples": []}), "line 2", "characters)"),
    check("no samples", messages(("user", "hi")), "line 2", "expected the key 'samples' with a list"),
    check("a sample of two", messages(("user", "hi"), samples=[[1, 2]]), "line 2", "found [1, 2]"),
    check("a fraction in a sample", messages(("user", "hi"), samples=[[1.5, 2, 3]]), "line 2", "found [1.5, 2, 3]"),
    check("bad verdicts", messages(("user", "hi"), pairs=[{"triplet": 1}]), "line 2", "key 'pairs'"),
    sample("a position out of range", lambda t: [9999, *t[1:]], "position 9999", "tokens"),
    sample("a negative position", lambda t: [-3, *t[1:]], "position -3"),
    sample("position 0", lambda t: [0, *t[1:]], "position 0"),
    sample("a huge position", lambda t: [2**70, *t[1:]], f"position {2**70}"),
    sample("a wrong gold token", lambda t: [t[0], t[1] + 1, t[2]], "expected token", "found"),
    sample("equal tokens", lambda t: [t[0], t[1], t[1]], "gold and negative are the same token"),
    sample("a negative token id", lambda t: [*t[:2], -1], "negative token -1", "vocabulary of"),
    sample("an id beyond the vocabulary", lambda t: [*t[:2], 99_999], "negative token 99999", "vocabulary of"),
    train("an empty list of samples", lambda record: record.update(samples=[]), "triplets.jsonl", "found none"),
    train(
        "no quality where it is asked for",
        lambda record: record.pop("quality"),
        "triplets.jsonl, line 1",
        "quality_weight",
        arguments=("quality_weight=true",),
    ),
    train("a short max_length", dict.copy, "before max_length 3", "found none", arguments=("max_length=3",)),
    train("a huge eval_share", dict.copy, "expected more than 4 problems", arguments=("eval_share=1.0",)),
    train("an unknown logger", dict.copy, "report_to", "'nowhere'", arguments=("report_to=nowhere",)),
    train(
        "a batch that does not divide",
        dict.copy,
        "global_batch_size 3",
        "multiple of per_device_train_batch_size 2",
        arguments=("global_batch_size=3", "per_device_train_batch_size=2"),
    ),
    Case("empty triplets", "JSON Lines", files(TRAIN, triplets_jsonl=""), ("triplets.jsonl", "found none in 0 lines")),
    Case(
        "only blank lines",
        "JSON Lines",
        files(TRAIN, triplets_jsonl="\n\r\n \n"),
        ("triplets.jsonl", "found none in 0 lines"),
    ),
    chats("chats without a solution", messages(("user", "hi")), "line 1", "a prompt and a gold solution"),
    chats("chats in a wrong order", messages(("assistant", "4"), ("user", "2+2")), "line 1", "assistant and user"),
    chats("chats with an unknown role", messages(("x", "y"), ("user", "a"), ("assistant", "4")), "line 1", "'x'"),
    chats("chats with a bad answer", messages(("user", "a"), ("assistant", "4"), answer=[4]), "key 'answer'", "[4]"),
    chats(
        "equal ids",
        "\n".join(messages(("user", q), ("assistant", "4"), id="same") for q in "ab"),
        "the id 'same' stands for 2 problems",
    ),
    chats("a gold solution that is wrong", messages(("user", "a"), ("assistant", "5"), answer=4), "line-1", "rejects"),
    chats("no chats", "", "expected at least one problem, found none"),
    problems("no problems", "\n", "expected at least one problem, found none"),
    problems("a problem without an answer", '{"question": "Two?"}', "line 1", "expected the key 'answer'"),
    problems("an answer without a number", '{"question": "Two?", "answer": "two"}', "line 1", "#### number"),
    problems("a problem with a number", '{"question": 2, "answer": "#### 2"}', "line 1", "key 'question'", "found 2"),
    # --- chat templates
    template("a template that raises", "{{ raise_exception('no system prompt') }}", "no system prompt"),
    template("a broken template", "{% for m in messages %}", "chat_template", "TemplateSyntaxError"),
    template("an undefined function", "{{ nothing.at.all }}", "chat_template", "UndefinedError"),
    template("a wrong type", "{{ messages + 1 }}", "chat_template", "TypeError"),
    template(
        "a prompt that is no prefix",
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}GO{% endif %}",
        "chat template",
        arguments=EXPLORE,
    ),
    Case(
        "a template in Latin-1",
        "chat templates",
        files((*EVALUATE, "chat_template=t.jinja"), t_jinja=b"caf\xe9"),
        ("t.jinja", "expected UTF-8 text"),
    ),
    # --- a user's code
    code("a grader that raises", "def f(t, g):\n    return 1 / 0\n", "grader=mine:f", "'mine:f'", "mine.py, line 2"),
    code("a grader that hangs", "def f(t, g):\n    while True: pass\n", "grader=mine:f", "no answer in"),
    code("a grader that is none", "f = 3\n", "grader=mine:f", "grader", "'int' object is not callable"),
    code("a grader that is not there", "", "grader=mine:f", "'mine:f' cannot be imported", "no attribute 'f'"),
    code("a module that is not there", "", "grader=yours:f", "'yours:f' cannot be imported", "No module named"),
    code("a module that does not parse", "def f(:\n", "grader=mine:f", "cannot be imported", "SyntaxError"),
    code("a module that raises", "1 / 0\n", "grader=mine:f", "cannot be imported", "ZeroDivisionError"),
    code("a task that is no class", "T = 3\n", "task=mine:T", "'mine:T' is no subclass of llm2.tasks.Task"),
    code(
        "a task that raises",
        "from llm2.tasks import Task\nclass T(Task):\n    def problems(self, split, limit=None): return [][0]\n",
        "task=mine:T",
        "could not be read: IndexError",
    ),
    code(
        "a grader that raises while it evaluates",
        "def f(t, g):\n    raise KeyError('x')\n",
        "grader=mine:f",
        "'mine:f'",
        "KeyError",
        arguments=EVALUATE,
    ),
    # --- servers
    server("no JSON", "<html>", "no answer"),
    server("a list", [1], "expected a completion of vLLM's"),
    server("no choices", {"error": "x"}, "expected a completion of vLLM's"),
    server("choices of null", {"choices": None}, "expected a completion of vLLM's"),
    server("no token ids", {"choices": [{"index": 0, "text": "hi"}]}, "answers without token ids", evaluates=True),
    server("too many choices", {"choices": _choice()["choices"] * 2}, "found 2 completions", evaluates=True),
    server("a token of text", _choice() | {"choices": [{"index": 0, "token_ids": ["a"]}]}, "'a'", evaluates=True),
    server("a token beyond", {"choices": [{"index": 0, "token_ids": [10**6]}]}, "1000000", evaluates=True),
    server("a token below 0", {"choices": [{"index": 0, "token_ids": [-1]}]}, "-1", evaluates=True),
    server("no log probabilities", _choice(), "expected a completion of vLLM's"),
    server("few log probabilities", _choice(prompt_logprobs=[None, {"3": {"logprob": -1.0}}]), "of 2 tokens"),
    server("NaN", '{"choices": [{"index": 0, "token_ids": [5], "prompt_logprobs": [NaN]}]}', "completion"),
    server("models of null", None, "expected vLLM's list of models", models={"data": None}),
    server("no models", None, "serves", models={"data": []}),
    # --- results folders
    results("broken metrics", {"metrics.json": "{"}, "out/metrics.json", "not valid JSON"),
    results("metrics of another kind", {"metrics.json": "[]"}, "out/metrics.json", "expected an object"),
    results("metrics without modes", {"metrics.json": '{"benchmark": "b"}'}, "out/metrics.json", "is missing"),
    results("an accuracy of 2", {"metrics.json": METRICS.replace("1.0", "2.0")}, "accuracy", "found 2.0"),
    results(
        "predictions without a mode",
        {"metrics.json": METRICS, "predictions.jsonl": '{"id": "a"}\n'},
        "out/predictions.jsonl, line 1",
        "is missing",
    ),
    results(
        "predictions of another config",
        {"config.yaml": "task: other\n", "predictions.jsonl": "{}\n"},
        "out/predictions.jsonl is of another config",
        arguments=EVALUATE,
    ),
    results(
        "predictions without their config",
        {"predictions.jsonl": "{}\n"},
        "cannot read the config out/config.yaml",
        arguments=EVALUATE,
    ),
]
