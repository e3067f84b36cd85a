"""Guided decoding, a ladder of small steps: admit, advance, propose, verify, choose, dismiss.

The ladder itself is `flight`; how a token is chosen, `choosing`. Greedy and sampling differ in one function; plain
decoding is the same ladder without System 2. Knows nothing of tokenizers, benchmarks or files.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from llm2.decoding.cuda_graphs import Recorder
from llm2.decoding.model_runner import SharedReader, System1Reader, System2Reader
from llm2.decoding.sampling import Completion, Guidance, SamplingParams, TokenTrace
from llm2.decoding.scheduler import Flight, Process, Readers, Stop, Task

__all__ = ["TokenTrace", "Decoder", "Guidance", "SamplingParams", "Completion", "decode", "stream"]


class Decoder:
    """Both systems, ready to decode; to be kept where there are many calls.

    Args:
        guidance: None for System 1 alone.
        graphs: replay steps as CUDA graphs, which keeps the caches between calls; None: on a GPU. On a CPU the same
            steps are run in the same few shapes, which is for tests.
    """

    def __init__(self, system1: PreTrainedModel, guidance: Guidance | None = None, graphs: bool | None = None) -> None:
        self.guidance = guidance
        graphs = system1.device.type == "cuda" if graphs is None else graphs

        def recorder() -> Recorder | None:
            return Recorder(system1.device) if graphs else None

        if guidance is not None and guidance.shared and guidance.verifier.config.lora is not None:
            both = SharedReader(system1, guidance.verifier, recorder())
            self.readers = Readers(both, both, guidance)
        else:
            system2 = None if guidance is None else System2Reader(guidance.verifier, recorder())
            self.readers = Readers(System1Reader(system1, recorder()), system2, guidance)

    @property
    def counts(self) -> Counter[str]:
        """Tokens, candidates, forwards of each system and tokens it read: of all calls together."""
        return self.readers.counts

    def decode(self, prompts: Sequence[Sequence[int]], **options) -> list[list[Completion]]:
        """What each prompt's rows became, in order; the arguments are those of `stream`."""
        found = dict(self.stream(prompts, **options))
        return [found[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos: Sequence[int],
        sampling: SamplingParams | None = None,
        seeds: Sequence[Sequence[int]] | None = None,
        batch_size: int = 64,
        stop: Stop | None = None,
        process: Process | None = None,
        on_token: Callable[[int, int, int], None] | None = None,
        trace: bool = False,
        keep_logits: bool = False,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Continue prompts until an end-of-sequence token or the limit; yields a prompt's rows when all are done.

        Args:
            prompts: lists of token ids of any lengths, none empty. They are started in this order; those that begin
                alike should stand together, since what they share is then read once.
            sampling: None for greedy.
            seeds: for each prompt a seed a row. One row a prompt when None. With sampling, a row's tokens depend on
                its prompt and seed alone.
            batch_size: rows in flight.
            stop: told prompt, sample and new tokens of a row after each token; true ends the row.
            process: given prompts (n,) and new tokens of rows and System 1's logits (n, V), returns those to be used.
            on_token: told prompt, sample and token as they are written.
            trace: say of each token how it came about; with keep_logits, System 1's logits too.
        """
        if sampling is not None and seeds is None:
            raise ValueError("sampling wants seeds: a list for each prompt, found None")
        seeds = [[0]] * len(prompts) if seeds is None else seeds
        task = Task(
            prompts=prompts,
            seeds=seeds,
            max_new_tokens=max_new_tokens,
            eos=frozenset(eos),
            sampling=sampling,
            stop=stop,
            process=process,
            on_token=on_token,
            trace=trace,
            keep_logits=keep_logits,
        )
        finished: list[dict[int, Completion]] = [{} for _ in prompts]
        flight = Flight(self.readers, task, slots=min(batch_size, sum(map(len, seeds))))
        while flight.waiting or flight.rows:
            flight.admit()
            flight.step()
            for row in flight.dismiss():
                finished[row.prompt][row.sample] = Completion(
                    row.new, row.num_verifier_calls, row.trace if trace else None
                )
                if len(finished[row.prompt]) == len(seeds[row.prompt]):
                    yield row.prompt, [written for _, written in sorted(finished[row.prompt].items())]
                    finished[row.prompt].clear()
        flight.land()


def decode(system1: PreTrainedModel, prompts: Sequence[Sequence[int]], **options) -> list[list[Completion]]:
    """`Decoder.decode` for one call."""
    return Decoder(system1, options.pop("guidance", None)).decode(prompts, **options)


def stream(
    system1: PreTrainedModel, prompts: Sequence[Sequence[int]], **options
) -> Iterator[tuple[int, list[Completion]]]:
    """`Decoder.stream` for one call."""
    return Decoder(system1, options.pop("guidance", None)).stream(prompts, **options)
