"""Traces: how each token of a completion was chosen, as plain JSON for the report."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llm2.decoding.sampling import Completion


class TokenText:
    """Token id -> its text within a line, including a leading space."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.cache = tokenizer, {}
        self.anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # some tokenizers strip a first space
        self.offset = len(tokenizer.decode(self.anchor))

    def __call__(self, token: int) -> str:
        if token not in self.cache:
            text = self.tokenizer.decode([*self.anchor, token], clean_up_tokenization_spaces=False)
            self.cache[token] = text[self.offset :]
        return self.cache[token]


def trace_record(completion: Completion, scores: Sequence[float] | None, token_text: TokenText) -> dict:
    """The trace of one completion.

    Args:
        scores: the verifier's score of each token, if it scored the completion.

    Returns:
        {"tokens": [text], "scores": [float] or None, "choices": [{"at", "candidates", "logprobs", "scores", "chosen",
        "changed"}]}, with a choice for each token (index `at`) at which System 1 had more than one candidate.
    """
    choices = [
        {
            "at": at,
            "candidates": [token_text(candidate) for candidate in token.candidates],
            "logprobs": [round(value, 3) for value in token.logprobs],
            "scores": [round(value, 3) for value in token.scores],
            "chosen": token.chosen,
            "changed": bool(token.changed),
        }
        for at, token in enumerate(completion.trace or [])
        if token.scores is not None
    ]
    return {
        "tokens": [token_text(token) for token in completion.token_ids],
        "scores": None if scores is None else [round(score, 2) for score in scores],
        "choices": choices,
    }
