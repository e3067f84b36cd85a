"""LLM2: both systems behind the interface of transformers' `generate`."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2.generation import Guidance, Sampling, decode
from llm2.models import eos_ids, load_system1, load_tokenizer, pick_device
from llm2.seeds import row_seed
from llm2.verifier import ProcessVerifier, load_verifier


class LLM2:
    """A language model that proposes and a verifier that chooses.

    llm2 = LLM2.from_pretrained("meta-llama/Llama-3.2-1B-Instruct", "results/llama-3.2-1b-instruct/verifier")
    inputs = llm2.tokenizer(["..."], return_tensors="pt", padding=True, padding_side="left")
    sequences = llm2.generate(**inputs, max_new_tokens=512)
    """

    def __init__(
        self,
        system1: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        verifier: ProcessVerifier | None = None,
        alpha: float = 0.1,
        beta: float = 0.25,
        top_k: int | None = None,
    ) -> None:
        self.system1, self.tokenizer = system1, tokenizer
        self.eos = eos_ids(system1, tokenizer)
        self.guidance = None if verifier is None else Guidance(verifier=verifier, alpha=alpha, beta=beta, top_k=top_k)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        verifier: str | None = None,
        alpha: float = 0.1,
        beta: float = 0.25,
        top_k: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> "LLM2":
        """Load both systems from folders or hub ids; without a verifier System 1 decodes alone."""
        place = pick_device(device)
        system1 = load_system1(model, place, dtype)
        system2 = None if verifier is None else load_verifier(verifier, place, dtype, system1.config.vocab_size)
        return cls(system1, load_tokenizer(model), system2, alpha, beta, top_k)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 512,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        num_return_sequences: int = 1,
        seed: int = 0,
    ) -> torch.Tensor:
        """Prompts and what was written, as transformers' `generate` returns them.

        Args:
            input_ids: (B, T), padded where `attention_mask` (B, T) is 0.
            seed: with do_sample, sample i of row b is drawn from a seed made of (seed, b, i).

        Returns:
            (B * num_return_sequences, T + new), right-padded with the tokenizer's pad token.
        """
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        written = decode(
            self.system1,
            [row[real.bool()].tolist() for row, real in zip(input_ids, keep, strict=True)],
            max_new_tokens=max_new_tokens,
            eos=self.eos,
            guidance=self.guidance,
            sampling=Sampling(temperature=temperature, top_p=top_p) if do_sample else None,
            seeds=[[row_seed(seed, b, i) for i in range(num_return_sequences)] for b in range(len(input_ids))],
            batch_size=len(input_ids) * num_return_sequences,
        )
        rows = [row.tokens for own in written for row in own]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        new = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens in rows], device=input_ids.device)
        return torch.cat([input_ids.repeat_interleave(num_return_sequences, dim=0), new], dim=-1)
