"""Cached, batched, lazy, branched decoding equals the uncached reference and transformers' `generate`."""

import pytest
import torch
from conftest import VOCABULARY, tiny_system1
from reference import decode_one, score
from scipy.stats import chisquare
from torch.backends import cuda
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.decode import HostReads
from llm2.config import VerifierSpec
from llm2.decoding import attention, model_runner, scheduler
from llm2.decoding.decoder import Decoder
from llm2.decoding.model_runner import ModelRunner
from llm2.decoding.sampling import Completion, Guidance, SamplingParams
from llm2.errors import UserError
from llm2.verifier.model import ProcessVerifier

EOS = [1]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def decode(system1, batch, guidance: Guidance | None = None, **options) -> list[list[Completion]]:
    return Decoder(system1, guidance).decode(batch, **options)


def greedy(system1, batch, **options) -> list[list[int]]:
    return [completion.token_ids for (completion,) in decode(system1, batch, eos=EOS, **options)]


def use_padded_batches(patch) -> None:
    """The layout of a GPU."""
    patch.setattr(ModelRunner, "unpadded", False)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("alpha, beta, top_k", [(0.1, 0.25, None), (0.02, 3.0, None), (0.001, 5.0, 2), (0.5, 1.0, 4)])
def test_guided_greedy_equals_the_uncached_reference(system1, verifier, count, alpha, beta, top_k):
    batch = prompts(count, seed=count)
    guidance = Guidance(verifier=verifier, alpha=alpha, beta=beta, top_k=top_k)
    expected = [
        decode_one(system1, p, max_new_tokens=16, eos=EOS, verifier=verifier, alpha=alpha, beta=beta, top_k=top_k)
        for p in batch
    ]
    assert greedy(system1, batch, max_new_tokens=16, guidance=guidance) == expected


WINDOWS = {"mistral": {"sliding_window": 6}, "qwen3": {"sliding_window": 6, "use_sliding_window": True}}
WINDOWS |= {"gemma2": {"sliding_window": 6}, "gemma3_text": {"sliding_window": 6}}
FAMILIES = [("llama", False), *[(name, False) for name in ("qwen2", "gemma", "phi3", "gpt_neox")]]
FAMILIES += [(name, windowed) for name in WINDOWS for windowed in (False, True)]


def of_family(family: str, folder, windowed: bool = False, **lora):
    """A System 1 of random weights and a verifier made from it or, with LoRA settings, on it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    # Without a window, one that is longer than any sequence here.
    sizes |= WINDOWS.get(family, {}) if windowed else {"sliding_window": 512} if family in WINDOWS else {}
    if family == "qwen3":
        sizes |= {"max_window_layers": 1}  # one layer with a window, one without
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, **sizes, pad_token_id=2, bos_token_id=0, eos_token_id=1
    )
    config._attn_implementation = "eager"  # for the reference: the only one with soft caps
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    (model if lora else AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    spec = VerifierSpec(kind="lora", lora_r=lora["lora"]["rank"]) if lora.get("lora") else VerifierSpec()
    verifier = ProcessVerifier.from_system1(str(folder), spec, attn_implementation="eager").eval()
    for name, parameter in verifier.named_parameters():
        if "lora_B" in name or name == "score.weight":  # an adapter starts at zero
            torch.nn.init.normal_(parameter, std=0.3)
    return model, verifier


def expect_reference(model, verifier, count: int = 3, alpha: float = 0.02, beta: float = 3.0, **options) -> None:
    batch = prompts(count, seed=8)
    guidance = Guidance(verifier=verifier, alpha=alpha, beta=beta, **options)
    settings = {"verifier": verifier, "alpha": alpha, "beta": beta}
    expected = [decode_one(model, p, max_new_tokens=8, eos=EOS, **settings) for p in batch]
    assert greedy(model, batch, max_new_tokens=8, guidance=guidance) == expected


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family, windowed", FAMILIES)
def test_other_backbones_decode_as_their_reference(family, windowed, tmp_path):
    expect_reference(*of_family(family, tmp_path, windowed))


OF_LORA = [(family, True) for family in ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text")]
APART = [pytest.param(family, False, marks=[pytest.mark.slow] * (family != "llama")) for family, _ in OF_LORA]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("family, shared", [*OF_LORA, *APART])
def test_a_lora_verifier_decodes_as_the_reference_in_one_forward_or_two(family, shared, tmp_path):
    expect_reference(*of_family(family, tmp_path, lora={"rank": 4}), shared=shared)


@pytest.fixture(scope="module", params=[None, {"rank": 4}], ids=["full", "lora"])
def reference(request, tmp_path_factory):
    """Both systems, prompts and the completions of the uncached reference."""
    model, verifier = of_family("llama", tmp_path_factory.mktemp("reference"), lora=request.param)
    batch, settings = prompts(5, seed=8), {"verifier": verifier, "alpha": 0.02, "beta": 3.0}
    return model, verifier, batch, [decode_one(model, p, max_new_tokens=12, eos=EOS, **settings) for p in batch]


REST = [pytest.param(lazy, share, marks=pytest.mark.slow) for lazy, share in [(True, 1.0), (False, 0.0), (False, 0.5)]]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("lazy, verify_fraction", [(True, 0.0), (True, 0.5), (False, 1.0), *REST])
@pytest.mark.parametrize("layout", ["varlen", "padded", "graphs"])
def test_lazy_verify_fraction_and_layout_change_nothing(reference, lazy, verify_fraction, layout, monkeypatch):
    if layout == "padded":
        use_padded_batches(monkeypatch)
    model, verifier, batch, expected = reference
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=3.0, lazy=lazy, verify_fraction=verify_fraction)
    decoder = Decoder(model, guidance, graphs=layout == "graphs")
    for _ in range(2):
        completions = decoder.decode(batch, max_new_tokens=12, eos=EOS)
        assert [completion.token_ids for (completion,) in completions] == expected


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows_hold_in_padded_batches_and_shared_prefixes(family, tmp_path, monkeypatch):
    model, verifier = of_family(family, tmp_path, windowed=True)
    with monkeypatch.context() as patch:
        use_padded_batches(patch)
        expect_reference(model, verifier, count=4)
    expect_shared_prompts(model, verifier, monkeypatch, in_place=True)


def expect_shared_prompts(model, verifier, monkeypatch, in_place: bool, graphs: bool = False) -> None:
    """Prompts that begin alike, with several samples each, and unrelated ones between them."""
    monkeypatch.setattr(scheduler, "MIN_IN_PLACE_TOKENS", 0 if in_place else 10**9)
    long = prompts(1, seed=5)[0] * 9
    batch = [long[:40], long[:39] + [7], long[:30] + [8, 9, 10], prompts(1, seed=6)[0], long[:21], long[1:30]]
    seeds = [[1, 2, 3], [4], [5, 6], [7, 8], [9], [10]]
    settings = {"verifier": verifier, "alpha": 0.02, "beta": 2.0, "temperature": 0.8}
    expected = [
        [decode_one(model, p, max_new_tokens=7, eos=EOS, seed=s, **settings) for s in prompt_seeds]
        for p, prompt_seeds in zip(batch, seeds, strict=True)
    ]
    decoder = Decoder(model, Guidance(verifier=verifier, alpha=0.02, beta=2.0), graphs=graphs)
    for batch_size in (1, 3, 64):
        completions = decoder.decode(
            batch,
            max_new_tokens=7,
            eos=EOS,
            sampling=SamplingParams(temperature=0.8),
            seeds=seeds,
            batch_size=batch_size,
        )
        assert [[sample.token_ids for sample in samples] for samples in completions] == expected


@pytest.mark.one_in(3)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_shared_prefix_is_computed_once(lora, in_place, tmp_path, monkeypatch):
    model, verifier = of_family("llama", tmp_path, lora=lora)
    expect_shared_prompts(model, verifier, monkeypatch, in_place=in_place)
    decoder = Decoder(model, Guidance(verifier=verifier, alpha=0.9))
    prompt, samples, new = [3, *range(4, 60)], 16, 2
    decoder.decode(
        [prompt],
        max_new_tokens=new,
        eos=[],
        sampling=SamplingParams(),
        seeds=[list(range(samples))],
        batch_size=samples,
    )
    most = len(prompt) - 1 + samples * new + decoder.counts["candidates"]
    assert decoder.counts["system1_tokens"] <= most < samples * len(prompt) / 4
    assert decoder.counts["system2_tokens"] <= most


@pytest.mark.one_in(2)
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_cuda_graph_shapes_share_prefixes_too(lora, tmp_path, monkeypatch):
    """Their padded batches cannot read a prefix in place, however many sequences share it."""
    expect_shared_prompts(*of_family("llama", tmp_path, lora=lora), monkeypatch, in_place=True, graphs=True)


def test_every_token_is_computed_once(system1, verifier):
    batch, new = prompts(9), 16
    plain = Decoder(system1)
    plain.decode(batch, max_new_tokens=new, eos=[])
    # The last token of a sequence is never an input.
    assert plain.counts["system1_tokens"] == sum(map(len, batch)) + 9 * (new - 1)
    guided = Decoder(system1, Guidance(verifier=verifier, alpha=0.02, lazy=False))
    guided.decode(batch, max_new_tokens=new, eos=[])
    # The verifier computes each prompt once and then all candidates; the chosen one is cached already.
    assert guided.counts["system2_tokens"] == sum(map(len, batch)) + guided.counts["candidates"]
    lazy = Decoder(system1, Guidance(verifier=verifier, alpha=0.5))
    lazy.decode(batch, max_new_tokens=new, eos=[], batch_size=1)
    assert 0 < lazy.counts["system2_forwards"] < lazy.counts["system1_forwards"]


def test_a_trace_records_how_each_token_was_chosen(system1, verifier):
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=3.0)
    batch = prompts(4)
    for guided, plain in zip(
        decode(system1, batch, max_new_tokens=12, eos=EOS, guidance=guidance, trace=True),
        decode(system1, batch, max_new_tokens=12, eos=EOS),
        strict=True,
    ):
        (row,), plain_ids = guided, plain[0].token_ids
        first = next((i for i, choice in enumerate(row.trace) if choice.changed), len(row.token_ids))
        assert row.token_ids[:first] == plain_ids[:first]
        assert row.token_ids[: first + 1] != plain_ids[: first + 1]
        assert [choice.candidates[choice.chosen] for choice in row.trace] == row.token_ids
        assert all((choice.scores is None) == (len(choice.candidates) == 1) for choice in row.trace)
        assert all(choice.logprobs == sorted(choice.logprobs, reverse=True) for choice in row.trace)
    ids = list(batch[3])
    for choice in row.trace:
        with torch.inference_mode():
            logprobs = system1(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[choice.candidates]
        torch.testing.assert_close(torch.tensor(choice.logprobs), logprobs, atol=1e-4, rtol=0)
        if choice.scores is not None:
            expected = [score(verifier, [*ids, token]) for token in choice.candidates]
            torch.testing.assert_close(torch.tensor(choice.scores), torch.tensor(expected), atol=1e-4, rtol=0)
        ids.append(choice.candidates[choice.chosen])


def test_a_trace_takes_no_transfer_of_its_own_from_the_device(system1, verifier):
    """But for one of a few numbers, on the CPU already, where the verifier is run: the choice without it."""
    counts = {}
    for trace in (False, True):
        decoder = Decoder(system1, Guidance(verifier=verifier, alpha=0.02, beta=3.0))
        with HostReads(torch.device("cpu")) as reads:
            decoder.decode(prompts(9), max_new_tokens=16, eos=[], trace=trace)
        counts[trace] = reads.count
    assert counts[True] == counts[False] + decoder.counts["system2_forwards"] > 16


def test_prompts_are_read_in_groups_where_batches_are_padded(system1, monkeypatch):
    """A free slot waits until one in eight is free, or nothing is left that would fill it."""
    use_padded_batches(monkeypatch)
    admitted, admit = [], scheduler.Scheduler.admit

    def watched(self):
        before = len(self.running)
        admit(self)
        admitted.append(len(self.running) - before)

    monkeypatch.setattr(scheduler.Scheduler, "admit", watched)
    batch = prompts(60)
    options = {"eos": range(0, VOCABULARY, 8), "max_new_tokens": 24, "batch_size": 24}
    padded = greedy(system1, batch, **{key: value for key, value in options.items() if key != "eos"})
    groups = [count for count in admitted if count]
    assert groups[0] == 24 and all(count >= 3 for count in groups[1:-1]) and sum(groups) == 60
    monkeypatch.undo()
    assert padded == greedy(system1, batch, max_new_tokens=24, batch_size=24)


def test_stop_process_logits_and_on_token_act_on_each_sequence(system1):
    batch, seen = prompts(3), []

    def never_twice(indices, new, logits):
        last = torch.tensor([[*batch[index], *tokens][-1] for index, tokens in zip(indices, new, strict=True)])
        return logits.scatter(-1, last[:, None], -torch.inf)

    written = decode(
        system1,
        batch,
        max_new_tokens=9,
        eos=EOS,
        stop=lambda prompt, sample, new: len(new) == prompt + 1,
        process_logits=never_twice,
        on_token=lambda prompt, sample, token: seen.append((prompt, token)),
    )
    assert [len(row.token_ids) for (row,) in written] == [1, 2, 3]
    assert all(row.token_ids == [token for prompt, token in seen if prompt == i] for i, (row,) in enumerate(written))
    for prompt, (row,) in zip(batch, written, strict=True):
        ids = [*prompt, *row.token_ids]
        assert all(a != b for a, b in zip(ids[len(prompt) - 1 :], ids[len(prompt) :], strict=False))


def test_attention_never_runs_in_cudnn(system1, monkeypatch):
    """cuDNN, which torch prefers on Hopper, plans anew for each new shape."""
    enabled, dot_product = [], attention.scaled_dot_product_attention

    def watched(*arguments, **options):
        enabled.append((cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.flash_sdp_enabled()))
        return dot_product(*arguments, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    on_gpu = model_runner.attention_kernels
    monkeypatch.setattr(model_runner, "attention_kernels", lambda device: on_gpu(torch.device("cuda")))
    decode(system1, prompts(3), max_new_tokens=3, eos=EOS)
    assert set(enabled) == {(False, True, True)} and cuda.cudnn_sdp_enabled(), "restored behind the forward"


def test_a_model_without_pluggable_attention_is_refused(system1):
    class Old(type(system1.base_model)):
        _supports_attention_backend = False

    with pytest.raises(UserError, match="Old does not let its attention be replaced"):
        ModelRunner(Old(system1.config))


def test_decoding_leaves_the_model_as_it_was(system1, verifier):
    before = system1.config._attn_implementation
    weights = {name: parameter.data_ptr() for name, parameter in system1.base_model.named_parameters()}
    decoder = Decoder(system1, Guidance(verifier=verifier))
    assert system1.config._attn_implementation == before
    shared = dict(decoder.state.lm.body.named_parameters())
    assert all(
        shared[name.removeprefix("model.")].data_ptr() == at for name, at in weights.items() if "lm_head" not in name
    )


def test_guidance_changes_the_tokens(system1, verifier):
    """Otherwise the tests above would pass with a verifier that never runs."""
    batch = prompts(7)
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=3.0)
    plain = decode(system1, batch, max_new_tokens=16, eos=EOS)
    guided = decode(system1, batch, max_new_tokens=16, eos=EOS, guidance=guidance)
    assert sum(a[0].token_ids != b[0].token_ids for a, b in zip(plain, guided, strict=True)) >= 5
    assert all(row.num_verifier_calls == 0 for (row,) in plain)
    assert all(0 < row.num_verifier_calls <= len(row.token_ids) for (row,) in guided)


@pytest.mark.long
def test_results_do_not_depend_on_the_schedule(system1, verifier):
    batch = prompts(33)
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=2.0)
    options = {"max_new_tokens": 24, "guidance": guidance, "eos": range(0, VOCABULARY, 8)}
    alone = [decode(system1, [prompt], **options)[0] for prompt in batch]
    assert len({len(row.token_ids) for (row,) in alone}) > 5, "all end together: no slot is reused"
    for batch_size in (1, 5, 33):
        assert decode(system1, batch, batch_size=batch_size, **options) == alone


def test_completions_are_yielded_as_they_finish(system1):
    options = {"max_new_tokens": 24, "eos": range(0, VOCABULARY, 8)}
    lengths = [len(row.token_ids) for (row,) in decode(system1, prompts(12), **options)]
    order = [index for index, _ in Decoder(system1).stream(prompts(12), batch_size=12, **options)]
    assert sorted(order) == list(range(12)) and [lengths[i] for i in order] == sorted(lengths)
    assert len(set(lengths)) > 3


@pytest.mark.one_in(3)
@pytest.mark.parametrize("in_place", [0, 400])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sampling", [None, SamplingParams()])
def test_prompts_that_join_while_others_run_are_written_as_alone(
    system1, verifier, monkeypatch, in_place, padded, sampling
):
    """Prompts along one text, each longer than the last ones, and one that no cache has room for yet."""
    monkeypatch.setattr(scheduler, "MIN_IN_PLACE_TOKENS", in_place)
    if padded:
        use_padded_batches(monkeypatch)
    text = [token for prompt in prompts(60) for token in prompt]
    joining = [[text[:20], [*text[:19], 5]], [text[:24]], [text[:90]], [[*text[:88], 4], text[:25]], [text[:120]], []]
    seeds = {tuple(prompt): [7 * len(prompt), 3] for batch in joining for prompt in batch}
    options = {"max_new_tokens": 12, "eos": range(0, VOCABULARY, 8), "sampling": sampling}
    decoder, waiting, found = Decoder(system1, Guidance(verifier=verifier, alpha=0.02, beta=2.0)), joining[:], {}

    def further():
        new = waiting.pop(0) if waiting and len(found) >= len(joining) - len(waiting) - 1 else []
        return [(prompt, seeds[tuple(prompt)], "") for prompt in new]

    for index, completions in decoder.stream([], seeds=[], batch_size=3, further=further, **options):
        found[index] = [row.token_ids for row in completions]
    together = decoder.counts["system1_tokens"]
    for index, prompt in enumerate(prompt for batch in joining for prompt in batch):
        (rows,) = decoder.decode([prompt], seeds=[seeds[tuple(prompt)]], **options)
        assert found.pop(index) == [row.token_ids for row in rows]
    assert not found and together < decoder.counts["system1_tokens"] - together, "no prefix was continued"


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
    options = {"max_new_tokens": 12, "eos": EOS, "guidance": guidance, "sampling": SamplingParams(temperature=0.7)}
    settings = {"verifier": verifier, "alpha": 0.05, "beta": 1.0} if guided else {}
    expected = [
        [decode_one(system1, p, max_new_tokens=12, eos=EOS, seed=s, temperature=0.7, **settings) for s in prompt_seeds]
        for p, prompt_seeds in zip(batch, seeds, strict=True)
    ]
    for batch_size in (4, 6, 64):
        completions = decode(system1, batch, seeds=seeds, batch_size=batch_size, **options)
        assert [[sample.token_ids for sample in samples] for samples in completions] == expected
    assert len({tuple(tokens) for tokens in expected[2]}) > 1, "samples of a prompt must differ"


@pytest.mark.parametrize("layout", ["varlen", "padded", "graphs"])
@pytest.mark.parametrize("in_place", [0, 10**6])
def test_samples_that_have_written_the_same_share_a_row_and_are_those_of_each_alone(
    system1, layout, in_place, monkeypatch
):
    if layout == "padded":
        use_padded_batches(monkeypatch)
    monkeypatch.setattr(scheduler, "MIN_IN_PLACE_TOKENS", in_place)
    batch = [*prompts(4), [3 + i % 50 for i in range(40)]]  # the last one's prefix is in a slot of its own
    seeds = [[100 * prompt + sample for sample in range(12)] for prompt in range(len(batch))]
    options = {"max_new_tokens": 14, "eos": range(0, 64, 9), "sampling": SamplingParams(temperature=0.15)}
    alone = Decoder(system1)
    expected = [
        [alone.decode([prompt], seeds=[[seed]], **options)[0][0].token_ids for seed in row]
        for prompt, row in zip(batch, seeds, strict=True)
    ]
    for batch_size in (3, 16, 64):
        decoder = Decoder(system1, graphs=layout == "graphs")
        found = decoder.decode(batch, seeds=seeds, batch_size=batch_size, trace=True, **options)
        assert [[row.token_ids for row in rows] for rows in found] == expected
        assert all(len(row.trace) == len(row.token_ids) for rows in found for row in rows)
    prefixes = [{tuple(row[:end]) for row in rows for end in range(1, len(row))} for rows in expected]
    distinct, written = sum(map(len, prefixes)), sum(len(row) - 1 for rows in expected for row in rows)
    assert decoder.counts["system1_tokens"] == sum(map(len, batch)) + distinct
    assert distinct < written / 1.5

    def stop(prompt: int, sample: int, ids: list[int]) -> bool:
        return len(ids) > sample

    cut = decoder.decode(batch, seeds=seeds, stop=stop, **options)
    assert [[row.token_ids for row in rows] for rows in cut] == [
        [row[: sample + 1] for sample, row in enumerate(rows)] for rows in expected
    ]


def test_sampling_follows_the_distribution(system1):
    """Frequencies of the first token over 4,000 seeds against System 1's probabilities, by a chi-square test."""
    prompt, n = [5, 9, 3], 4_000
    (rows,) = decode(
        system1, [prompt], max_new_tokens=1, eos=EOS, sampling=SamplingParams(), seeds=[[7919 * i for i in range(n)]]
    )
    counts = torch.bincount(torch.tensor([row.token_ids[0] for row in rows]), minlength=VOCABULARY).double()
    with torch.inference_mode():
        expected = system1(torch.tensor([prompt])).logits[0, -1].double().softmax(-1) * n
    common = expected >= 5  # the usual condition of the test; the rest is one class
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 0.001


def test_sampling_without_seeds_is_refused(system1):
    with pytest.raises(ValueError, match="sampling needs seeds"):
        decode(system1, [[3]], max_new_tokens=2, eos=EOS, sampling=SamplingParams())


def test_an_alpha_beta_or_top_k_out_of_range_is_refused(verifier):
    for wrong in ({"alpha": 1.5}, {"beta": -1.0}, {"top_k": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Guidance(verifier=verifier, **wrong)


def test_a_misspelt_option_is_refused(system1, verifier):
    with pytest.raises(TypeError, match="'alhpa'"):
        Guidance(verifier=verifier, alhpa=0.1)
    with pytest.raises(TypeError, match="'max_tokens'"):
        decode(system1, [[3]], max_tokens=2, eos=EOS)


def test_no_prompts_give_no_completions(system1):
    assert decode(system1, [], max_new_tokens=2, eos=EOS) == []


def test_another_system1_writes_other_tokens(system1):
    assert greedy(system1, prompts(3), max_new_tokens=8) != greedy(tiny_system1(7), prompts(3), max_new_tokens=8)


def test_an_empty_prompt_and_a_length_below_one_are_refused(system1):
    with pytest.raises(UserError, match="prompt 0: found no tokens, expected at least one"):
        Decoder(system1).decode([[], [9, 10]], max_new_tokens=3, eos=[])
    with pytest.raises(ValueError, match="max_new_tokens: found 0, expected at least 1"):
        Decoder(system1).decode([[9, 10]], max_new_tokens=0, eos=[])
