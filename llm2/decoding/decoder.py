"""The decoder: prompts in, completions out, as sequences finish.

The scheduler does the work. Plain decoding is the same loop without a verifier.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from llm2.decoding.cuda_graphs import CUDAGraphs
from llm2.decoding.decoder_state import DecoderState
from llm2.decoding.linear import require_float16_weights
from llm2.decoding.model_runner import LMRunner, SharedRunner
from llm2.decoding.sampling import Completion, DecodeRequest, Guidance
from llm2.decoding.scheduler import Scheduler
from llm2.decoding.system2 import System2
from llm2.decoding.system2.kinds import is_adapter, require_pair, runner_of
from llm2.errors import UserError


class Decoder:
    """Both systems, ready to decode. Reuse one decoder for many calls: it keeps caches and CUDA graphs.

    Args:
        guidance: None for System 1 alone.
        graphs: replay decoding steps as CUDA graphs; off by default, since the replay has not been checked on a GPU
            yet. On a CPU the same steps run eagerly in the same few shapes, for tests.
        float16_weights: both systems multiply in float32 with float16 copies of the weights of their linear layers, on
            an x86 CPU. Raises UserError elsewhere.
    """

    def __init__(
        self,
        system1: PreTrainedModel,
        guidance: Guidance | None = None,
        graphs: bool = False,
        float16_weights: bool = False,
    ) -> None:
        require_float16_weights(float16_weights, system1.device, system1.dtype)
        models = [system1]
        if guidance is not None and not isinstance(guidance.verifier, System2):
            require_pair(guidance.verifier, system1, guidance.shared)
            models.append(guidance.verifier)
        self.guidance = guidance
        graph_store = CUDAGraphs.of(system1.device) if graphs else None
        if guidance is not None and guidance.shared and is_adapter(guidance.verifier):
            lm = verifier = SharedRunner(system1, guidance.verifier, graph_store, float16_weights)
        else:
            lm = LMRunner(system1, graph_store, float16_weights)
            verifier = None if guidance is None else runner_of(guidance.verifier, graph_store, float16_weights)
        self.state = DecoderState(models, lm, verifier, guidance)

    @property
    def counts(self) -> Counter[str]:
        """Over all calls: `tokens`, `candidates`, and `system1_` and `system2_forwards` and `_tokens`."""
        return self.state.counts

    def decode(self, prompts: Sequence[Sequence[int]], **options) -> list[list[Completion]]:
        """The completions of each prompt, in order; `options` as for `stream`."""
        completions = dict(self.stream(prompts, **options))
        return [completions[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def stream(self, prompts: Sequence[Sequence[int]], **options) -> Iterator[tuple[int, list[Completion]]]:
        """Yields (prompt index, its completions by sample) once all samples of a prompt are finished.

        Args:
            options: the other fields of `DecodeRequest`; max_new_tokens and eos are required.
        """
        if self.state.moved:
            raise UserError(
                "weights were moved, replaced or trained after the Decoder was made, or adapters switched; expected a "
                "new Decoder"
            )
        request = DecodeRequest(prompts=prompts, **options)
        finished: defaultdict[int, dict[int, Completion]] = defaultdict(dict)
        scheduler = Scheduler(self.state, request)
        while True:
            if request.further is not None:
                scheduler.add(request.further())
            if not scheduler.unfinished:
                break
            scheduler.advance()
            for sequence in scheduler.retire():
                samples = finished[sequence.prompt_index]
                samples[sequence.sample_index] = Completion(
                    sequence.completion_ids,
                    sequence.num_verifier_calls,
                    sequence.num_tokens_scored,
                    sequence.trace if request.trace else None,
                )
                if len(samples) == len(scheduler.prompts[sequence.prompt_index].seeds):
                    del scheduler.prompts[sequence.prompt_index], finished[sequence.prompt_index]
                    yield sequence.prompt_index, [completion for _, completion in sorted(samples.items())]
        scheduler.return_caches()
