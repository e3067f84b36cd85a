"""GuidedGenerate: what transformers' `generate` calls in place of its own loop.

`generate` prepares everything (generation config, processors, stopping criteria, special tokens) and then calls
`GuidedGenerate`, which decodes with `Decoder` and returns what `generate` returns.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import BaseStreamer, EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

from llm2.common.seeds import row_seed
from llm2.decoding.candidates import guided_logits
from llm2.decoding.decoder import Decoder
from llm2.decoding.generate_options import refuse_ignored
from llm2.decoding.sampling import Guidance, LogitsFn, SamplingParams, StopFn, TokenTrace

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
    given = [(_with_prompts(p, counted), counted if isinstance(p, PENALTIES) else padded) for p in processors]

    def process(prompts: list[int], new: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        processed = torch.empty_like(logits)
        for length in {len(tokens) for tokens in new}:  # several if the prompts were admitted in parts
            rows = [row for row, tokens in enumerate(new) if len(tokens) == length]
            batch_rows = [prompts[row] for row in rows]
            added = input_ids.new_full((len(input_ids), length), 0 if pad is None else pad)
            added[batch_rows] = input_ids.new_tensor([new[row] for row in rows])
            batch_logits = logits.new_zeros(len(input_ids), logits.shape[-1])
            batch_logits[batch_rows] = logits[rows]
            for processor, read in given:
                batch_logits = processor(torch.cat([read, added], dim=-1), batch_logits)
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
