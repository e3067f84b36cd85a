"""System 1's states at the prefixes of all pairs, computed once and kept on disk: training a prefix head reads them
instead of running the backbone.

Letters: F prefixes, M pairs, D width.
"""

import os
import tempfile
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from llm2.verifier.collate import VerifierBatch, pair_tensors, verifier_batch
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.triplets import EMPTY_EXAMPLE, Example


class FrozenExample(NamedTuple):
    """An example and System 1's states at the last tokens of its pairs' prefixes."""

    example: Example
    states: torch.Tensor  # (F, D), float32
    rows: torch.Tensor  # (M,) of the states


class FrozenStates(Sequence[FrozenExample]):
    """The states of all examples in an anonymous temporary file, so that memory does not grow with the data.

    Args:
        batch_size: solutions per forward.
    """

    def __init__(self, verifier: ProcessVerifier, examples: Sequence[Example], batch_size: int) -> None:
        self.examples = examples
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it lives as long as this object)
        self._width = verifier.get_input_embeddings().embedding_dim
        self._ends = array("q", [0])  # index of each example's first row in the file
        self.empty = FrozenExample(EMPTY_EXAMPLE, torch.empty(0, self._width), torch.empty(0, dtype=torch.long))
        verifier.eval()
        with tqdm(total=len(examples), desc="System 1 reads the pairs' prefixes", unit="solution") as bar:
            for first in range(0, len(examples), batch_size):
                chunk = [examples[i] for i in range(first, min(first + batch_size, len(examples)))]
                self._append(verifier, chunk)
                bar.update(len(chunk))

    @torch.inference_mode()
    def _append(self, verifier: ProcessVerifier, examples: Sequence[Example]) -> None:
        batch = verifier_batch(examples, branches=False)
        inputs = [tensor.to(verifier.device) for tensor in (batch.input_ids, batch.start, batch.prefix_len)]
        states = verifier.states(*inputs).flatten(end_dim=-2)  # (R * S, D)
        for indices in batch.pair_indices[0].split([len(example.triplets) for example in examples]):
            columns = indices.unique()
            self._file.write(states[columns.to(states.device)].float().cpu().numpy().tobytes())
            self._ends.append(self._ends[-1] + len(columns))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> FrozenExample:
        example, first, end = self.examples[index], self._ends[index], self._ends[index + 1]
        row_bytes = 4 * self._width
        values = np.frombuffer(os.pread(self._file.fileno(), (end - first) * row_bytes, first * row_bytes), np.float32)
        positions = torch.tensor([triplet.position for triplet in example.triplets])
        rows = positions.unique(return_inverse=True)[1]
        return FrozenExample(example, torch.from_numpy(values.copy()).view(-1, self._width), rows)


def frozen_batch(frozen: Sequence[FrozenExample], quality_weight: bool = False) -> VerifierBatch:
    """As `verifier_batch(examples, branches=False)`, with states instead of tokens."""
    pair_indices, offset = [], 0
    for _, states, rows in frozen:
        pair_indices.append(rows + offset)
        offset += len(states)
    return VerifierBatch(
        input_ids=None,
        start=None,
        prefix_len=None,
        states=torch.cat([states for _, states, _ in frozen]),
        pair_indices=torch.cat(pair_indices)[None],
        **pair_tensors([example for example, _, _ in frozen], quality_weight),
    )
