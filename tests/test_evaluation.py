"""A results folder: its contents, resuming, and refusing predictions of another config."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from ranks import run_ranks

from llm2.common import loading
from llm2.common.config_file import write_config
from llm2.common.distributed import destroy_group, dist_info
from llm2.common.journal import CHECKSUM
from llm2.common.loading import load_system1, load_tokenizer
from llm2.config import EvaluateConfig, Mode, SweepConfig
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import Guidance
from llm2.errors import UserError
from llm2.evaluation.evaluate import evaluate
from llm2.evaluation.predictions import Predictions, _without_effect, read_mode
from llm2.evaluation.report.pack import pack
from llm2.evaluation.report.read import read_metrics
from llm2.evaluation.sweep import sweep
from llm2.verifier.load import load_verifier, trained_beta
from llm2.verifier.model import ProcessVerifier

SYSTEM1 = "llm2/testbed/system1"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> str:
    """System 1 with a random head."""
    folder = str(tmp_path_factory.mktemp("verifier"))
    torch.manual_seed(0)
    ProcessVerifier.from_system1(SYSTEM1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(untrained, tmp_path_factory) -> tuple[EvaluateConfig, dict]:
    """An undisturbed run and its metrics: the reference for every other way to the same result."""
    config = EvaluateConfig(
        model=SYSTEM1,
        verifier=untrained,
        output_dir=str(tmp_path_factory.mktemp("done") / "results"),
        task="testbed",
        modes=tuple(Mode),
        limit=5,
        beta=4.0,
        num_samples=4,
        majority_at=(1, 4),
        max_new_tokens=160,
        search_solutions=2,
        batch_size=8,
        device="cpu",
    )
    return config, evaluate(config)


@pytest.fixture
def config(done, tmp_path) -> EvaluateConfig:
    return replace(done[0], output_dir=str(tmp_path / "results"))


def results(config: EvaluateConfig) -> list:
    """The lines of predictions.jsonl and traces.jsonl."""
    files = [Path(config.output_dir, name).read_text() for name in ("predictions.jsonl", "traces.jsonl")]
    return [[json.loads(line) for line in text.splitlines()] for text in files]


def alike(a, b) -> bool:
    """Equal except for the last digits of scores, which depend on the batch, and for the code's commit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a if key != "git_commit")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == pytest.approx(b, abs=0.02) if isinstance(a, float) and isinstance(b, float) else a == b


def test_a_results_folder_holds_config_metrics_and_predictions(done):
    config, metrics = done
    folder = Path(config.output_dir)
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert (folder / "config.yaml").is_file()
    assert set(metrics["modes"]) == set(Mode) and metrics["n"] == 5 and metrics["split"] == "test"
    assert {(p["metric"], p["a"]) for p in metrics["paired"]} == {
        ("accuracy", "plain_greedy"),
        ("accuracy", "plain_search"),
        ("majority@1", "plain_sampling"),
        ("majority@4", "plain_sampling"),
        ("best of 4", "plain_sampling"),
        ("weighted@4", "plain_sampling"),
    }
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 30 == len({(line["id"], line["mode"]) for line in lines})
    for line in lines:
        assert len(line["samples"]) == (4 if Mode(line["mode"]).sampled else 1)
    right = [line["samples"][0]["correct"] for line in lines if line["mode"] == "plain_greedy"]
    assert metrics["modes"]["plain_greedy"]["accuracy"] == sum(right) / 5
    assert metrics["modes"]["plain_greedy"]["verifier_forwards_per_token"] == 0
    assert metrics["modes"]["guided_greedy"]["verifier_forwards_per_token"] > 0


def test_traces_hold_every_choice_and_scoring_a_solution_agrees_with_decoding_it(config):
    evaluate(replace(config, modes=("plain_greedy", "guided_sampling"), limit=3, traced_samples=2))
    texts = {
        (line["id"], line["mode"]): [sample["text"] for sample in line["samples"]]
        for line in map(json.loads, Path(config.output_dir, "predictions.jsonl").read_text().splitlines())
    }
    lines = [json.loads(line) for line in Path(config.output_dir, "traces.jsonl").read_text().splitlines()]
    choices = []
    for line in lines:
        assert len(line["traces"]) == (1 if line["mode"] == "plain_greedy" else 2)
        for trace, text in zip(line["traces"], texts[line["id"], line["mode"]], strict=False):
            assert "".join(trace["tokens"]).removesuffix("<|eot_id|>") == text
            assert len(trace["scores"]) == len(trace["tokens"])
            for choice in trace["choices"]:
                assert choice["candidates"][choice["chosen"]] == trace["tokens"][choice["at"]]
                assert choice["scores"][choice["chosen"]] == pytest.approx(trace["scores"][choice["at"]], abs=0.01)
            choices += trace["choices"]
    assert any(choice["changed"] for choice in choices) and not all(choice["changed"] for choice in choices)


def test_predictions_are_what_the_decoder_writes(config):
    evaluate(replace(config, modes=("guided_greedy",), limit=2))
    lines = [json.loads(line) for line in Path(config.output_dir, "predictions.jsonl").read_text().splitlines()]
    cpu = torch.device("cpu")
    model, tokenizer = load_system1(SYSTEM1, cpu), load_tokenizer(SYSTEM1)
    guidance = Guidance(verifier=load_verifier(config.verifier, cpu, "auto", len(tokenizer)), alpha=0.1, beta=4.0)
    for line in lines:
        messages = [{"role": "user", "content": line["question"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        decoded = Decoder(model, guidance).decode([prompt], max_new_tokens=160, eos=[tokenizer.eos_token_id])
        assert line["samples"][0]["text"] == tokenizer.decode(decoded[0][0].token_ids, skip_special_tokens=True)


@pytest.mark.long
def test_a_finished_run_is_extended_with_the_same_result(config, done):
    part = replace(config, batch_size=6)
    evaluate(replace(part, limit=3))
    assert alike(evaluate(part), done[1])
    assert alike(results(part), results(done[0]))


def test_predictions_of_another_config_are_never_mixed_in(config):
    small = replace(config, modes=("plain_greedy",), limit=2)
    evaluate(small)
    with pytest.raises(UserError, match=r"another config: beta was 4.0 and now is 1.0"):
        evaluate(replace(small, beta=1.0))
    before = Path(config.output_dir, "predictions.jsonl").read_bytes()
    assert before.count(b"\n") == 2, "earlier predictions are left as they were"
    evaluate(replace(small, beta=1.0, resume=False))


def test_results_of_a_cpu_that_computes_in_bfloat16_say_so_and_are_never_mixed(config, monkeypatch):
    small = replace(config, modes=("plain_greedy",), limit=2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        patch.setattr(loading, "LARGE", 0)
        evaluate(small)
    assert yaml.safe_load(Path(config.output_dir, "config.yaml").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="another config: dtype was 'bfloat16' and now is 'auto'"):
        evaluate(replace(small, limit=3))


@pytest.mark.long
def test_a_killed_run_loses_only_what_was_in_flight(config, done, monkeypatch):
    made = []

    def killed(self, entry):
        if len(made) == 7:
            raise KeyboardInterrupt
        counted(self, entry)

    def counted(self, entry):
        made.append((entry["id"], entry["mode"]))
        add(self, entry)

    add = Predictions.add
    monkeypatch.setattr(Predictions, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert [path.name for path in Path(config.output_dir).iterdir()] == ["journal"], "files appear whole or not at all"
    path = Path(config.output_dir, "journal", "shard-0.jsonl")

    def entry(line: bytes) -> dict:
        return json.loads(line[CHECKSUM:])

    assert [(line["id"], line["mode"]) for line in map(entry, path.read_bytes().splitlines()[1:])] == made
    made.pop()
    path.write_bytes(path.read_bytes()[:-30])  # a torn last line
    monkeypatch.setattr(Predictions, "add", counted)
    assert alike(evaluate(config), done[1])
    assert len(made) == 30 == len(set(made)), "no problem was evaluated twice"
    assert alike(results(config), results(done[0]))


@pytest.fixture
def small(config) -> EvaluateConfig:
    return replace(config, limit=3, modes=("guided_greedy", "plain_sampling"), num_samples=2, majority_at=(2,))


def evaluate_as_rank(config: EvaluateConfig) -> None:
    assert (evaluate(config) is None) == (not dist_info().is_main)
    destroy_group()


@pytest.mark.long
def test_two_processes_share_the_problems_and_give_the_result_of_one(small, tmp_path):
    metrics = evaluate(small)
    shared = replace(small, output_dir=str(tmp_path / "shared"))
    assert run_ranks(evaluate_as_rank, shared) == [0, 0]
    assert alike(results(shared), results(small))
    assert alike(json.loads(Path(shared.output_dir, "metrics.json").read_text()), metrics)


@pytest.mark.slow  # the same through the launcher
def test_the_launched_command_gives_the_result_of_one_process(small, tmp_path):
    metrics = evaluate(small)
    shared = replace(small, output_dir=str(tmp_path / "shared"))
    write_config(shared, tmp_path / "shared.yaml")
    command = [sys.executable, "-m", "llm2", "evaluate", tmp_path / "shared.yaml", "--processes", "2"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-6000:]
    assert alike(results(shared), results(small))
    assert alike(json.loads(Path(shared.output_dir, "metrics.json").read_text()), metrics)


def test_each_process_uses_its_own_gpu(small, monkeypatch):
    class Loaded(Exception):
        pass

    def load_system1(name, device, dtype):
        raise Loaded(device)

    monkeypatch.setattr("llm2.evaluation.evaluate.resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("llm2.evaluation.evaluate.load_system1", load_system1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(Loaded, match="cuda:3"):
        evaluate(small)


def test_the_tokenizer_is_loaded_once(small, monkeypatch):
    loaded = []
    for module in ("llm2.evaluation.evaluate", "llm2.decoding.llm2"):
        monkeypatch.setattr(f"{module}.load_tokenizer", lambda name: loaded.append(name) or load_tokenizer(name))
    evaluate(small)
    assert loaded == [small.model]


@pytest.mark.long
def test_predictions_of_other_runs_are_reused_if_their_settings_agree(config, done, tmp_path):
    plain = replace(config, modes=("plain_greedy", "plain_sampling"), beta=1.0, output_dir=str(tmp_path / "plain"))
    evaluate(plain)
    guided = replace(
        config, modes=("guided_greedy",), output_dir=str(tmp_path / "guided"), num_samples=2, majority_at=(1,)
    )
    evaluate(guided)
    merged = replace(config, reuse_from=(plain.output_dir, guided.output_dir))
    assert alike(evaluate(merged), done[1])
    assert alike(results(merged), results(done[0]))
    with pytest.raises(UserError, match="another config: beta was 4.0 and now is 2.0; it cannot be reused"):
        evaluate(replace(merged, beta=2.0, output_dir=str(tmp_path / "other")))


def test_plain_predictions_are_reused_beside_guided_ones_that_are_not(config, tmp_path, monkeypatch):
    first = replace(config, modes=("plain_greedy", "guided_greedy"), limit=2)
    evaluate(first)
    decoded = []
    other = replace(first, beta=1.0, reuse_from=(first.output_dir,), output_dir=str(tmp_path / "other"))
    missing = Predictions.missing
    monkeypatch.setattr(
        Predictions, "missing", lambda *given: decoded.append((given[2], len(found := missing(*given)))) or found
    )
    evaluate(other)
    assert {("plain_greedy", 0), ("guided_greedy", 2)} <= set(decoded)


def test_metrics_report_and_readers_have_the_problems_of_the_last_run(config):
    evaluate(replace(config, modes=("plain_greedy",), limit=3))
    small = replace(config, modes=("plain_greedy", "plain_greedy"), limit=2)
    assert evaluate(small)["n"] == 2 == len(read_mode(Path(config.output_dir), Mode.PLAIN_GREEDY))
    assert len(results(config)[0]) == 3
    metrics = read_metrics(Path(config.output_dir, "metrics.json"))
    packed, _ = pack(Path(config.output_dir), metrics, 10**6)
    assert len(json.loads(packed)["problems"]) == 2


def test_reused_predictions_lose_scores_that_were_summarised_in_another_way(config, tmp_path):
    plain = replace(config, modes=("plain_greedy",), limit=2)
    evaluate(plain)
    other = replace(plain, solution_score="min", reuse_from=(plain.output_dir,), output_dir=str(tmp_path / "other"))
    evaluate(other)
    for run, is_scored in ((plain, True), (other, False)):
        predictions, _ = results(run)
        assert [line["samples"][0]["score"] is not None for line in predictions] == [is_scored] * 2


def test_modes_evaluated_one_by_one_are_reported_together(config):
    evaluate(replace(config, modes=("plain_greedy",), limit=2))
    assert set(evaluate(replace(config, modes=("guided_greedy",), limit=2))["modes"]) == {
        "plain_greedy",
        "guided_greedy",
    }


@pytest.mark.long
def test_a_search_of_one_solution_is_greedy_and_further_solutions_are_counted(config, tmp_path):
    modes = ("guided_greedy", "plain_search", "guided_search")
    one = evaluate(replace(config, modes=modes, search_solutions=1, limit=3))["modes"]
    assert one["guided_search"]["tokens_per_problem"] == one["guided_greedy"]["tokens_per_problem"]
    greedy, _, searched = ([line for line in results(config)[0] if line["mode"] == mode] for mode in modes)
    assert [line["samples"][0]["text"] for line in greedy] == [line["samples"][0]["text"] for line in searched]

    further = replace(config, modes=modes, search_solutions=4, limit=3, output_dir=str(tmp_path / "four"))
    four = evaluate(replace(further, reuse_from=()))
    assert {pair["a"] for pair in four["paired"]} == {"plain_search"}
    assert four["modes"]["plain_search"]["tokens_per_problem"] > one["plain_search"]["tokens_per_problem"]
    (records,) = results(further)[:1]
    assert all(1 <= line["samples"][0]["solutions"] <= 4 for line in records if "search" in line["mode"])
    reused = replace(further, modes=("plain_search",), reuse_from=(further.output_dir,))
    for key, value in {"search_solutions": 5, "alpha": 0.3, "top_k": 2}.items():
        with pytest.raises(UserError, match=f"another config: .*{key} was"):
            evaluate(replace(reused, output_dir=str(tmp_path / key), **{key: value}))
    assert {"beta", "verifier"} <= set(_without_effect(config, Mode.PLAIN_SEARCH))


def test_samples_without_scores_are_not_reused_where_they_are_to_be_scored(config, tmp_path):
    plain = replace(config, modes=("plain_sampling",), limit=2, score_samples=False)
    evaluate(plain)
    other = replace(plain, reuse_from=(plain.output_dir,), output_dir=str(tmp_path / "other"))
    evaluate(other)
    with pytest.raises(UserError, match="score_samples: the samples in .* have no scores of this verifier"):
        evaluate(replace(other, score_samples=True, output_dir=str(tmp_path / "third")))
    evaluate(replace(other, output_dir=str(tmp_path / "third")))  # the refused run has left nothing behind


def test_greedy_solutions_are_scored_for_the_report_alone_where_samples_are_not(config, tmp_path):
    for traced in (1, 0):
        output = str(tmp_path / str(traced))
        run = replace(config, limit=1, score_samples=False, traced_samples=traced, output_dir=output)
        evaluate(run)
        scores = {
            mode: [sample["score"] for line in read_mode(Path(output), mode) for sample in line["samples"]]
            for mode in run.modes
        }
        expected = {mode: traced > 0 and not mode.sampled for mode in run.modes}
        assert {mode: None not in found for mode, found in scores.items()} == expected


def test_contrast_needs_a_number_for_beta(config):
    with pytest.raises(UserError, match="beta: found null, .* expected a number beside contrast"):
        evaluate(replace(config, verifier=None, contrast=config.model, beta=None))


def test_cost_is_counted_in_forwards_per_problem(config):
    metrics = evaluate(replace(config, modes=("guided_sampling",), limit=2))["modes"]["guided_sampling"]
    lines = [json.loads(line) for line in Path(config.output_dir, "predictions.jsonl").read_text().splitlines()]
    tokens = sum(sample["tokens"] for line in lines for sample in line["samples"]) / 2
    verified = sum(sample["verifier_forwards"] for line in lines for sample in line["samples"]) / 2
    assert metrics["tokens_per_problem"] == tokens
    assert (
        metrics["system1_forwards_per_problem"] == 1 + tokens - 4
    )  # the first token of each sample follows the prompt
    assert metrics["system2_forwards_per_problem"] == 1 + verified
    assert metrics["scoring_forwards_per_problem"] == 4


def test_a_verifier_that_was_trained_with_another_chat_template_is_refused(config, untrained, tmp_path):
    verifier = tmp_path / "verifier"
    shutil.copytree(untrained, verifier)
    (verifier / "train.yaml").write_text("chat_template: chatml-plain\n")
    with pytest.raises(UserError, match="chat_template: found None, expected 'chatml-plain': the verifier"):
        evaluate(replace(config, verifier=str(verifier), output_dir=str(tmp_path / "results")))
    assert not (tmp_path / "results").exists()


def test_few_shot_examples_change_the_prompt(config, tmp_path):
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"question": "Two and two?", "answer": "2 + 2 = 4\n#### 4"}) + "\n")
    greedy = replace(config, modes=("plain_greedy",), limit=2)
    evaluate(greedy)
    evaluate(replace(greedy, few_shot=str(examples), output_dir=str(tmp_path / "shots")))
    texts = [Path(folder, "predictions.jsonl").read_text() for folder in (greedy.output_dir, tmp_path / "shots")]
    assert texts[0] != texts[1]


def test_a_sweep_chooses_on_validation_and_reports_on_test(untrained, tmp_path):
    config = SweepConfig(
        model=SYSTEM1,
        verifier=untrained,
        output_dir=str(tmp_path / "sweep"),
        task="testbed",
        modes=("plain_greedy", "guided_greedy"),
        limit=3,
        betas=(0.0, 8.0),
        alphas=(0.1,),
        validation_limit=6,
        max_new_tokens=120,
        device="cpu",
    )
    metrics = sweep(config)
    points = {point["beta"]: point["accuracy"] for point in metrics["sweep"]["points"]}
    best = max(points, key=points.get)
    assert set(points) == {0.0, 8.0} and metrics["sweep"]["chosen"]["beta"] == best == metrics["settings"]["beta"]
    assert (metrics["sweep"]["split"], metrics["sweep"]["n"]) == ("validation", 6)
    assert (metrics["split"], metrics["n"]) == ("test", 3)
    with pytest.raises(UserError, match="chosen on other problems than they are reported on"):
        sweep(replace(config, validation_split="test"))
    trained = replace(config, verifier="testbed-verifier", betas=(), beta=None, output_dir=str(tmp_path / "trained"))
    assert sweep(trained)["sweep"]["chosen"]["beta"] == trained_beta("testbed-verifier")


GRADER = """
def is_correct(text: str, gold: str) -> bool:
    return len(text) % int(gold) == 0
"""


@pytest.fixture
def chats(system1_folder, tmp_path, monkeypatch) -> EvaluateConfig:
    """Chats and a grader from files, and a tiny model that writes noise."""
    (tmp_path / "some_grader.py").write_text(GRADER)
    monkeypatch.syspath_prepend(tmp_path)
    for split, questions in (("test", "abcd"), ("validation", "efg")):
        turns = [[("system", "Count."), ("user", question), ("assistant", "12")] for question in questions]
        chats = [[{"role": role, "content": content} for role, content in chat] for chat in turns]
        lines = [{"id": f"{split}-{i}", "answer": 2, "messages": messages} for i, messages in enumerate(chats)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ProcessVerifier.from_system1(system1_folder).save_pretrained(tmp_path / "verifier")
    return EvaluateConfig(
        model=system1_folder,
        verifier=str(tmp_path / "verifier"),
        output_dir=str(tmp_path / "results"),
        task="chats",
        data_file=str(tmp_path / "test.jsonl"),
        grader="some_grader:is_correct",
        modes=("plain_greedy", "guided_sampling"),
        num_samples=3,
        majority_at=(3,),
        max_new_tokens=8,
        device="cpu",
    )


def assert_graded_by_the_grader(config: EvaluateConfig) -> None:
    predictions, _ = results(config)
    assert {line["id"] for line in predictions} == {f"test-{i}" for i in range(4)}
    for line in predictions:
        for sample in line["samples"]:
            assert sample["correct"] == (len(sample["text"]) % 2 == 0)
            assert (sample["answer"] == line["gold"] == "2") == sample["correct"]


def test_chats_are_evaluated_with_the_given_grader(chats):
    metrics = evaluate(chats)
    assert (metrics["benchmark"], metrics["n"]) == ("chats", 4)
    assert_graded_by_the_grader(chats)


def test_problems_of_equal_ids_are_refused(chats):
    Path(chats.data_file).write_text(2 * (Path(chats.data_file).read_text() + "\n"))
    with pytest.raises(UserError, match="test.jsonl: the id .test-0. stands for 2 problems"):
        evaluate(chats)


def test_chats_are_swept_with_the_given_grader(chats, tmp_path):
    validation = str(tmp_path / "validation.jsonl")
    config = SweepConfig(**vars(chats), betas=(0.0, 2.0), choose_by="guided_sampling", validation_file=validation)
    metrics = sweep(config)
    assert {point["metric"] for point in metrics["sweep"]["points"]} == {"majority@3"}
    assert (metrics["n"], metrics["sweep"]["n"], metrics["sweep"]["file"]) == (4, 3, validation)
    assert_graded_by_the_grader(chats)
    with pytest.raises(UserError, match="chosen on other problems than they are reported on"):
        sweep(replace(config, validation_file=chats.data_file))


def test_keys_that_contradict_each_other_are_refused(config):
    with pytest.raises(UserError, match="found a search mode with engine vllm, expected engine llm2"):
        evaluate(replace(config, engine="vllm", top_k=10, modes=("plain_search",)))
    with pytest.raises(UserError, match="guided modes need a verifier"):
        evaluate(replace(config, verifier=None))
    with pytest.raises(UserError, match="majority_at: found 9, expected at most num_samples=4"):
        evaluate(replace(config, majority_at=(9,)))
