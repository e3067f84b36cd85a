"""LLM2: both systems behind the interface of transformers' `generate`."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import StopStringCriteria

from llm2.common.chat import Message, encode_chats, resolve_template
from llm2.common.loading import HUB, eos_ids, load_system1, load_tokenizer, resolve_device
from llm2.decoding.generate import GuidedGenerate, GuidedOutput
from llm2.decoding.generate_options import refuse_arguments
from llm2.decoding.linear import require_float16_weights
from llm2.decoding.sampling import Guidance
from llm2.decoding.system2 import System2
from llm2.errors import UserError, quote
from llm2.verifier.load import load_verifier, require_same_template, require_verifier, trained_template
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.scoring import Reduction, encode_solutions, score_solutions, solution_score

# Values of transformers' device_map that spread a model over several GPUs.
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


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
