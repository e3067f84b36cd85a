"""LLM2: both systems behind the interface of transformers' `generate`.

`generate` itself prepares everything (generation config, processors, stopping criteria, special tokens) and then
hands over to `GuidedGenerate`, which writes with `generation.Decoder` and returns what `generate` returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    StopStringCriteria,
)

from llm2.common.loading import eos_ids, load_system1, load_tokenizer, resolve_device
from llm2.common.seeds import row_seed
from llm2.decoding.decoder import Decoder, Guidance, SamplingParams, TokenTrace
from llm2.verifier.model import ProcessVerifier, load_verifier

AFTER_GUIDANCE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


@dataclass
class GuidedOutput(GenerateDecoderOnlyOutput):
    """As transformers' own, and with trace=True `trace`: for each sequence a `TokenTrace` a new token."""

    trace: list[list[TokenTrace]] | None = None


class GuidedGenerate:
    """A callable for `model.generate(..., custom_generate=GuidedGenerate(guidance))`, of any System 1.

    Beside what `generate` knows it takes `seed` (with do_sample, sequence i of the output is drawn from a seed made of
    `seed` and i, whatever else is in the batch), `trace`, and `stream_to`, a streamer. Temperature, top_k, top_p and
    min_p act on the guided logits; all other processors on System 1's, before the plausible set is taken. Beam search
    is refused. `generate` hands neither `streamer` nor the tokenizer of `stop_strings` to a callable: use `stream_to`
    and a StopStringCriteria, or `LLM2.generate`, which does so for you.

    Args:
        guidance: None for System 1 alone.
    """

    def __init__(self, guidance: Guidance | None = None) -> None:
        self.guidance = guidance
        self.decoder: Decoder | None = None
        self.system1: PreTrainedModel | None = None  # the one that the decoder was made for

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
        """(B, T) ids -> (B, T + new) ids, right-padded; or a GuidedOutput if the config wants a dictionary."""
        if generation_config.num_beams > 1:
            raise ValueError("guided decoding does not search beams; expected num_beams=1")
        if stream_to is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer shows one sequence, found a batch of {len(input_ids)}")
        config = generation_config
        real = model_inputs.get("attention_mask")  # None where nothing is padded
        real = torch.ones_like(input_ids) if real is None else real
        detailed = config.return_dict_in_generate and (config.output_scores or config.output_logits)
        sampling = None
        if config.do_sample:
            sampling = SamplingParams(
                temperature=config.temperature or 1.0,
                top_k=config.top_k,
                top_p=1.0 if config.top_p is None else config.top_p,
                min_p=config.min_p,
            )
        ends = config.eos_token_id
        pad = 0 if config.pad_token_id is None else config.pad_token_id
        written = self._decoder_for(model).decode(
            [row[mask.bool()].tolist() for row, mask in zip(input_ids, real, strict=True)],
            max_new_tokens=config.max_length - input_ids.shape[1],
            eos=[] if ends is None else ends if isinstance(ends, list) else [ends],
            sampling=sampling,
            seeds=[[row_seed(seed, index)] for index in range(len(input_ids))],
            batch_size=len(input_ids),
            stop=_stop(stopping_criteria, input_ids),
            process=_process(logits_processor, input_ids, pad),
            on_token=stream_to and (lambda prompt, sample, token: stream_to.put(torch.tensor([token]))),
            trace=trace or detailed,
            keep_logits=detailed,
        )
        if stream_to is not None:
            stream_to.end()
        rows = [row for (row,) in written]
        new = [torch.tensor(row.token_ids, device=input_ids.device) for row in rows]
        new = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=pad)
        sequences = torch.cat([input_ids, new], dim=-1)
        if not (config.return_dict_in_generate or trace):
            return sequences
        traces = [row.trace for row in rows]
        return GuidedOutput(
            sequences=sequences,
            scores=self._scores(traces, sampling, pad) if detailed and config.output_scores else None,
            logits=_by_step([[choice.logits for choice in row] for row in traces], 0.0, pad)
            if detailed and config.output_logits
            else None,
            trace=traces if trace else None,
        )

    def _decoder_for(self, model: PreTrainedModel) -> Decoder:
        if self.system1 is not model:
            self.system1, self.decoder = model, Decoder(model, self.guidance)
        return self.decoder

    def _scores(self, traces: Sequence[Sequence[TokenTrace]], sampling: SamplingParams | None, pad: int) -> tuple:
        """The logits that the choice fell on, a (B, V) a step: -inf on what was not a candidate."""
        rows = []
        for trace in traces:
            rows.append([])
            for choice in trace:
                final = choice.logits
                if self.guidance is not None:
                    final = torch.full_like(choice.logits, -torch.inf)
                    final[choice.candidates] = choice.logits[choice.candidates]
                    if choice.scores is not None:
                        final[choice.candidates] += self.guidance.beta * torch.tensor(choice.scores).to(final)
                rows[-1].append(final if sampling is None else sampling.warpers()(None, final[None])[0])
        return _by_step(rows, -torch.inf, pad)


class LLM2:
    """A language model that proposes and a verifier that chooses.

    llm2 = LLM2.from_pretrained("meta-llama/Llama-3.2-1B-Instruct", "results/llama-3.2-1b-instruct/verifier")
    inputs = llm2.tokenizer(["..."], return_tensors="pt", padding=True, padding_side="left")
    sequences = llm2.generate(**inputs, max_new_tokens=512)
    """

    def __init__(
        self,
        system1: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        verifier: ProcessVerifier | None = None,
        alpha: float = 0.1,
        beta: float = 0.25,
        top_k: int | None = None,
    ) -> None:
        self.system1, self.tokenizer = system1, tokenizer
        self.eos = eos_ids(system1, tokenizer)
        self.guidance = None if verifier is None else Guidance(verifier=verifier, alpha=alpha, beta=beta, top_k=top_k)
        self.guided_generate = GuidedGenerate(self.guidance)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        verifier: str | None = None,
        alpha: float = 0.1,
        beta: float = 0.25,
        top_k: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> "LLM2":
        """Load both systems from folders or hub ids; without a verifier System 1 decodes alone."""
        place = resolve_device(device)
        system1 = load_system1(model, place, dtype)
        system2 = (
            None if verifier is None else load_verifier(verifier, place, dtype, system1.config.vocab_size, system1)
        )
        return cls(system1, load_tokenizer(model), system2, alpha, beta, top_k)

    def generate(self, inputs: torch.Tensor | None = None, **options) -> torch.Tensor | GuidedOutput:
        """transformers' `generate` of System 1, guided; takes and returns what that does, and what GuidedGenerate does.

        Without a generation config of its own, a call ends at the tokenizer's end-of-sequence token too.
        """
        if options.get("generation_config") is None:
            options = {"eos_token_id": self.eos, "pad_token_id": self.tokenizer.pad_token_id, **options}
        if strings := options.pop("stop_strings", None):
            tokenizer = options.pop("tokenizer", self.tokenizer)
            criteria = [*options.pop("stopping_criteria", []), StopStringCriteria(tokenizer, strings)]
            options["stopping_criteria"] = StoppingCriteriaList(criteria)
        live = {"stream_to": options["streamer"]} if options.get("streamer") is not None else {}
        return self.system1.generate(inputs, custom_generate=self.guided_generate, **options, **live)


def _stop(criteria: StoppingCriteriaList, input_ids: torch.Tensor):
    """What ends a row besides its length and end-of-sequence token, each asked of the row alone; None for nothing."""
    rest = StoppingCriteriaList(each for each in criteria if not isinstance(each, EosTokenCriteria | MaxLengthCriteria))
    if not rest:
        return None

    def stop(prompt: int, sample: int, new: list[int]) -> bool:
        ids = torch.cat([input_ids[prompt], torch.tensor(new, device=input_ids.device)])
        return bool(rest(ids[None], None))

    return stop


def _process(processors: LogitsProcessorList, input_ids: torch.Tensor, pad: int):
    """What acts on System 1's logits before the plausible set is taken; None for nothing.

    Some processors are made for the batch that `generate` was given, so they are shown all of it: rows that are not in
    question as prompts filled up with padding.
    """
    rest = LogitsProcessorList(each for each in processors if not isinstance(each, AFTER_GUIDANCE))
    if not rest:
        return None

    def process(rows: list[int], new: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        processed = torch.empty_like(logits)
        for length in {len(own) for own in new}:  # one, unless so many prompts came that they were admitted in parts
            ids = torch.cat([input_ids, input_ids.new_full((len(input_ids), length), pad)], dim=-1)
            whole = logits.new_zeros(len(input_ids), logits.shape[-1])
            places = [place for place, own in enumerate(new) if len(own) == length]
            of = [rows[place] for place in places]
            ids[of, input_ids.shape[1] :] = input_ids.new_tensor([new[place] for place in places])
            whole[of] = logits[places]
            processed[places] = rest(ids, whole)[of]
        return processed

    return process


def _by_step(rows: Sequence[Sequence[torch.Tensor]], rest: float, pad: int) -> tuple[torch.Tensor, ...]:
    """Each row's (V,) a step -> (B, V) a step; a row that has ended has its pad token for sure."""
    ended = torch.full_like(rows[0][0], rest)
    ended[pad] = 0.0
    steps = range(max(map(len, rows)))
    return tuple(torch.stack([row[step] if step < len(row) else ended for row in rows]) for step in steps)
