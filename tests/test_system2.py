"""One interface of System 2: a new kind is a class with `score`, and guides everywhere."""

import random
from collections import Counter

import pytest
import torch
from conftest import VOCABULARY, tiny_system1
from reference import decode_one
from test_vllm import EOS, NEW, FakeEngine, prompts

from llm2 import LLM2
from llm2.config import GuidanceConfig, VerifierSpec
from llm2.decoding.decoder import Decoder
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.logits_processor import GuidedLogitsProcessor
from llm2.decoding.sampling import Guidance, SamplingParams
from llm2.decoding.system2 import Candidates, System2
from llm2.decoding.system2.kinds import open_system2, runner_of
from llm2.verifier.model import ProcessVerifier
from llm2.vllm.core import GuidedBatch

SETTINGS = {"alpha": 0.02, "beta": 3.0}


class Bigrams(System2):
    """A table of scores of (last token, next token)."""

    def __init__(self) -> None:
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(5))

    def score(self, handles, candidates):
        return self.table[[[handle.token_ids[-1]] for handle in handles], candidates.ids]


@pytest.fixture(scope="module")
def expected(system1) -> list[list[int]]:
    def scored(ids, tokens, logits):
        return table[ids[-1], tokens].tolist()

    table, options = Bigrams().table, {"max_new_tokens": NEW, "eos": EOS}
    written = [decode_one(system1, prompt, scored=scored, **SETTINGS, **options) for prompt in prompts(12)]
    plain = [decode_one(system1, prompt, **options) for prompt in prompts(12)]
    assert sum(a != b for a, b in zip(written, plain, strict=True)) > 6, "guidance must change choices"
    return written


def test_a_new_kind_guides_the_decoder(system1, expected):
    decoder = Decoder(system1, Guidance(verifier=Bigrams(), **SETTINGS))
    for batch_size in (1, 4, 64):
        rows = decoder.decode(prompts(12), max_new_tokens=NEW, eos=EOS, batch_size=batch_size)
        assert [completion.token_ids for (completion,) in rows] == expected
    assert decoder.counts["system2_forwards"] == 0


def test_another_kind_than_a_verifier_scores_no_solutions(system1, tokenizer):
    with pytest.raises(ValueError, match="a score needs a verifier"):
        LLM2(system1, tokenizer, Bigrams(), **SETTINGS).score("1 ?", ["7"])


def test_a_new_kind_samples_by_prompt_and_seed_alone(system1):
    decoder = Decoder(system1, Guidance(verifier=Bigrams(), **SETTINGS))
    options = {"sampling": SamplingParams(), "seeds": [[i, i + 50] for i in range(12)], "max_new_tokens": NEW}
    batches = [
        [[row.token_ids for row in rows] for rows in decoder.decode(prompts(12), eos=EOS, batch_size=size, **options)]
        for size in (1, 5, 64)
    ]
    assert batches[0] == batches[1] == batches[2]


def test_a_new_kind_guides_generate(system1, expected):
    for prompt, tokens in zip(prompts(12), expected, strict=True):
        processor = GuidedLogitsProcessor(Guidance(verifier=Bigrams(), **SETTINGS))
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": list(EOS), "pad_token_id": 0}
        written = system1.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[processor], **options)
        assert written[0, len(prompt) :].tolist() == tokens


def test_a_new_kind_guides_an_engines_batches(system1, expected):
    requests = [(prompt, GuidanceConfig(**SETTINGS)) for prompt in prompts(12)]
    engine = FakeEngine(system1, GuidedBatch(Bigrams()), requests, 0)
    entries = engine.waiting[:]
    engine.run()
    assert [entry.written for entry in entries] == expected and engine.preemptions > 0


@pytest.mark.parametrize("kind", ["full", "prefix"])
def test_a_reader_scores_as_the_verifier_whatever_joins_rewinds_and_leaves(kind, tmp_path):
    """Random sequences that branch off one another, against the verifier's own forward over each text."""
    tiny_system1(1).save_pretrained(tmp_path)
    verifier = ProcessVerifier.from_system1(str(tmp_path), VerifierSpec(kind=kind), local_files_only=True).eval()
    counts, generator = Counter(), random.Random(3)
    system2 = open_system2(verifier, runner_of(verifier), SlotCache(5), range(5), counts)
    root = [generator.randrange(3, VOCABULARY) for _ in range(40)]
    live, total = [], 0
    for _ in range(60):
        if len(live) < 5 and generator.random() < 0.6:
            live.append(system2.join(root[: generator.randrange(1, 40)] + [generator.randrange(3, VOCABULARY)]))
        if live and generator.random() < 0.2:
            system2.leave(live.pop(generator.randrange(len(live))))
        for handle in live:
            action = generator.random()
            if action < 0.5:
                known = list(handle.branches) or [7]
                system2.commit(handle, [generator.choice([*known, 9]) for _ in range(generator.randrange(1, 3))])
            elif action < 0.7 and len(handle.token_ids) > 3:
                system2.rewind(handle, generator.randrange(1, len(handle.token_ids)))
        asked = [handle for handle in live if generator.random() < 0.7]
        if not asked:
            continue
        ids = torch.randint(3, VOCABULARY, (len(asked), 4), generator=torch.Generator().manual_seed(total))
        valid = torch.tensor([[column < 2 + row % 3 for column in range(4)] for row in range(len(asked))])
        with torch.inference_mode():
            scores = system2.score(asked, Candidates(ids, valid, torch.zeros(ids.shape)))
            for row, handle in enumerate(asked):
                texts = torch.tensor([[*handle.token_ids, token] for token in ids[row].tolist()])
                expected = verifier(texts).scores[:, -1]
                torch.testing.assert_close(scores[row][valid[row]], expected[valid[row]], atol=1e-4, rtol=1e-4)
        total += sum(len(handle.token_ids) + int(valid[row].sum()) for row, handle in enumerate(asked))
    assert 0 < counts["system2_tokens"] < total / 3, "prefixes and chosen branches are read once"
