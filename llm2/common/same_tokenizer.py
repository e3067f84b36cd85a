"""Compare tokenizers by their tokens: equal vocabularies do not imply equal tokenization."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm2.common.loading import is_local, load_tokenizer, model_path
from llm2.errors import UserError, quote

# Texts on which pre-tokenizers and normalizers differ: digits, spaces, contractions, scripts, composed characters.
PROBES = (
    "Nina has 1234567 shells, and 8.90 more.",
    " a  b   12\n\n3 \n x\t\t4567  \r\n",
    "it's IT'S we'll they’ve don't",
)
PROBES += (
    "for (int i=0; i<10; ++i) { x[i] += 'ab_cd'; } // $3.50",
    "naïve nai\u0308ve ﬁne Ａ１ ½ İstanbul ß",
    "数学は12個です。",
)
PROBES += (
    "Сколько у Нины ракушек? مرحبا ١٢٣ नमस्ते",
    "🙂🙂 👩‍👩‍👧 e=mc² x₁≤√2 \u200b\u00a0end",
    "<|user|> </s> [INST] \\frac{1}{2}",
)


def require_same_tokenizer(what: str, name: str, system1: PreTrainedTokenizerBase | str) -> None:
    """Raise UserError, prefixed with `what`, if a model's tokenizer differs from System 1's.

    Args:
        name: of the model; a folder without a tokenizer is accepted.
        system1: its tokenizer, or its name.
    """
    if any(isinstance(each, str) and _has_none(each) for each in (name, system1)):
        return
    other, own = load_tokenizer(name), load_tokenizer(system1) if isinstance(system1, str) else system1
    if differing := difference(other, own):
        raise UserError(
            f"{what}: expected System 1's tokenizer, found another one: they differ in {differing}; "
            "it was not made from this System 1"
        )


def difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """The first difference that affects tokenization, in words; None if there is none."""
    vocabularies = a.get_vocab(), b.get_vocab()
    if vocabularies[0] != vocabularies[1]:
        differing = vocabularies[0].items() ^ vocabularies[1].items()
        return f"token {min(differing, key=lambda token: (token[1], token[0]))[1]}"
    for kind, of_a, of_b in zip(("merge", "token"), _rules(a), _rules(b), strict=True):
        if of_a != of_b:
            pairs = enumerate(zip(of_a, of_b, strict=False))
            first = next((index for index, (one, other) in pairs if one != other), min(len(of_a), len(of_b)))
            return f"{kind} {first}"
    special = " ".join(sorted({*a.all_special_tokens, *b.all_special_tokens}))
    for text in (*PROBES, special):
        if a(text, add_special_tokens=False)["input_ids"] != b(text, add_special_tokens=False)["input_ids"]:
            return f"the tokens of {quote(text)}"
    return None


def _has_none(name: str) -> bool:
    return is_local(name) and not Path(model_path(name), "tokenizer_config.json").is_file()


def _rules(tokenizer: PreTrainedTokenizerBase) -> tuple[list[Any], list[Any]]:
    """The merges of a BPE model, by rank, and the scored tokens of a unigram model."""
    if not tokenizer.is_fast:
        return [], []
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model.get("merges", []), model["vocab"] if isinstance(model["vocab"], list) else []
