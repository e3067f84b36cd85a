"""What the report shows of a solution, token by token.

Knows how a written row becomes plain JSON: its tokens as text, the verifier's score of each, and the places where there
was a choice. Leaves drawing it to `report`.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llm2.decoding.sampling import Completion


class TokenText:
    """Token id -> its text as it stands within a line, a leading space included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.known = tokenizer, {}
        self.anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # some tokenizers strip a first space
        self.offset = len(tokenizer.decode(self.anchor))

    def __call__(self, token: int) -> str:
        if token not in self.known:
            text = self.tokenizer.decode([*self.anchor, token], clean_up_tokenization_spaces=False)
            self.known[token] = text[self.offset :]
        return self.known[token]


def trace_of(row: Completion, scores: Sequence[float] | None, pieces: TokenText) -> dict:
    """One sample's trace.

    Returns:
        {"tokens": [text], "scores": [float] or None, "choices": [{"at", "candidates", "logprobs", "scores", "chosen",
        "changed"}]}: a choice for each token at which System 1 had more than one candidate, `at` its index.
    """
    choices = [
        {
            "at": at,
            "candidates": [pieces(token) for token in choice.candidates],
            "logprobs": [round(value, 3) for value in choice.logprobs],
            "scores": [round(value, 3) for value in choice.scores],
            "chosen": choice.chosen,
            "changed": bool(choice.changed),
        }
        for at, choice in enumerate(row.trace or [])
        if choice.scores is not None
    ]
    return {
        "tokens": [pieces(token) for token in row.token_ids],
        "scores": None if scores is None else [round(score, 2) for score in scores],
        "choices": choices,
    }
