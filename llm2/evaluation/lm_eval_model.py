"""EleutherAI's lm-evaluation-harness with the model `llm2`: registers it, then calls lm_eval.

    python -m llm2.evaluation.lm_eval_model --model llm2 --tasks gsm8k --model_args pretrained=...,verifier=...

For several GPUs, replace `python -m` by `accelerate launch -m`. The arguments are those of `lm_eval`, which is an
optional dependency: no other module imports it or this one.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  registers lm_eval's own models
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from llm2.common.chat import render
from llm2.common.distributed import barrier, destroy_group, dist_info, process_device
from llm2.common.loading import resolve_device
from llm2.common.progress import DecodingBar
from llm2.common.seeds import row_seed
from llm2.decoding.decoder import Decoder
from llm2.decoding.llm2 import LLM2
from llm2.decoding.sampling import SamplingParams
from llm2.errors import UserError

TAIL = 16  # trailing tokens searched for a stop string, in addition to the string's own length


@register_model("llm2")
class HarnessModel(LM):
    """Generates until a stop string. Tasks that need log-likelihoods are refused: see `loglikelihood`.

    Under `accelerate launch` every process has a GPU of its own and a share of the requests.

    Args:
        pretrained: System 1, a local folder or a hub id.
        verifier: System 2; without it System 1 decodes alone.
        chat_template: name or file (llm2/common/chat.py) for --apply_chat_template; the verifier's, or the
            tokenizer's, when None.
        max_gen_toks: maximum number of new tokens, unless the task sets one.
        batch_size: sequences in flight; `auto`: as many as fit into GPU memory.
        max_batch_size: unused; lm_eval passes it to every model.
        guidance: alpha, beta and top_k; float16_weights.
    """

    def __init__(
        self,
        pretrained: str,
        verifier: str | None = None,
        chat_template: str | None = None,
        max_gen_toks: int = 512,
        seed: int = 0,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        **guidance: float | int | None,
    ) -> None:
        super().__init__()
        self._rank, self._world_size = dist_info().rank, dist_info().world_size
        self._device = torch.device("cpu")  # device of the counts that processes exchange over gloo
        own = resolve_device(device or "auto")
        own = process_device(own) if self.world_size > 1 else own  # a single process keeps an index such as `cuda:1`
        options = {"device": str(own), "dtype": dtype, "chat_template": chat_template}
        self.llm2 = LLM2.from_pretrained(pretrained, verifier, **options, **guidance)
        self.decoder = Decoder(self.llm2.system1, self.llm2.guidance, float16_weights=self.llm2.float16_weights)
        self.add_special_tokens = True  # until a chat template writes them
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.batch_size = batch_size if batch_size == "auto" else int(batch_size)
        self.pretrained = pretrained

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to its first stop string."""
        groups: dict[str, list[int]] = {}  # requests with equal options are decoded together
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        texts: dict[int, str] = {}
        bar_options = {"disable": disable_tqdm, "desc": "llm2", "unit": "request"}
        with DecodingBar(len(requests), self.max_gen_toks, **bar_options) as bar:
            for group in groups.values():
                options = requests[group[0]].args[1]
                for number, text in self._decode([requests[index].args[0] for index in group], options, bar):
                    texts[group[number]] = text
                    self.cache_hook.add_partial("generate_until", requests[group[number]].args, text)
        return [texts[index] for index in range(len(requests))]

    def _decode(self, contexts: Sequence[str], options: dict, bar: DecodingBar) -> Iterator[tuple[int, str]]:
        """Yield index and text of each context when it finishes. Unknown options are ignored."""
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        sampling = None
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            sampling = SamplingParams(temperature=options.get("temperature", 1.0), top_p=options.get("top_p", 1.0))
        finished = self.decoder.stream(
            [self._encode(context) for context in contexts],
            max_new_tokens=options.get("max_gen_toks", self.max_gen_toks),
            eos=self.llm2.eos,
            sampling=sampling,
            seeds=[[row_seed(self.seed, context, index)] for index, context in enumerate(contexts)],
            batch_size=self.batch_size,
            stop=self._stop_function(stops) if stops else None,
            on_token=bar.on_token,
        )
        for index, (completion,) in finished:
            bar.on_finished(index, [completion.token_ids])
            text = self.llm2.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            yield index, text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]

    def _stop_function(self, stops: Sequence[str]) -> Callable[[int, int, list[int]], bool]:
        """Whether the new tokens of a sequence end in a stop string."""
        tail = TAIL + 4 * max(map(len, stops))  # a character has at most 4 bytes, a token at least one

        def stop(prompt: int, sample: int, tokens: list[int]) -> bool:
            text = self.llm2.tokenizer.decode(tokens[-tail:], skip_special_tokens=True)
            return any(string in text for string in stops)

        return stop

    def _encode(self, context: str) -> list[int]:
        tokenizer = self.llm2.tokenizer
        has_bos = bool(tokenizer.bos_token) and context.startswith(tokenizer.bos_token)  # written by a chat template
        return tokenizer(context, add_special_tokens=self.add_special_tokens and not has_bos)["input_ids"]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "llm2 decodes: a continuation with a token that is not plausible to System 1 would have probability 0; "
            "choose tasks with output_type generate_until"
        )

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self.add_special_tokens = False
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return render(self.llm2.tokenizer, chat_history, **options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.llm2.tokenizer.chat_template

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """() of each process -> (processes,)."""
        self.barrier()
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch.distributed.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes on process `dst`, None on the others."""
        self.barrier()
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst)
        return gathered

    def barrier(self) -> None:
        barrier()

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")


if __name__ == "__main__":
    try:
        cli_evaluate()
        destroy_group()
    except UserError as error:
        sys.exit(f"llm2: {error}")
