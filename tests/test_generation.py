"""Cached, batched, lazy, branched decoding against the slow twin and against transformers' `generate`."""

import pytest
import torch
from conftest import VOCABULARY, tiny_system1, tiny_verifier
from reference import decode_one, score
from scipy.stats import chisquare
from transformers import AutoConfig, AutoModelForCausalLM

from llm2.generation import Guidance, Rows, Sampling, admit, decode, stream, verify
from llm2.model import LLM2
from llm2.verifier import ProcessVerifier

EOS = [1]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def greedy(system1, batch, **options) -> list[list[int]]:
    return [row.tokens for (row,) in decode(system1, batch, eos=EOS, **options)]


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("alpha, beta, top_k", [(0.1, 0.25, None), (0.02, 3.0, None), (0.001, 5.0, 2), (0.5, 1.0, 4)])
def test_guided_greedy_equals_the_uncached_reference(system1, verifier, count, alpha, beta, top_k):
    batch = prompts(count, seed=count)
    guidance = Guidance(verifier=verifier, alpha=alpha, beta=beta, top_k=top_k)
    expected = [
        decode_one(system1, p, max_new_tokens=16, eos=EOS, verifier=verifier, alpha=alpha, beta=beta, top_k=top_k)
        for p in batch
    ]
    assert greedy(system1, batch, max_new_tokens=16, guidance=guidance) == expected


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt_neox"])
def test_other_backbones_decode_as_their_reference(family, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, **sizes, pad_token_id=2, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    verifier = ProcessVerifier.from_system1(str(tmp_path)).eval()
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=3.0)
    batch = prompts(3, seed=8)
    twin = {"verifier": verifier, "alpha": 0.02, "beta": 3.0}
    expected = [decode_one(model, p, max_new_tokens=8, eos=EOS, **twin) for p in batch]
    assert greedy(model, batch, max_new_tokens=8, guidance=guidance) == expected


def test_guidance_changes_what_is_written(system1, verifier):
    """Else the tests above would pass with a verifier that is never asked."""
    batch = prompts(7)
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=3.0)
    plain = decode(system1, batch, max_new_tokens=16, eos=EOS)
    guided = decode(system1, batch, max_new_tokens=16, eos=EOS, guidance=guidance)
    assert sum(a[0].tokens != b[0].tokens for a, b in zip(plain, guided, strict=True)) >= 5
    assert all(row.verified == 0 for (row,) in plain)
    assert all(0 < row.verified <= len(row.tokens) for (row,) in guided)


def test_results_do_not_depend_on_the_schedule(system1, verifier):
    batch = prompts(33)
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=2.0)
    options = {"max_new_tokens": 24, "guidance": guidance, "eos": range(0, VOCABULARY, 8)}
    alone = [decode(system1, [prompt], **options)[0] for prompt in batch]
    assert len({len(row.tokens) for (row,) in alone}) > 5, "rows must end at different times, else no slot is reused"
    for batch_size in (1, 2, 5, 16, 33):
        assert decode(system1, batch, batch_size=batch_size, **options) == alone


def test_rows_are_yielded_as_they_finish(system1):
    options = {"max_new_tokens": 24, "eos": range(0, VOCABULARY, 8)}
    lengths = [len(row.tokens) for (row,) in decode(system1, prompts(12), **options)]
    order = [index for index, _ in stream(system1, prompts(12), batch_size=12, **options)]
    assert sorted(order) == list(range(12)) and [lengths[i] for i in order] == sorted(lengths)
    assert len(set(lengths)) > 3


def test_beta_zero_equals_generate(system1, verifier):
    batch = prompts(5)
    longest = max(map(len, batch))
    ids = torch.tensor([[2] * (longest - len(p)) + p for p in batch])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
    expected = system1.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, longest:].tolist()
    for guidance in (None, Guidance(verifier=verifier, alpha=0.1, beta=0.0)):
        tokens = greedy(system1, batch, max_new_tokens=20, guidance=guidance)
        assert [row + [2] * (len(expected[0]) - len(row)) for row in tokens] == expected


@pytest.mark.parametrize("guided", [False, True])
def test_samples_equal_the_reference_and_do_not_depend_on_the_batch(system1, verifier, guided):
    batch, seeds = prompts(4), [[100, 101, 102], [103], [104, 105, 106, 107], [108, 109]]
    guidance = Guidance(verifier=verifier, alpha=0.05, beta=1.0) if guided else None
    options = {"max_new_tokens": 12, "eos": EOS, "guidance": guidance, "sampling": Sampling(temperature=0.7)}
    twin = {"verifier": verifier, "alpha": 0.05, "beta": 1.0} if guided else {}
    expected = [
        [decode_one(system1, p, max_new_tokens=12, eos=EOS, seed=s, temperature=0.7, **twin) for s in own]
        for p, own in zip(batch, seeds, strict=True)
    ]
    for batch_size in (4, 6, 64):
        rows = decode(system1, batch, seeds=seeds, batch_size=batch_size, **options)
        assert [[row.tokens for row in own] for own in rows] == expected
    assert len({tuple(tokens) for tokens in expected[2]}) > 1, "samples of a prompt must differ"


def test_sampling_follows_the_distribution(system1):
    """Frequencies of the first token over 4,000 seeds against System 1's probabilities, by a chi-square test."""
    prompt, n = [5, 9, 3], 4_000
    (rows,) = decode(
        system1, [prompt], max_new_tokens=1, eos=EOS, sampling=Sampling(), seeds=[[7919 * i for i in range(n)]]
    )
    counts = torch.bincount(torch.tensor([row.tokens[0] for row in rows]), minlength=VOCABULARY).double()
    with torch.inference_mode():
        expected = system1(torch.tensor([prompt])).logits[0, -1].double().softmax(-1) * n
    common = expected >= 5  # the usual condition of the test; the rest is one class
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 0.001


def test_candidate_scores_equal_each_alone(system1, verifier):
    """Of a part of the rows, some of which System 2 has yet to catch up with by different amounts."""
    batch = prompts(6, seed=3)
    rows = Rows(6, 32, VOCABULARY, system1.device)
    asking = torch.tensor([1, 2, 4, 5])
    candidates = torch.randint(3, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        admit(system1, Guidance(verifier=verifier), rows, batch, [[0]] * 6, range(6))
        rows.read[:] = (rows.length - torch.tensor([0, 1, 3, 0, 0, 2])).clamp(min=0)
        scores = verify(verifier, rows, asking, candidates)
    for row, own, found in zip(asking.tolist(), candidates.tolist(), scores, strict=True):
        expected = [score(verifier, [*batch[row], token]) for token in own]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)


def test_sampling_without_seeds_is_refused(system1):
    with pytest.raises(ValueError, match="sampling wants seeds"):
        decode(system1, [[3]], max_new_tokens=2, eos=EOS, sampling=Sampling())


def test_nothing_in_nothing_out(system1):
    assert decode(system1, [], max_new_tokens=2, eos=EOS) == []


def test_llm2_takes_and_returns_what_generate_does(system1_folder, tmp_path):
    tiny_verifier(tmp_path / "system1", vocab_size=261).save_pretrained(tmp_path / "verifier")
    llm2 = LLM2.from_pretrained(system1_folder, str(tmp_path / "verifier"), beta=0.0, device="cpu")
    inputs = llm2.tokenizer(["2 + 2 =", "How many?"], return_tensors="pt", padding=True, padding_side="left")
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    expected = llm2.system1.generate(**inputs, max_new_tokens=9, do_sample=False)
    assert torch.equal(llm2.generate(**inputs, max_new_tokens=9), expected)
    sampled = llm2.generate(**inputs, max_new_tokens=9, do_sample=True, num_return_sequences=3, seed=5)
    assert sampled.shape[0] == 6 and torch.equal(sampled[:3, :9], inputs["input_ids"][:1].expand(3, -1)[:, :9])
    assert torch.equal(
        sampled, llm2.generate(**inputs, max_new_tokens=9, do_sample=True, num_return_sequences=3, seed=5)
    )


def test_another_system1_writes_something_else(system1):
    assert greedy(system1, prompts(3), max_new_tokens=8) != greedy(tiny_system1(7), prompts(3), max_new_tokens=8)
