"""The key `logits_processor`: a transformers LogitsProcessor acts on System 1's logits before the plausible set."""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from llm2.decoding.sampling import LogitsFn
from llm2.errors import UserError, as_user_error
from llm2.tasks.task import load_code


def processor_class(name: str) -> type[LogitsProcessor]:
    """The class MODULE:CLASS, installed or in the working directory. Raises UserError if it is none."""
    found = load_code("logits_processor", name, "MODULE:CLASS, such as llm2.decoding.arithmetic:Arithmetic")
    if not (isinstance(found, type) and issubclass(found, LogitsProcessor)):
        raise UserError(f"key 'logits_processor': {name!r} is no subclass of transformers.LogitsProcessor")
    return found


def processing(name: str, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> LogitsFn:
    """The processor as the decoder calls it. Each sequence is given to it alone, so that batches do not matter."""
    with as_user_error(f"key 'logits_processor': {name!r} cannot be made with the tokenizer"):
        processor = processor_class(name)(tokenizer)

    def process(indices: list[int], new: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        with as_user_error(f"key 'logits_processor': {name!r} fails"):
            for row, (index, tokens) in enumerate(zip(indices, new, strict=True)):
                ids = torch.tensor([[*prompts[index], *tokens]], device=logits.device)
                before = logits[row : row + 1]
                if (after := processor(ids, before)) is not before:
                    logits[row] = after[0]
        return logits

    return process
