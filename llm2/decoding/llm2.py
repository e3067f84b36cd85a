"""LLM2: both systems behind the interface of transformers' `generate`.

`generate` prepares everything (generation config, processors, stopping criteria, special tokens) and then calls
`GuidedGenerate`, which decodes with `Decoder` and returns what `generate` returns.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    StopStringCriteria,
)

from llm2.common.chat import Message, encode_chats, resolve_template
from llm2.common.loading import HUB, eos_ids, load_system1, load_tokenizer, resolve_device
from llm2.common.seeds import row_seed
from llm2.decoding.candidates import guided_logits
from llm2.decoding.decoder import Decoder
from llm2.decoding.generate_options import refuse_arguments, refuse_ignored
from llm2.decoding.linear import require_float16_weights
from llm2.decoding.sampling import Guidance, LogitsFn, SamplingParams, StopFn, TokenTrace
from llm2.decoding.system2 import System2
from llm2.errors import UserError, quote
from llm2.verifier.load import load_verifier, require_same_template, require_verifier, trained_template
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.scoring import Reduction, encode_solutions, score_solutions, solution_score

# Values of transformers' device_map that spread a model over several GPUs.
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
# Of transformers' processors those that count every token of a text.
PENALTIES = (RepetitionPenaltyLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor)
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
WARPERS += (TopHLogitsWarper, TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper)


@dataclass
class GuidedOutput(GenerateDecoderOnlyOutput):
    """transformers' output and, with trace=True, `trace`: for each sequence a `TokenTrace` per new token."""

    trace: list[list[TokenTrace]] | None = None


@dataclass(frozen=True, kw_only=True)
class _Sampling(SamplingParams):
    """Sampling with the warpers that `generate` has built, and those that its caller has passed."""

    given: LogitsProcessorList

    def warpers(self) -> LogitsProcessorList:
        return self.given


class GuidedGenerate:
    """A callable for `model.generate(..., custom_generate=GuidedGenerate(guidance))`, for any System 1.

    Takes three arguments more than `generate`: `seed` (with do_sample, sequence i depends on `seed`, i and its prompt
    alone, in float32), `trace`, and `stream_to`, a streamer. What `generate` applies when sampling (temperature, top_k,
    top_p, ...) acts on the guided logits, all other processors on System 1's, before the plausible set is taken. Raises
    ValueError for an option that would change a text and does not act here, such as num_beams. `generate` passes
    neither `streamer` nor the tokenizer of `stop_strings` to a callable: use `stream_to` and a StopStringCriteria, or
    `LLM2.generate`, which does so for you. Stopping criteria get no scores.

    Args:
        guidance: None for System 1 alone.
        float16_weights: as for `Decoder`.
    """

    def __init__(self, guidance: Guidance | None = None, float16_weights: bool = False) -> None:
        self.guidance, self.float16_weights = guidance, float16_weights
        self.decoder: Decoder | None = None
        self.system1: PreTrainedModel | None = None  # the model of self.decoder

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which make a decoder of their own."""
        return {**vars(self), "decoder": None, "system1": None}

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        stream_to: BaseStreamer | None = None,
        seed: int = 0,
        trace: bool = False,
        **model_inputs,
    ) -> torch.Tensor | GuidedOutput:
        """(B, T) ids -> (B, T + new) ids, right-padded; a GuidedOutput if the config asks for a dictionary."""
        config = generation_config
        refuse_ignored(config, model_inputs)
        if stream_to is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer shows one sequence, found a batch of {len(input_ids)}")
        if self.system1 is not model or self.decoder.state.moved:
            self.system1 = model
            self.decoder = Decoder(model, self.guidance, float16_weights=self.float16_weights)
        mask = model_inputs.get("attention_mask")  # None where nothing is padded
        mask = torch.ones_like(input_ids) if mask is None else mask
        pad = 0 if config.pad_token_id is None else config.pad_token_id
        eos = [] if config.eos_token_id is None else config.eos_token_id
        sampling, processors = None, logits_processor
        if config.do_sample:
            sampling = _Sampling(given=LogitsProcessorList(p for p in logits_processor if isinstance(p, WARPERS)))
            processors = LogitsProcessorList(p for p in logits_processor if not isinstance(p, WARPERS))
        output_scores = config.return_dict_in_generate and config.output_scores
        output_logits = config.return_dict_in_generate and config.output_logits
        keep_logits = bool(output_scores or output_logits)
        completions = self.decoder.decode(
            [ids[keep.bool()].tolist() for ids, keep in zip(input_ids, mask, strict=True)],
            max_new_tokens=config.max_length - input_ids.shape[1],
            eos=eos if isinstance(eos, list) else [eos],
            sampling=sampling,
            seeds=[[row_seed(seed, index)] for index in range(len(input_ids))],
            batch_size=len(input_ids),
            stop=_stop_fn(stopping_criteria, input_ids),
            process_logits=_logits_fn(processors, input_ids, mask.bool(), config.pad_token_id),
            on_token=stream_to and (lambda prompt, sample, token: stream_to.put(torch.tensor([token]))),
            trace=trace or keep_logits,
            keep_logits=keep_logits,
        )
        if stream_to is not None:
            stream_to.end()
        new = [torch.tensor(completion.token_ids, device=input_ids.device) for (completion,) in completions]
        sequences = torch.cat([input_ids, pad_sequence(new, batch_first=True, padding_value=pad)], dim=-1)
        if not (config.return_dict_in_generate or trace):
            return sequences
        traces = [completion.trace for (completion,) in completions]
        logits = [[token.logits.raw for token in tokens] for tokens in traces] if output_logits else []
        return GuidedOutput(
            sequences=sequences,
            scores=self._scores(traces, sampling, pad) if output_scores else None,
            logits=_by_step(logits, 0.0, pad) if output_logits else None,
            trace=traces if trace else None,
        )

    def _scores(self, traces: Sequence[Sequence[TokenTrace]], sampling: SamplingParams | None, pad: int) -> tuple:
        """The logits that each token was chosen from, a (B, V) per step: -inf for what was not a candidate."""

        def final(token: TokenTrace) -> torch.Tensor:
            logits = token.logits.processed
            if self.guidance is not None:
                candidates = torch.tensor(token.candidates, device=logits.device)
                scores = None if token.scores is None else torch.tensor(token.scores).to(logits)
                valid = torch.ones_like(candidates, dtype=torch.bool)
                guided = guided_logits(logits[candidates], valid, scores, self.guidance.beta)
                logits = torch.full_like(logits, -torch.inf).scatter(0, candidates, guided)
            return logits if sampling is None else sampling.warpers()(None, logits[None])[0]

        return _by_step([[final(token) for token in tokens] for tokens in traces], -torch.inf, pad)


class LLM2:
    """A language model that proposes and a verifier that chooses.

    llm2 = LLM2.from_pretrained("meta-llama/Llama-3.2-1B-Instruct", "results/llama-3.2-1b-instruct/verifier")
    inputs = llm2.tokenizer(["..."], return_tensors="pt", padding=True, padding_side="left")
    sequences = llm2.generate(**inputs, max_new_tokens=512)

    Args:
        verifier: a ProcessVerifier, or what else `Guidance` takes; System 1 decodes alone when None.
        float16_weights: as for `Decoder`.
        guidance: the other fields of `Guidance`, such as alpha, beta and top_k.
    """

    def __init__(
        self,
        system1: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        verifier: ProcessVerifier | PreTrainedModel | System2 | None = None,
        *,
        float16_weights: bool = False,
        **guidance: Any,
    ) -> None:
        require_float16_weights(float16_weights, system1.device, system1.dtype)
        self.system1, self.tokenizer, self.float16_weights = system1, tokenizer, float16_weights
        self.eos = eos_ids(system1, tokenizer)
        checked = Guidance(verifier=verifier, **guidance)  # refuses unknown keywords even without a verifier
        self.guidance = None if verifier is None else checked
        self.guided_generate = GuidedGenerate(self.guidance, float16_weights)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        verifier: str | Path | None = None,
        *,
        chat_template: str | None = None,
        float16_weights: bool = False,
        **options: Any,
    ) -> "LLM2":
        """Load both systems from folders or hub ids.

        Args:
            chat_template: name or file (llm2/common/chat.py) of the tokenizer's; None for the one that the verifier was
                trained with, or without a verifier for the model's own.
            options: as for the class, and of transformers' `from_pretrained`: `dtype`, `device_map` of one device, here
                also `device`, and what says where files are (`HUB`). Of these, `revision` and `subfolder` are of System
                1's files alone.

        Raises TypeError for any other, before anything is loaded, and UserError for values that cannot be had.
        """
        model, verifier = str(model), None if verifier is None else str(verifier)
        hub = {key: options.pop(key) for key in HUB if key in options}
        device, dtype = _device(options), options.pop("dtype", "auto")
        dtype = options.pop("torch_dtype", None) or dtype  # the older name, which transformers takes too
        if options.pop("trust_remote_code", None):
            raise UserError("trust_remote_code: found true, expected false: code of a model is never run")
        if unknown := options.keys() - {field.name for field in fields(Guidance)}:
            raise TypeError(
                f"LLM2.from_pretrained takes no {sorted(unknown)[0]!r}; if transformers' from_pretrained does, load "
                "System 1 by that and pass it on: LLM2(system1, tokenizer, verifier)"
            )
        Guidance(verifier=None, **options)  # refuses what is out of range before anything is loaded
        require_float16_weights(float16_weights, device, dtype)
        tokenizer = _tokenizer(load_tokenizer(model, **hub), model, verifier, chat_template)
        system1 = load_system1(model, device, dtype, **hub)
        if verifier is not None:
            hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
            vocabulary = system1.config.get_text_config().vocab_size
            verifier = load_verifier(verifier, device, dtype, vocabulary, system1, tokenizer, **hub)
        return cls(system1, tokenizer, verifier, float16_weights=float16_weights, **options)

    def generate(self, inputs: torch.Tensor | None = None, **options) -> torch.Tensor | GuidedOutput:
        """transformers' `generate` of System 1, guided: its arguments and results, and those of `GuidedGenerate`.

        Without a `generation_config`, a sequence also ends at the tokenizer's end-of-sequence token. Raises
        ValueError for cache_implementation="paged" and for stop strings in the model's own generation config.
        """
        if options.get("cache_implementation") == "paged":  # `generate` would leave for generate_batch, unguided
            raise ValueError("cache_implementation: found 'paged', which cannot be guided; leave it out")
        refuse_arguments(self.system1.generate, options)
        if (strings := self.system1.generation_config.stop_strings) is not None:  # it would put them into any config
            raise ValueError(
                f"stop_strings: found {strings} in the model's own generation_config, expected None there; pass them "
                "as an argument"
            )
        config = options.get("generation_config")
        if config is None:
            options = {"eos_token_id": self.eos, "pad_token_id": self.tokenizer.pad_token_id, **options}
        elif config.stop_strings is not None:  # `generate` gives their tokenizer to no callable
            options = {"stop_strings": config.stop_strings, **options}
            options["generation_config"] = _changed(config, stop_strings=None)
        if strings := options.pop("stop_strings", None):
            tokenizer = options.pop("tokenizer", self.tokenizer)
            criteria = [*options.pop("stopping_criteria", []), StopStringCriteria(tokenizer, strings)]
            options["stopping_criteria"] = StoppingCriteriaList(criteria)
        if options.get("streamer") is not None:  # `generate` itself streams the prompt
            options["stream_to"] = options["streamer"]
        return self.system1.generate(inputs, custom_generate=self.guided_generate, **options)

    def chat(self, messages: str | Sequence[Message], **options) -> str:
        """The answer to a question, or the next message of a conversation of `role` and `content`.

        Args:
            options: of `generate`, such as do_sample, seed and streamer. Where neither they nor their generation_config
                limit the length, an answer has at most 512 tokens.

        Raises ValueError for options that ask for more than one text: num_return_sequences, trace.
        """
        for key, only in (("num_return_sequences", 1), ("trace", False)):
            found = options.get(key, getattr(options.get("generation_config"), key, None))
            if found not in (None, only):
                raise ValueError(f"{key}: found {found}, expected {only}, since chat gives one text; use generate")
        ids = encode_chats(self.tokenizer, [_conversation(messages)], generation_prompt=True)
        ids = torch.tensor(ids, device=self.system1.device)
        config = options.get("generation_config")
        limits = (options.get(key, getattr(config, key, None)) for key in ("max_new_tokens", "max_length"))
        if all(limit is None for limit in limits):
            longest = {"max_new_tokens": 512}
            options |= longest if config is None else {"generation_config": _changed(config, **longest)}
        output = self.generate(ids, **options)
        return self.tokenizer.decode(getattr(output, "sequences", output)[0, ids.shape[1] :], skip_special_tokens=True)

    def score(
        self,
        messages: str | Sequence[Message],
        solutions: Sequence[str | Sequence[str]],
        reduction: Reduction | None = "mean",
    ) -> list[float] | list[list[float]]:
        """The verifier's score of each finished solution to a question, for best of n and weighted votes.

        Training on triplets compares tokens after equal prefixes alone; between whole solutions the score is a
        heuristic. Training on labelled steps scores steps.

        Args:
            messages: as for `chat`.
            solutions: texts, or lists of steps, each of which has the score of its last token.
            reduction: mean, min or last of the scores of a solution's tokens, end of sequence included, or of its
                steps; product, the sum of their log sigmoids; None for the scores themselves.

        Raises ValueError without a ProcessVerifier, for one text in place of a list, and for another reduction.
        """
        if isinstance(solutions, str):
            raise ValueError("solutions: found one text, expected a list of texts")
        if reduction not in (None, *get_args(Reduction)):
            raise ValueError(f"reduction: found {reduction!r}, expected {', '.join(get_args(Reduction))} or None")
        if self.guidance is None or not isinstance(self.guidance.verifier, ProcessVerifier):
            raise ValueError("a score needs a verifier: expected LLM2.from_pretrained(model, verifier)")
        encoded = encode_solutions(self.tokenizer, _conversation(messages), solutions, self.eos)
        rows = score_solutions(self.guidance.verifier, encoded)
        return rows if reduction is None else [solution_score(row, reduction) for row in rows]


def _changed(config: GenerationConfig, **fields: Any) -> GenerationConfig:
    config = copy.copy(config)
    config.update(**fields)
    return config


def _conversation(messages: str | Sequence[Message]) -> Sequence[Message]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def _device(options: dict[str, Any]) -> torch.device:
    """The one that `device` or `device_map` names; both are taken out of the options."""
    device, places = options.pop("device", None), options.pop("device_map", None)
    if isinstance(places, Mapping) and len({*places.values()}) == 1:
        (places,) = {*places.values()}
    several = isinstance(places, Mapping) or (places in SPREAD and torch.cuda.device_count() > 1)
    if several or (device is not None and places is not None):
        raise UserError(
            f"device_map: found {quote(places)}{f' and device {device}' if device else ''}, expected one device, which "
            "holds both systems"
        )
    place = device if places is None else places
    return resolve_device("auto" if place is None or place in SPREAD else place)


def _tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: str, verifier: str | None, chat_template: str | None
) -> PreTrainedTokenizerBase:
    """With the chat template of the texts to come. Raises UserError where that is none of the verifier's, or dated."""
    template = resolve_template(chat_template)
    if verifier is not None:
        require_verifier(verifier)
        if template is not None:
            require_same_template(verifier, model, chat_template)
        tokenizer.chat_template = trained_template(verifier) or tokenizer.chat_template
    tokenizer.chat_template = template or tokenizer.chat_template
    if tokenizer.chat_template is not None and (verifier or template):
        encode_chats(tokenizer, [[{"role": "user", "content": "?"}]], template, generation_prompt=True)
    return tokenizer


def _stop_fn(criteria: StoppingCriteriaList, input_ids: torch.Tensor) -> StopFn | None:
    """The stopping criteria other than length and end of sequence, applied to each sequence alone."""
    criteria = StoppingCriteriaList(
        criterion for criterion in criteria if not isinstance(criterion, EosTokenCriteria | MaxLengthCriteria)
    )
    if not criteria:
        return None

    def stop(prompt: int, sample: int, new: list[int]) -> bool:
        ids = torch.cat([input_ids[prompt], torch.tensor(new, device=input_ids.device)])
        return bool(criteria(ids[None], None))

    return stop


def _logits_fn(
    processors: LogitsProcessorList, input_ids: torch.Tensor, mask: torch.Tensor, pad: int | None
) -> LogitsFn | None:
    """The processors that act on System 1's logits, before the plausible set is taken.

    Some processors are built for the whole batch of `generate`, so they get all of it, padded on the left whichever
    side it was; sequences without logits in this step appear as their prompts, padded on the right too.
    """
    if not processors:
        return None
    tokens = mask.argsort(dim=-1, stable=True)  # the padding first
    kept, first = mask.gather(-1, tokens), mask.int().argmax(dim=-1, keepdim=True)
    counted = input_ids.gather(-1, torch.where(kept, tokens, first))  # a penalty would count padding as text
    padded = counted if pad is None else input_ids.gather(-1, tokens).masked_fill(~kept, pad)
    given = [(_with_prompts(processor, counted), isinstance(processor, PENALTIES)) for processor in processors]

    def process(prompts: list[int], new: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        processed = torch.empty_like(logits)
        for length in {len(tokens) for tokens in new}:  # several if the prompts were admitted in parts
            rows = [row for row, tokens in enumerate(new) if len(tokens) == length]
            batch_rows = [prompts[row] for row in rows]
            added = input_ids.new_full((len(input_ids), length), 0 if pad is None else pad)
            added[batch_rows] = input_ids.new_tensor([new[row] for row in rows])
            counted_ids, padded_ids = (torch.cat([ids, added], dim=-1) for ids in (counted, padded))
            batch_logits = logits.new_zeros(len(input_ids), logits.shape[-1])
            batch_logits[batch_rows] = logits[rows]
            for processor, counts in given:
                batch_logits = processor(counted_ids if counts else padded_ids, batch_logits)
            processed[rows] = batch_logits[batch_rows]
        return processed

    return process


def _with_prompts(processor: LogitsProcessor, prompts: torch.Tensor) -> LogitsProcessor:
    """The processor, with these prompts in the place of padded ones that it counts."""
    if isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor):
        processor = copy.copy(processor)
        processor.encoder_input_ids = prompts
    return processor


def _by_step(sequences: Sequence[Sequence[torch.Tensor]], fill: float, pad: int) -> tuple[torch.Tensor, ...]:
    """Each sequence's (V,) per step -> (B, V) per step; a sequence that has ended continues with certain pad tokens."""
    ended = torch.full_like(sequences[0][0], fill)
    ended[pad] = 0.0
    steps = range(max(map(len, sequences)))
    return tuple(torch.stack([tokens[step] if step < len(tokens) else ended for tokens in sequences]) for step in steps)
