"""The key `logits_processor`: a transformers LogitsProcessor acts on System 1's logits before the plausible set."""

from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from llm2.common.code import load_code
from llm2.config import DecodingConfig
from llm2.decoding.sampling import LogitsFn
from llm2.errors import UserError, as_user_error

KEY = "key 'logits_processor'"


def processor_class(name: str) -> type[LogitsProcessor]:
    found = load_code("logits_processor", name, "MODULE:CLASS, such as llm2.decoding.arithmetic:Arithmetic")
    if not (isinstance(found, type) and issubclass(found, LogitsProcessor)):
        raise UserError(f"{KEY}: {name!r} is no subclass of transformers.LogitsProcessor")
    return found


def require_processor(config: DecodingConfig, in_vllm: bool = False) -> None:
    """Raise UserError if the key names no processor, or the engine has no place for one.

    Args:
        in_vllm: whether vLLM would apply it as our engine does.
    """
    if config.logits_processor is not None:
        if config.engine != "llm2" and not in_vllm:
            raise UserError(
                f"logits_processor: found one with engine {config.engine}, expected engine llm2: exploration, guided "
                "modes and server= need it"
            )
        processor_class(config.logits_processor)


def load_processor(name: str | None, tokenizer: PreTrainedTokenizerBase) -> LogitsProcessor | None:
    if name is None:
        return None
    with as_user_error(f"{KEY}: {name!r} cannot be made with the tokenizer"):
        return processor_class(name)(tokenizer)


def process_each(processor: LogitsProcessor, rows: Sequence[Sequence[int]], logits: torch.Tensor) -> torch.Tensor:
    """The logits (n, V) behind the token ids of n rows. Each is given to the processor alone, whatever the batch."""
    with as_user_error(f"{KEY}: {type(processor).__name__} fails"):
        for row, ids in enumerate(rows):
            before = logits[row : row + 1]
            after = processor(torch.tensor([ids], device=logits.device), before)
            if after is not before:
                logits[row] = after[0]
    return logits


def logits_fn(processor: LogitsProcessor | None, prompt_of: Callable[[int], Sequence[int]]) -> LogitsFn | None:
    """The processor as the decoder calls it; `prompt_of` has the token ids of a prompt by its index."""
    if processor is None:
        return None

    def process(indices: list[int], new: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        rows = [[*prompt_of(index), *tokens] for index, tokens in zip(indices, new, strict=True)]
        return process_each(processor, rows, logits)

    return process
