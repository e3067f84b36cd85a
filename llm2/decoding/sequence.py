"""A sequence in flight: its tokens, what is cached of it, and what waits for the verifier."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llm2.decoding.forward_batch import Chunk
from llm2.decoding.prefix_cache import SharedPrefix
from llm2.decoding.sampling import KeptLogits, TokenTrace
from llm2.decoding.system2 import Handle


class Proposal(NamedTuple):
    """System 1's plausible next tokens for a sequence, best first."""

    candidates: list[int]
    values: list[float]  # their logits
    logprobs: list[float] | None  # for a trace
    logits: KeptLogits | None  # with keep_logits


@dataclass(eq=False)
class SequenceState:
    """A sequence in flight. Cache position i of its slot holds token_ids[i]; a prefix read in place stands before."""

    prompt_index: int
    sample_index: int
    seed: int
    slot: int
    token_ids: list[int]  # the prompt behind the prefix, and the new tokens
    num_prompt_tokens: int  # of token_ids
    prefix: SharedPrefix | None = None  # read in place
    prefix_len: int = 0  # how much of the prefix belongs to this sequence
    num_cached_lm: int = 0  # tokens whose keys and values System 1 has computed
    handle: Handle | None = None  # System 2's
    num_verifier_calls: int = 0
    num_verifier_tokens: int = 0  # read by handles that the sequence had before
    trace: list[TokenTrace] = field(default_factory=list)
    proposal: Proposal | None = None  # waits for the verifier
    twins: list["SequenceState"] = field(default_factory=list)  # samples of this prompt that wrote the same so far
    is_twin: bool = False  # of another sequence, whose slot holds the keys and values of both
    done: bool = False

    @property
    def completion_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def prefix_ids(self) -> list[int]:
        """The tokens that are read in place."""
        return [] if self.prefix is None else self.prefix.token_ids[: self.prefix_len]

    @property
    def num_tokens_scored(self) -> int:
        """Tokens that System 2 has read for this sequence alone, its candidates included."""
        return self.num_verifier_tokens + (0 if self.handle is None else self.handle.num_tokens)

    def drop_handle(self) -> None:
        """The System 2 that the handle is of is gone, and its slots with it."""
        self.num_verifier_tokens, self.handle = self.num_tokens_scored, None

    def restart(self) -> None:
        """Forget what is cached of this sequence, not what is written."""
        self.token_ids = self.prefix_ids + self.token_ids
        self.num_prompt_tokens += self.prefix_len
        self.drop_handle()
        self.prefix, self.prefix_len, self.proposal = None, 0, None
        self.twins, self.is_twin = [], False
        self.num_cached_lm = 0

    def add_twin(self, other: "SequenceState") -> None:
        """Carry another sample of this prompt, before either has a new token."""
        other.token_ids, other.num_prompt_tokens = list(self.token_ids), self.num_prompt_tokens
        other.prefix, other.prefix_len, other.is_twin = self.prefix, self.prefix_len, True
        if self.prefix is not None:
            self.prefix.ref_count += 1
        self.twins.append(other)

    def chunk(self, candidates: Sequence[int] = ()) -> Chunk:
        """For System 1: the tokens that it has not read, or the candidates behind tokens that it has."""
        prefix, start = None if self.prefix is None else (self.prefix.slot, self.prefix_len), self.num_cached_lm
        return Chunk(self.slot, start, [*self.token_ids[start:], *candidates], len(candidates), prefix)
