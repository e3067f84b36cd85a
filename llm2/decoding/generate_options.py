"""Which options of transformers' `generate` act in guided decoding. All others are refused, so that none is ignored."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig

from llm2.errors import quote

# Fields of a GenerationConfig that act here as they do in `generate`, ...
HONOURED = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample")
HONOURED += ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
HONOURED += ("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size")
HONOURED += ("encoder_no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id")
HONOURED += ("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens")
HONOURED += ("sequence_bias", "num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate")
HONOURED += ("pad_token_id", "bos_token_id", "eos_token_id")
# ... and those that change no text of a decoder without beams and assistant. All others must have their defaults.
WITHOUT_EFFECT = ("early_stopping", "length_penalty", "use_cache", "max_cache_len", "compile_config")
WITHOUT_EFFECT += ("disable_compile", "low_memory", "prefill_chunk_size", "decoder_start_token_id")
WITHOUT_EFFECT += ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
WITHOUT_EFFECT += ("assistant_lookbehind", "target_lookbehind", "transformers_version")
EXACT_CACHES = (None, "static", "offloaded", "offloaded_static", "sliding_window", "hybrid", "dynamic")
ARGUMENTS = ("inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
ARGUMENTS += ("streamer", "kwargs")
MODEL_INPUTS = ("attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "logits_to_keep")


def refuse_arguments(generate: Callable, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument that `generate` does not pass to a custom decoding loop."""
    for name in inspect.signature(generate).parameters:
        if name not in ARGUMENTS and (value := options.get(name)) is not None and value is not False:
            raise ValueError(
                f"{name}: found a {type(value).__name__}, which guided decoding does not take; leave it out"
            )


def refuse_ignored(config: GenerationConfig, model_inputs: Mapping[str, Any]) -> None:
    """Raises ValueError for a field or an input that guided decoding would ignore; a field that a later transformers
    adds is refused too, once it is set.

    Args:
        config, model_inputs: as `generate` hands them to a custom decoding loop.
    """
    defaults = GenerationConfig._get_default_generation_params()
    for name in vars(GenerationConfig()):
        value = getattr(config, name, None)
        neutral = EXACT_CACHES if name == "cache_implementation" else (None, False, defaults.get(name))
        if name not in (*HONOURED, *WITHOUT_EFFECT) and name[0] != "_" and value not in neutral:
            raise ValueError(f"{name}: found {quote(value)}, which guided decoding does not do; expected {neutral[-1]}")
    for name, value in model_inputs.items():
        is_empty = isinstance(value, Mapping | tuple | list) and not value  # multimodal models have such
        if name not in MODEL_INPUTS and value is not None and not is_empty:
            raise ValueError(f"{name}: guided decoding takes token ids and their attention_mask alone; leave it out")
    for name in ("cache", "past_key_values"):  # `generate` makes an empty one
        if (cache := model_inputs.get(name)) is not None and (tokens := cache.get_seq_length()):
            raise ValueError(f"{name}: found {tokens} tokens, expected none: pass their ids instead")
    mask, positions = model_inputs.get("attention_mask"), model_inputs.get("position_ids")
    if positions is not None:
        real = torch.ones_like(positions) if mask is None else mask
        if positions.shape != real.shape or not torch.equal(positions * real, (real.cumsum(-1) - 1) * real):
            raise ValueError("position_ids: found others than those of attention_mask; leave them out")
