"""Decode a task's problems in several modes, grade the solutions, compare the modes, write a results folder."""

import json
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llm2.common.chat import Message, encode_chats, resolve_template
from llm2.common.config_file import as_dict
from llm2.common.distributed import barrier, dist_info, process_device
from llm2.common.files import write_text
from llm2.common.inputs import Digests, digests
from llm2.common.keys import Mark, select_keys
from llm2.common.loading import load_system1, load_tokenizer, refuse_unknown_ids, resolve_device, with_batch_dtype
from llm2.common.progress import DecodingBar
from llm2.common.same_tokenizer import require_same_tokenizer
from llm2.common.seeds import row_seed
from llm2.config import EvaluateConfig, Mode
from llm2.decoding.decoder import Decoder
from llm2.decoding.linear import require_float16_weights
from llm2.decoding.llm2 import LLM2
from llm2.decoding.processing import load_processor, logits_fn, require_processor
from llm2.decoding.sampling import Completion, Guidance, SamplingParams
from llm2.errors import UserError
from llm2.evaluation.accept import load_accept
from llm2.evaluation.metrics import summarise
from llm2.evaluation.predictions import Predictions
from llm2.evaluation.search import search, unguided
from llm2.evaluation.tracing import TokenText, recompute_trace, trace_record
from llm2.tasks import Problem, Task, load_task, read_problems, require_distinct_ids
from llm2.tasks.few_shot import load_few_shot, with_examples
from llm2.verifier.load import load_verifier, require_same_template, require_verifier, trained_beta
from llm2.verifier.scoring import score_tokens, solution_score
from llm2.vllm.backend import require_engine

SCORING_BATCH = 16  # solutions that the verifier scores in one forward


def evaluate(config: EvaluateConfig) -> dict | None:
    """Fill `config.output_dir` with config.yaml, predictions, traces and metrics.json.

    Returns the metrics in the main process, None in the others.
    """
    check(config)
    config = with_batch_dtype(config)
    if config.beta is None and config.verifier is not None:
        config = replace(config, beta=trained_beta(config.verifier))
    inputs = digests(config)
    task = load_task(config.task, config.data_file, config.grader)
    problems = read_problems(task, config.split, config.limit)
    require_distinct_ids(task, problems)
    examples = load_few_shot(config.few_shot, config.num_fewshot)

    @cache
    def evaluator() -> Evaluator:
        first, template = with_examples(examples, task.prompt(problems[0])), resolve_template(config.chat_template)
        tokenizer = load_tokenizer(config.model)
        encode_chats(tokenizer, [first], template)  # fails before weights are loaded
        return Evaluator(config, tokenizer, task, examples)

    if not config.resume:
        evaluator()  # earlier results are deleted only after both systems are loaded
    predictions = Predictions(config, inputs)
    if any(predictions.missing(problems, mode) for mode in config.modes):
        for mode in dict.fromkeys(config.modes):
            evaluator().run(mode, problems, predictions)
    task.close()
    barrier()  # every prediction is in the journal
    metrics = None
    if dist_info().is_main:
        lines = predictions.publish(problems, config.modes)
        metrics = describe(config, inputs, len(problems)) | summarise(
            lines, [*dict.fromkeys(config.majority_at)], config.seed
        )
        write_text(Path(config.output_dir, "metrics.json"), json.dumps(metrics, indent=2) + "\n")
    barrier()  # the files are complete
    return metrics


def check(config: EvaluateConfig) -> None:
    """Raise UserError for keys that do not fit together."""
    require_engine(config)
    require_float16_weights(config.float16_weights, resolve_device(config.device), config.dtype, config.engine)
    require_processor(config, config.server is None and not any(mode.guided for mode in config.modes))
    load_accept(config.accept)
    if not config.modes:
        raise UserError(f"modes: found none, expected some of {', '.join(Mode)}")
    if config.verifier is None and config.contrast is None and any(mode.guided for mode in config.modes):
        raise UserError("the guided modes need a verifier: set verifier=<folder>, or remove them from modes")
    if config.verifier is not None and config.contrast is not None:
        raise UserError(f"contrast: found {config.contrast!r} beside a verifier, expected one of the two")
    if config.contrast is not None and config.beta is None:
        raise UserError("beta: found null, which is the beta that a verifier names, expected a number beside contrast")
    if config.contrast is not None and config.engine != "llm2":
        raise UserError(f"contrast: found {config.contrast!r} with engine {config.engine}, expected engine llm2")
    if config.engine != "llm2" and any(mode.searched for mode in config.modes):
        raise UserError(f"modes: found a search mode with engine {config.engine}, expected engine llm2")
    if max(config.majority_at, default=1) > config.num_samples:
        raise UserError(
            f"majority_at: found {max(config.majority_at)}, expected at most num_samples={config.num_samples}"
        )
    if config.verifier is not None:
        require_verifier(config.verifier)
        require_same_template(config.verifier, config.model, config.chat_template)


def describe(config: EvaluateConfig, inputs: Digests, n: int) -> dict:
    """The head of metrics.json: task, settings, digests and versions."""
    values = as_dict(config)
    return {
        "benchmark": config.task,
        "split": config.split,
        "n": n,
        "seed": config.seed,
        "settings": {key: values[key] for key in select_keys(config, Mark.SHOWN)},
        "inputs": inputs,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The code's commit, with `-dirty` if there are local changes; None outside a repository, even if
    the package is installed within one."""
    path = Path(__file__)
    git = partial(subprocess.run, capture_output=True, text=True, check=True, cwd=path.parent)
    try:
        git(["git", "ls-files", "--error-unmatch", path.name])
        return git(["git", "describe", "--always", "--abbrev=40", "--dirty", "--match="]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Decoded(NamedTuple):
    """A problem and its completions: `num_samples` if sampled, otherwise one."""

    problem: Problem
    prompt: list[int]  # token ids
    completions: list[Completion]
    search: dict = {}  # what the record of a search says beside


class Evaluator:
    """Both systems and a task: decodes, scores and grades."""

    def __init__(
        self, config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Message]
    ) -> None:
        where = process_device(resolve_device(config.device)), config.dtype
        self.llm2: LLM2 | None = None
        if config.engine == "llm2" or config.verifier is not None:  # with vLLM it only scores and traces
            system1, verifier = load_system1(config.model, *where), None
            if config.verifier is not None:
                vocabulary = system1.config.get_text_config().vocab_size
                verifier = load_verifier(config.verifier, *where, vocabulary, system1, tokenizer)
            elif config.contrast is not None:
                require_same_tokenizer(f"contrast {config.contrast!r}", config.contrast, tokenizer)
                verifier = load_system1(config.contrast, *where)
            self.llm2 = LLM2(system1, tokenizer, verifier, **config.guidance_kwargs())
        self.vllm = None
        if config.engine == "vllm":
            from llm2.evaluation.vllm_decoder import VllmDecoder

            self.vllm = VllmDecoder(config, self.llm2 and self.llm2.guidance, tokenizer)
        self.config, self.tokenizer, self.task, self.examples = config, tokenizer, task, examples
        self.token_text, self.processor = TokenText(tokenizer), load_processor(config.logits_processor, tokenizer)
        self.accepts = load_accept(config.accept)

    def run(self, mode: Mode, problems: Sequence[Problem], predictions: Predictions) -> None:
        """Decode and grade this process's share of a mode's missing problems; write each as it is finished."""
        dist = dist_info()
        share = predictions.missing(problems, mode)[dist.rank :: dist.world_size]
        correct, total = predictions.count_correct(problems, mode)
        group_size = SCORING_BATCH if self._scores(mode) else 1
        samples = self.config.num_samples if mode.sampled else 1
        options = {"desc": mode, "unit": "problem", "disable": not dist.is_main}
        with DecodingBar(len(share) * samples, self.config.max_new_tokens, samples, **options) as progress:
            for group in _group(self._decode(mode, share, progress), group_size):
                for entry in self._entries(mode, group):
                    predictions.add(entry)
                    correct += sum(sample["correct"] for sample in entry["samples"])
                    total += len(entry["samples"])
                    progress.bar.set_postfix_str(f"accuracy {correct / total:.1%}", refresh=False)

    def _scores(self, mode: Mode) -> bool:
        """Whether the verifier scores the solutions of this mode."""
        shown = self.config.traced_samples > 0 and not mode.sampled
        return self.config.verifier is not None and (self.config.score_samples or shown)

    def _decode(self, mode: Mode, problems: Sequence[Problem], progress: DecodingBar) -> Iterator[Decoded]:
        """Yield problems in the order in which they finish."""
        config, llm2 = self.config, self.llm2
        conversations = [with_examples(self.examples, self.task.prompt(problem)) for problem in problems]
        template = resolve_template(config.chat_template)
        prompts = encode_chats(self.tokenizer, conversations, template, generation_prompt=True)
        if llm2 is not None:
            refuse_unknown_ids(chain.from_iterable(prompts), llm2.system1, config.model)
        samples = config.num_samples if mode.sampled else 1
        if mode.searched:
            yield from self._search(mode, problems, prompts, progress)
            return
        seeds = [[row_seed(config.seed, problem.id, i) for i in range(samples)] for problem in problems]
        if self.vllm is not None:
            finished = self.vllm.decode(mode, prompts, seeds)
        else:
            finished = self._decoder(llm2.guidance if mode.guided else None).stream(
                prompts,
                max_new_tokens=config.max_new_tokens,
                eos=llm2.eos,
                sampling=SamplingParams(temperature=config.temperature, top_p=config.top_p) if mode.sampled else None,
                seeds=seeds,
                names=[problem.id for problem in problems],
                batch_size=config.batch_size,
                on_token=progress.on_token,
                process_logits=logits_fn(self.processor, prompts.__getitem__),
                trace=mode.guided and config.traced_samples > 0,
            )
        for index, completions in finished:
            progress.on_finished(index, [row.token_ids for row in completions])
            yield Decoded(problems[index], prompts[index], completions)

    def _decoder(self, guidance: Guidance | None) -> Decoder:
        return Decoder(self.llm2.system1, guidance, float16_weights=self.config.float16_weights)

    def _search(
        self, mode: Mode, problems: Sequence[Problem], prompts: Sequence[list[int]], progress: DecodingBar
    ) -> Iterator[Decoded]:
        config, llm2 = self.config, self.llm2

        def answer(index: int, tokens: Sequence[int]) -> str | None:
            problem, text = problems[index], self.tokenizer.decode(tokens, skip_special_tokens=True)
            return self.task.grade([text], problem.gold)[0].answer if self._accepts(problem, text) else None

        found = search(
            self._decoder(llm2.guidance if mode.guided else unguided(config.alpha, config.top_k)),
            prompts,
            answer,
            max_solutions=config.search_solutions,
            max_new_tokens=config.max_new_tokens,
            eos=llm2.eos,
            names=[problem.id for problem in problems],
            batch_size=config.batch_size,
            on_token=progress.on_token,
            processor=self.processor,
        )
        for index, (completion, num_tokens, num_solutions, vote) in found:
            progress.on_finished(index, [completion.token_ids])
            record = {"tokens": num_tokens, "solutions": num_solutions, "vote": round(vote, 4)}
            yield Decoded(problems[index], prompts[index], [completion], record)

    def _accepts(self, problem: Problem, text: str) -> bool:
        return self.accepts is None or self.accepts(problem.question, text)

    def _entries(self, mode: Mode, group: Sequence[Decoded]) -> Iterator[dict]:
        """One journal entry per problem: its line of predictions.jsonl, plus `traces`."""
        scores = iter(())  # token scores of the group's completions, one list each
        if self._scores(mode):
            prompts = [decoded.prompt for decoded in group for _ in decoded.completions]
            names = [decoded.problem.id for decoded in group for _ in decoded.completions]
            solutions = [completion.token_ids for decoded in group for completion in decoded.completions]
            scores = iter(score_tokens(self.llm2.guidance.verifier, prompts, solutions, SCORING_BATCH, names))
        for problem, prompt, completions, record in group:
            if self.vllm is not None and mode.guided:
                traced = completions[: self.config.traced_samples]
                reader = (self.llm2.system1, self.llm2.guidance, prompt)
                traced = [recompute_trace(*reader, completion, mode.sampled) for completion in traced]
                completions = [*traced, *completions[len(traced) :]]
            scored = [(completion, next(scores, None)) for completion in completions]
            yield {
                "id": problem.id,
                "question": problem.question,
                "gold": problem.gold,
                "mode": mode,
                "samples": [sample | record for sample in self._samples(problem, scored)],
                "traces": [trace_record(*sample, self.token_text) for sample in scored[: self.config.traced_samples]],
            }

    def _samples(self, problem: Problem, scored: Sequence[tuple[Completion, list[float] | None]]) -> list[dict]:
        texts = self.tokenizer.batch_decode([row.token_ids for row, _ in scored], skip_special_tokens=True)
        grades = self.task.grade(texts, problem.gold)
        return [
            {
                "text": text,
                **grade._asdict(),
                "tokens": len(completion.token_ids),
                "verifier_forwards": completion.num_verifier_calls,
                "verifier_tokens": completion.num_verifier_tokens,
                "score": None if scores is None else round(solution_score(scores, self.config.solution_score), 5),
                **({} if self.accepts is None else {"accepted": self._accepts(problem, text)}),
            }
            for text, grade, (completion, scores) in zip(texts, grades, scored, strict=True)
        ]


def _group(decoded: Iterable[Decoded], size: int) -> Iterator[list[Decoded]]:
    """Groups of problems with at least `size` completions each; the last group may have fewer."""
    group = []
    for problem in decoded:
        group.append(problem)
        if sum(len(problem.completions) for problem in group) >= size:
            yield group
            group = []
    if group:
        yield group
