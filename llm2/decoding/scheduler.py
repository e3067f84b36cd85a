"""Continuous batching of guided decoding: which sequences run, what each system computes, which tokens are chosen.

Finished sequences leave and waiting prompts take their slots. The verifier runs only where there is a choice, and first
catches up there on the tokens it has not seen. Prompts that begin alike share the prefix; samples of a prompt that have
written the same so far (twins) share a row of System 1's forwards until they part. In float32 a sequence depends on its
prompt and seed alone, never on the schedule; in 16 bits kernels round differently for other batch shapes.

Letters: n sequences, V vocabulary, K candidates.
"""

import math
import sys
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

import torch

from llm2.common.seeds import uniforms
from llm2.decoding.candidates import guided_logits, plausible
from llm2.decoding.decoder_state import DecoderState
from llm2.decoding.forward_batch import MAX_BATCHED_TOKENS, Chunk, padded_width
from llm2.decoding.kv_cache import HEADROOM
from llm2.decoding.prefix_cache import PrefixCache, SharedPrefix
from llm2.decoding.sampling import DecodeRequest, KeptLogits, Prompt, TokenTrace, sample
from llm2.decoding.sequence import Proposal, SequenceState
from llm2.decoding.system2 import Candidates, Handle
from llm2.errors import UserError

ADMIT_SHARE = 8  # in padded batches, and before samples start together, one in so many slots must be free
MIN_IN_PLACE_TOKENS = 400  # prefix length times sequences from which reading in place beats a copy for each sequence


class Scheduler:
    """The sequences of one request: those in flight, in the first slots of the caches, and those waiting.

    Attributes:
        prompts: by index, those with unfinished sequences; who retires the last one of a prompt removes it.
    """

    def __init__(self, state: DecoderState, request: DecodeRequest) -> None:
        self.state, self.guidance, self.request = state, state.guidance, request
        self.prompts: dict[int, Prompt] = {}
        self.num_prompts = 0  # so far
        self.running: list[SequenceState] = []  # the index is the slot
        self.interrupted: list[SequenceState] = []  # to be admitted again
        self.waiting: deque[tuple[Prompt, int]] = deque()  # and a sample's index
        self.batch_size, self.max_prompt_tokens = request.batch_size, -1
        self.lm_cache = self.system2 = None
        names = request.names or [None] * len(request.prompts)
        self.add(zip(request.prompts, request.seeds, names, strict=True))

    def add(self, prompts: Iterable[tuple[Sequence[int], Sequence[int], str | None]]) -> None:
        """Let further prompts wait: token ids, seeds and name of each."""
        for fields in prompts:
            prompt = Prompt(self.num_prompts, *fields)
            what = f"prompt {prompt.index}" if prompt.name is None else f"problem {prompt.name!r}"
            if not len(prompt.token_ids):
                raise UserError(f"{what}: found no tokens, expected at least one")
            self.state.refuse_too_long(len(prompt.token_ids), self.request.max_new_tokens, what)
            self.waiting.extend((prompt, sample) for sample in range(len(prompt.seeds)))
            self.prompts[prompt.index] = prompt
            self.num_prompts += 1

    def _allocate(self, batch_size: int | str) -> None:
        """Caches with room for the longest sequence that is known; where others may come, for one a quarter longer."""
        request, state = self.request, self.state
        self.lm_cache = self.system2 = self.verifier_cache = None  # their memory is free for the new ones
        self.batch_size = batch_size
        self.max_prompt_tokens = max(len(prompt.token_ids) for prompt in self.prompts.values())
        total = sum(len(prompt.seeds) for prompt in self.prompts.values())
        if request.further is not None:
            self.max_prompt_tokens += self.max_prompt_tokens // 4
            total = sys.maxsize
        capacity = self.max_prompt_tokens + request.max_new_tokens + HEADROOM
        if not state.lm.unpadded:
            capacity = padded_width(capacity) + 1
        self.plan, self.lm_cache, self.verifier_cache = state.take_caches(batch_size, total, capacity)
        self.max_running = max(1, min(self.plan.rows if batch_size == "auto" else batch_size, total))
        self.prefixes = PrefixCache(self.plan.rows, self.plan.prefixes)
        if self.guidance is not None:
            self.system2 = state.open_system2(self.plan, self.verifier_cache)
        self.prefix_handles: dict[SharedPrefix, Handle] = {}  # System 2's, of prefixes that it reads in place

    # Sequences come and go.

    @property
    def unfinished(self) -> bool:
        return bool(self.running or self.interrupted or self.waiting)

    def advance(self) -> None:
        """Admit and step; with fewer sequences in flight from then on where memory runs out."""
        exhausted = False
        try:
            if not self.running:
                if not self._fits_next():
                    self._allocate(self.batch_size)
                self.state.lm.record(self.lm_cache, self.max_running)
            self.admit()
            self.step()
        except torch.OutOfMemoryError:
            if self.plan.rows == 1:
                raise
            exhausted = True
        if exhausted:  # outside the handler: the error holds the frames, and these hold tensors
            self._halve()

    def _halve(self) -> None:
        """Go on with half the sequences in flight; those that are unfinished compute their tokens again."""
        rows = max(1, min(len(self.running), self.plan.rows) // 2)
        warnings.warn(
            f"memory ran out with {len(self.running)} sequences in flight; decoding goes on with {rows} at a time, "
            f"which read their tokens again: set batch_size to {rows} or less",
            stacklevel=2,
        )
        self.interrupted += [sequence for sequence in self.running if not sequence.done]
        self.running = [sequence for sequence in self.running if sequence.done]
        for slot, sequence in enumerate(self.running):  # they only wait to be retired
            sequence.slot = slot
            sequence.drop_handle()
        for sequence in self.interrupted:
            sequence.restart()
        self.lm_cache = self.system2 = self.verifier_cache = None
        torch.cuda.empty_cache()
        self._allocate(rows)

    def _fits_next(self) -> bool:
        """Whether the caches have room for the prompt that waits longest."""
        return not self.waiting or len(self.waiting[0][0].token_ids) <= self.max_prompt_tokens

    def admit(self) -> None:
        """Give free slots to waiting sequences; their prompts are computed in the next forward."""
        num_tokens, num_waiting = 0, len(self.interrupted) + len(self.waiting)
        free = self.max_running - len(self.running)
        if self.running and not self.state.lm.unpadded and free < min(num_waiting, self.max_running // ADMIT_SHARE):
            return
        while free and num_tokens < MAX_BATCHED_TOKENS and (self.interrupted or self._admits_next(free)):
            twins, match = [], None
            if self.interrupted:
                first = self.interrupted.pop(0)
            else:
                (first, *twins), match = self._next(free)
            for sequence in (first, *twins):
                sequence.slot, free = len(self.running), free - 1
                self.running.append(sequence)
            if match is not None:
                self._share_prefix(first, *match)
            for twin in twins:
                first.add_twin(twin)
            if self.system2 is not None and self.system2.needs_tokens:
                first.handle = self._join_system2(first)
            num_tokens += len(first.token_ids) - first.num_cached_lm

    @property
    def twins(self) -> bool:
        """Whether samples share rows: where System 2 keeps nothing of each sequence, or there is none."""
        return self.request.sampling is not None and not (self.system2 and self.system2.needs_tokens)

    def _admits_next(self, free: int) -> bool:
        """Whether the prompt that waits longest may start. Its samples start together: later ones find no twin."""
        if not self.waiting or not self._fits_next():
            return False
        prompt, sample = self.waiting[0]
        wanted = min(len(prompt.seeds) - sample, self.max_running // ADMIT_SHARE) if self.twins else 1
        return not self.running or free >= wanted

    def _next(self, free: int) -> tuple[list[SequenceState], tuple[SharedPrefix, int, int] | None]:
        """The next prompt's samples to start, without slots: one, or as twins as many as fit; the prefix it shares."""
        prompt, sample = self.waiting[0]
        count = min(free, len(prompt.seeds) - sample) if self.twins else 1
        samples = [self.waiting.popleft()[1] for _ in range(count)]
        following = (other for other, sample in self.waiting if sample == 0)
        match = self.prefixes.match(prompt, following, self.max_running)
        sequences = [
            SequenceState(
                prompt_index=prompt.index,
                sample_index=sample,
                seed=prompt.seeds[sample],
                slot=-1,
                token_ids=list(prompt.token_ids),
                num_prompt_tokens=len(prompt.token_ids),
            )
            for sample in samples
        ]
        return sequences, match

    def _share_prefix(self, sequence: SequenceState, prefix: SharedPrefix, length: int, num_sharing: int) -> None:
        """Take the sequence's first `length` tokens from a prefix: in place, or as a copy in its own slot."""
        if self.state.lm.unpadded and num_sharing * length >= MIN_IN_PLACE_TOKENS:
            sequence.prefix, sequence.prefix_len = prefix, length
            sequence.token_ids = sequence.token_ids[length:]
            sequence.num_prompt_tokens -= length
            prefix.ref_count += 1
            return
        self._forward(self._prefix_chunks([prefix]))
        self.lm_cache.copy_slot(prefix.slot, sequence.slot, length)
        sequence.num_cached_lm = length

    def _join_system2(self, sequence: SequenceState) -> Handle:
        """Where System 1 reads a prefix in place, so does System 2."""
        prefix = sequence.prefix
        if prefix is None or not self.system2.runs_model:
            return self.system2.join(sequence.prefix_ids + sequence.token_ids)
        for other in self.prefix_handles.keys() - self.prefixes.prefixes:  # evicted
            self.system2.leave(self.prefix_handles.pop(other))
        if prefix not in self.prefix_handles:
            self.prefix_handles[prefix] = self.system2.join(prefix.token_ids)
        handle = self.prefix_handles[prefix]
        self.system2.commit(handle, prefix.token_ids[len(handle.token_ids) :])
        return self.system2.join(sequence.prefix_ids + sequence.token_ids, handle, sequence.prefix_len)

    def retire(self) -> list[SequenceState]:
        """Remove and return finished sequences; the last ones move into their slots."""
        done, used = [sequence for sequence in self.running if sequence.done], len(self.running)
        for sequence in done:
            last = self.running.pop()
            if last is not sequence:
                self.lm_cache.release(sequence.slot, sequence.slot + 1)
                if not last.is_twin:
                    self.lm_cache.copy_slot(last.slot, sequence.slot, len(last.token_ids))
                self.running[sequence.slot], last.slot = last, sequence.slot
            if sequence.prefix is not None:
                sequence.prefix.ref_count -= 1
            if sequence.handle is not None:
                self.system2.leave(sequence.handle)
        self.lm_cache.release(len(self.running), used)
        return done

    def return_caches(self) -> None:
        """Save the caches for the next call: captured graphs hold their addresses."""
        if self.state.lm.graphs is not None and self.lm_cache is not None:
            self.state.saved_caches = self.plan, self.lm_cache, self.verifier_cache

    # Forwards.

    def step(self) -> None:
        """One more token for every sequence that does not wait for the verifier, and for those that it is run for."""
        pending = [sequence for sequence in self.running if sequence.proposal]
        ready = [sequence for sequence in self.running if not (sequence.proposal or sequence.is_twin)]
        if ready and pending and len(pending) < self.guidance.verify_fraction * len(self.running):
            pending = []
        if self.state.shared:
            self._step_shared(pending, ready)
        else:
            self._step_separate(pending, ready)

    def _step_separate(self, pending: list[SequenceState], ready: list[SequenceState]) -> None:
        """System 2 scores, then System 1 goes on."""
        if pending:
            candidates = self._candidates(pending)
            self._choose(pending, candidates, self.system2.score(_handles(pending), candidates))
            ready = ready + [sequence for sequence in pending if not sequence.done]
            ready.sort(key=lambda sequence: sequence.slot)
        if ready:
            chunks = [sequence.chunk() for sequence in ready]
            hidden = self._forward(self._prefix_chunks([sequence.prefix for sequence in ready]) + chunks)
            self._propose(ready, hidden, [chunk.last for chunk in chunks])

    def _step_shared(self, pending: list[SequenceState], ready: list[SequenceState]) -> None:
        """One forward of both systems; System 1 computes the candidates too, and so the logits behind the winner."""
        chunks = [sequence.chunk() for sequence in ready]
        branches = [sequence.chunk(sequence.proposal.candidates) for sequence in pending]
        candidates = self._candidates(pending) if pending else None
        reads = self.system2.begin(_handles(pending), candidates) if pending else []
        lm_chunks = self._prefix_chunks([sequence.prefix for sequence in ready]) + chunks + branches
        hidden = self._forward(lm_chunks, [read.chunk for read in reads])
        indices = [chunk.last for chunk in chunks]
        if pending:
            chosen = self._choose(pending, candidates, self.system2.finish(hidden, reads, candidates))
            indices += [chunk.branch_indices[choice] for chunk, choice in zip(branches, chosen, strict=True)]
            self._commit_branch(pending, chosen)
        unfinished = [(seq, index) for seq, index in zip(ready + pending, indices, strict=True) if not seq.done]
        if unfinished:
            self._propose([sequence for sequence, _ in unfinished], hidden, [index for _, index in unfinished])

    def _prefix_chunks(self, prefixes: Sequence[SharedPrefix | None]) -> list[Chunk]:
        """Chunks for those prefixes that System 1 has not computed; they must be in its next forward."""
        chunks = []
        for prefix in prefixes:
            if prefix is not None and prefix.num_cached < len(prefix.token_ids):
                start, prefix.num_cached = prefix.num_cached, len(prefix.token_ids)
                chunks.append(Chunk(prefix.slot, start, prefix.token_ids[start:]))
        return chunks

    def _forward(self, chunks: list[Chunk], verifier_chunks: Sequence[Chunk] = ()) -> torch.Tensor | None:
        """System 1's hidden states, and in a shared forward the verifier's behind them."""
        self.state.counts.update(system1_forwards=bool(chunks), system1_tokens=sum(len(c.ids) for c in chunks))
        if chunks or verifier_chunks:
            return self.state.lm.forward(self.lm_cache, chunks, verifier_chunks)
        return None

    def _candidates(self, sequences: list[SequenceState]) -> Candidates:
        """Of the sequences' proposals, on the CPU: too few numbers for a GPU."""
        lists = [sequence.proposal.candidates for sequence in sequences]
        logits, ids = _pad([sequence.proposal.values for sequence in sequences]), _pad(lists).long()
        sizes = torch.tensor([len(row) for row in lists], device="cpu")
        candidates = Candidates(ids, torch.arange(ids.shape[1], device="cpu") < sizes[:, None], logits)
        candidates.lists = lists
        return candidates

    # Tokens are chosen.

    def _propose(self, sequences: list[SequenceState], hidden: torch.Tensor, indices: list[int]) -> None:
        """From System 1's hidden states at `indices`: each sequence's next token, or a proposal for the verifier."""
        for sequence in sequences:
            sequence.num_cached_lm = len(sequence.token_ids)
        states = hidden[torch.tensor(indices, device=hidden.device)]  # (n, D)
        logits = self.state.lm.logits(states)  # (n, V)
        leaders = [sequence for sequence in sequences if sequence.twins]
        if leaders:
            sizes = torch.tensor([1 + len(sequence.twins) for sequence in sequences]).to(logits.device)
            logits, states = (tensor.repeat_interleave(sizes, dim=0) for tensor in (logits, states))
            sequences = [each for sequence in sequences for each in (sequence, *sequence.twins)]
        raw = logits
        if self.request.process_logits is not None:
            prompt_indices = [sequence.prompt_index for sequence in sequences]
            completions = [sequence.completion_ids for sequence in sequences]
            logits = self.request.process_logits(prompt_indices, completions, logits)
        if self.guidance is None:
            candidates = sample(logits, self.request.sampling, self._uniforms(sequences, logits.device))[:, None]
            valid = torch.ones_like(candidates, dtype=torch.bool)
        else:
            candidates, valid = plausible(logits, self.guidance.alpha, self.guidance.top_k)
        sizes = valid.sum(dim=-1).tolist()
        self.state.counts["candidates"] += sum(sizes)
        found = Candidates(candidates, valid, logits.gather(-1, candidates), states)
        values = found.logits
        if self.request.trace:
            values = torch.cat([values, logits.logsumexp(dim=-1, keepdim=True)], dim=-1)  # (n, K + 1), in one transfer
        candidate_lists, value_lists = candidates.tolist(), values.tolist()
        for row, (sequence, size) in enumerate(zip(sequences, sizes, strict=True)):
            values, total = value_lists[row][:size], value_lists[row][-1]
            if not math.isfinite(values[0]):
                self._refuse(sequence, f"System 1's logit of token {candidate_lists[row][0]} is {values[0]}")
            logprobs = [value - total for value in values] if self.request.trace else None
            kept = KeptLogits(raw[row], logits[row]) if self.request.keep_logits else None
            proposal = Proposal(candidate_lists[row][:size], values, logprobs, kept)
            if size > 1 or not (self.guidance is None or self.guidance.lazy):
                sequence.proposal = proposal
            else:
                self._append_token(sequence, proposal, 0)
        rows = [row for row, sequence in enumerate(sequences) if sequence.proposal]
        if rows and not self.system2.runs_model:  # nothing has to wait
            pending = [sequences[row] for row in rows]
            self._choose(pending, self._candidates(pending), self.system2.score(_handles(pending), found[rows]))
        for leader in leaders:
            self._part(leader)

    def _part(self, leader: SequenceState) -> None:
        """Twins that chose another token than their leader go on in slots of their own."""
        groups: defaultdict[int, list[SequenceState]] = defaultdict(list)
        for sequence in (leader, *leader.twins):
            if not sequence.done:
                groups[sequence.token_ids[-1]].append(sequence)
        leader.twins = []
        for first, *others in groups.values():
            if first is not leader:
                self.lm_cache.copy_slot(leader.slot, first.slot, leader.num_cached_lm)
                first.num_cached_lm, first.is_twin = leader.num_cached_lm, False
            first.twins = others

    def _choose(self, sequences: list[SequenceState], candidates: Candidates, scores: torch.Tensor) -> list[int]:
        """Append the best or the sampled candidate of each sequence by its scores (n, K); returns their columns."""
        proposals, scores = [sequence.proposal for sequence in sequences], scores.cpu()
        logits, valid = candidates.logits, candidates.valid
        scores = scores[:, : valid.shape[1]].masked_fill(~valid, 0.0)
        uniform = self._uniforms(sequences, logits.device)
        if not scores.isfinite().all():
            self._refuse_scores(sequences, scores.tolist())
        guided = guided_logits(logits, valid, scores, self.guidance.beta)
        chosen = sample(guided, self.request.sampling, uniform).tolist()
        unguided = chosen
        if self.request.trace:
            unguided = sample(guided_logits(logits, valid, None, 0.0), self.request.sampling, uniform).tolist()
        rows = scores.tolist()
        for row, sequence in enumerate(sequences):
            sequence.proposal = None
            sequence.num_verifier_calls += self.system2.runs_model
            proposal, changed = proposals[row], chosen[row] != unguided[row]
            self._append_token(sequence, proposal, chosen[row], rows[row][: len(proposal.candidates)], changed)
        return chosen

    def _refuse_scores(self, sequences: Sequence[SequenceState], scores: Sequence[Sequence[float]]) -> None:
        for sequence, row in zip(sequences, scores, strict=True):
            for token, score in zip(sequence.proposal.candidates, row, strict=False):  # the rest is padding
                if not math.isfinite(score):
                    self._refuse(sequence, f"the verifier's score of token {token} is {score}")

    def _refuse(self, sequence: SequenceState, found: str) -> None:
        """Raise UserError for a number that no token can be chosen by; names problem and position."""
        index, name = sequence.prompt_index, self.prompts[sequence.prompt_index].name
        position = sequence.prefix_len + len(sequence.token_ids)
        raise UserError(
            f"{f'prompt {index}' if name is None else f'problem {name!r}'}, position {position} (new token "
            f"{len(sequence.completion_ids)}): {found}, expected a finite number; try dtype=float32"
        )

    def _commit_branch(self, sequences: Sequence[SequenceState], chosen: Sequence[int]) -> None:
        """Move System 1's chosen branch to its sequence's last position; the others are overwritten later."""
        moves = []
        for sequence, choice in zip(sequences, chosen, strict=True):
            position = len(sequence.token_ids) - 1
            if choice:
                moves.append((sequence.slot, position + choice, position))
        if moves:
            self.state.lm.commit(self.lm_cache, moves)

    def _append_token(
        self,
        sequence: SequenceState,
        proposal: Proposal,
        choice: int,
        scores: list[float] | None = None,
        changed: bool = False,
    ) -> None:
        """Append a candidate to its sequence, and check whether the sequence ends with it."""
        request, token = self.request, proposal.candidates[choice]
        sequence.token_ids.append(token)
        if sequence.handle is not None:
            self.system2.commit(sequence.handle, [token])
        self.state.counts["tokens"] += 1
        if request.trace:
            trace = TokenTrace(proposal.candidates, proposal.logprobs, scores, choice, changed, proposal.logits)
            sequence.trace.append(trace)
        if request.on_token is not None:
            request.on_token(sequence.prompt_index, sequence.sample_index, token)
        num_new = len(sequence.token_ids) - sequence.num_prompt_tokens
        sequence.done = token in request.eos or num_new >= request.max_new_tokens
        if not sequence.done and request.stop is not None:
            sequence.done = request.stop(sequence.prompt_index, sequence.sample_index, sequence.completion_ids)

    def _uniforms(self, sequences: list[SequenceState], device: torch.device) -> torch.Tensor | None:
        """Each sequence's random number for its next token, (n,); None for greedy decoding."""
        if self.request.sampling is None:
            return None
        seeds = torch.tensor([sequence.seed for sequence in sequences], device=device)
        steps = [len(sequence.token_ids) - sequence.num_prompt_tokens for sequence in sequences]
        return uniforms(seeds, torch.tensor(steps, device=device))


def _handles(sequences: Sequence[SequenceState]) -> list[Handle | None]:
    return [sequence.handle for sequence in sequences]


def _pad(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """Lists of up to K numbers -> (n, K) float32 on the CPU, padded with zeros."""
    width = max(map(len, rows))
    padded = [[*row, *[0.0] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.float32, device="cpu")
