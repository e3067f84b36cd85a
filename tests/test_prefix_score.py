"""A System 2 that is only a head on System 1's states: exact to its slow twin, small on disk, of one System 1 alone."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_system1
from reference import decode_one
from safetensors.torch import load_file
from test_collate import examples, model_inputs
from test_families import small_models, verifier_of
from test_train import write_triplets
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
)

from llm2.common.loading import load_language_model, load_system1, load_tokenizer
from llm2.config import TrainConfig, VerifierSpec
from llm2.decoding.decoder import Decoder
from llm2.decoding.llm2 import LLM2
from llm2.decoding.logits_processor import GuidedLogitsProcessor
from llm2.decoding.output_layer import guided_model
from llm2.decoding.sampling import Guidance, SamplingParams
from llm2.errors import UserError
from llm2.verifier.collate import verifier_batch
from llm2.verifier.frozen_states import FrozenStates, frozen_batch
from llm2.verifier.heads import fingerprint
from llm2.verifier.load import load_verifier, trained_beta
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.train import train
from llm2.verifier.triplets import Example, Triplet

HEADS = {
    "bilinear": VerifierSpec(kind="bilinear", prefix_head_size=4),
    "mlp": VerifierSpec(kind="mlp", prefix_head_size=16),
    "weighted mlp": VerifierSpec(kind="mlp", prefix_head_size=16, token_weight=True),
}
LAYERS = {
    "layers": VerifierSpec(kind="prefix"),
    "weighted tied layers": VerifierSpec(kind="prefix", token_weight=True),
    "lora": VerifierSpec(kind="prefix_lora", lora_r=4),
    "weighted lora": VerifierSpec(kind="prefix_lora", lora_r=4, token_weight=True),
    "tied lora": VerifierSpec(kind="prefix_lora", lora_r=4),
}
KINDS = HEADS | LAYERS


def prefix_verifier(folder: Path, system1, kind: str) -> ProcessVerifier:
    """Of the weights of `system1`, with scores large enough to change choices."""
    system1.save_pretrained(folder)
    torch.manual_seed(3)
    verifier = ProcessVerifier.from_system1(str(folder), KINDS[kind], local_files_only=True).eval()
    with torch.no_grad():
        for weight in verifier.parameters():
            if weight.requires_grad:
                weight.mul_(2.0).add_(torch.randn_like(weight), alpha=0.02)
    return verifier


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    system1 = tiny_system1(tie_word_embeddings="tied" in request.param)
    return system1, prefix_verifier(tmp_path / "system1", system1, request.param)


@pytest.fixture(params=HEADS)
def head_pair(request, tmp_path, system1):
    return system1, prefix_verifier(tmp_path / "system1", system1, request.param)


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3_text", "granite"])
@torch.inference_mode()
def test_a_head_reads_embeddings_of_rms_1_where_a_model_scales_them_too(family, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **sizes)
    verifier = prefix_verifier(tmp_path, AutoModelForCausalLM.from_config(config), "mlp")
    read = []
    verifier.score.layers.register_forward_pre_hook(lambda layers, inputs: read.append(inputs[0][..., 64:]))
    verifier.prefix_scores(torch.zeros(1, 64), torch.arange(3, VOCABULARY)[None])
    assert read[0].square().mean().sqrt().item() == pytest.approx(1.0, abs=0.1)


def test_a_saved_head_keeps_the_scale_that_it_was_trained_with(system1, tmp_path):
    """Earlier versions divided Gemma's embeddings by another one."""
    verifier = prefix_verifier(tmp_path / "system1", system1, "bilinear")
    verifier.score.scale.mul_(25)
    verifier.save_pretrained(tmp_path / "verifier")
    assert torch.equal(ProcessVerifier.from_pretrained(tmp_path / "verifier").score.scale, verifier.score.scale)


@torch.inference_mode()
def test_a_score_is_the_heads_of_the_prefix_state_and_the_tokens_embedding(head_pair):
    system1, verifier = head_pair
    ids = torch.randint(3, VOCABULARY, (1, 9))
    scores = verifier(ids).scores[0]
    embedding = system1.get_input_embeddings()
    for position in range(1, 9):
        state = system1.model(ids[:, :position]).last_hidden_state[0, -1]
        expected = verifier.score(state[None], embedding(ids[0, position])[None])
        assert scores[position].item() == pytest.approx(expected.item(), abs=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("kind", ["prefix", "prefix_lora"])
def test_the_scores_of_a_new_verifier_with_layers_are_system1s_own_logits(kind, tied, tmp_path):
    system1 = tiny_system1(tie_word_embeddings=tied)
    system1.save_pretrained(tmp_path)
    verifier = ProcessVerifier.from_system1(str(tmp_path), VerifierSpec(kind=kind)).eval()
    ids = torch.randint(3, VOCABULARY, (1, 9))
    expected = system1(ids).logits[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(verifier(ids).scores[0, 1:], expected)


@torch.inference_mode()
def test_packed_pairs_have_the_margins_of_each_pair_alone(pair):
    _, verifier = pair
    solutions = examples(4)
    batch = verifier_batch(solutions, branches=False, capacity=200)
    margins = verifier(**model_inputs(batch)).margins[0].tolist()
    expected = []
    for example in solutions:
        for position, gold, negative in example.triplets:
            prefix = example.ids[:position]
            gold, negative = (verifier(torch.tensor([[*prefix, v]])).scores[0, -1].item() for v in (gold, negative))
            expected.append(gold - negative)
    assert margins == pytest.approx(expected, abs=1e-4)


def test_the_backbone_does_not_read_candidates(pair):
    """Nor what stands behind the last pair's prefix."""
    example = Example([5, 6, 7, 4, 8], [Triplet(2, 7, 9), Triplet(3, 4, 9)])
    assert verifier_batch([example], branches=False).input_ids.tolist() == [[5, 6, 7]]


@torch.inference_mode()
def test_frozen_states_give_the_margins_of_a_forward(head_pair):
    _, verifier = head_pair
    solutions = examples(7)
    frozen = FrozenStates(verifier, solutions, batch_size=3)
    whole = verifier_batch(solutions, branches=False)
    expected = verifier(**model_inputs(whole)).margins
    batch = frozen_batch([frozen.empty, *frozen])
    found = verifier(states=batch.states, pair_indices=batch.pair_indices, pair_tokens=batch.pair_tokens).margins
    torch.testing.assert_close(found, expected)
    for name in ("pair_tokens", "pair_ids", "pair_weights", "pair_targets"):
        assert torch.equal(getattr(batch, name), getattr(whole, name))
    assert len(batch.states) < batch.pair_tokens.shape[1], "a prefix is kept once"
    half = frozen_batch([*FrozenStates(deepcopy(verifier).to(torch.bfloat16), solutions, batch_size=3)]).states
    assert not torch.equal(half, batch.states), "the states are of the weights' precision"
    torch.testing.assert_close(half, batch.states, atol=0.05, rtol=0.05)


@pytest.mark.one_in(10)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("graphs", [False, True])
def test_guided_greedy_equals_the_uncached_reference(pair, batch_size, graphs):
    system1, verifier = pair
    prompts = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in (5, 9, 2, 7, 5, 12)]
    options = {"alpha": 0.05, "beta": 1.0}
    decoder = Decoder(system1, Guidance(verifier=verifier, **options), graphs=graphs)
    written = decoder.decode(prompts, max_new_tokens=10, eos=[1], batch_size=batch_size)
    expected = [decode_one(system1, p, max_new_tokens=10, eos=[1], verifier=verifier, **options) for p in prompts]
    assert [completion.token_ids for (completion,) in written] == expected
    plain = Decoder(system1).decode(prompts, max_new_tokens=10, eos=[1])
    assert [completion.token_ids for (completion,) in plain] != expected, "the head must change some choice"
    calls = sum(completion.num_verifier_calls for (completion,) in written)
    if verifier.config.is_head:
        assert decoder.counts["system2_forwards"] == calls == 0
    else:  # every token is read at most once
        length = sum(map(len, prompts)) + sum(len(completion.token_ids) for (completion,) in written)
        assert calls > 0 and 0 < decoder.counts["system2_tokens"] < length


@pytest.mark.one_in(5)
def test_guided_sampling_equals_the_uncached_reference(pair):
    system1, verifier = pair
    prompts = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in (5, 9, 7)]
    seeds = [[prompt * 10 + sample for sample in range(4)] for prompt in range(3)]
    decoder = Decoder(system1, Guidance(verifier=verifier, alpha=0.05, beta=1.0))
    written = decoder.decode(prompts, max_new_tokens=8, eos=[1], sampling=SamplingParams(temperature=0.8), seeds=seeds)
    options = {"max_new_tokens": 8, "eos": [1], "verifier": verifier, "alpha": 0.05, "beta": 1.0, "temperature": 0.8}
    expected = [
        [decode_one(system1, p, seed=seed, **options) for seed in s] for p, s in zip(prompts, seeds, strict=True)
    ]
    assert [[completion.token_ids for completion in samples] for samples in written] == expected
    distinct = sum(len({tuple(row[:end]) for row in rows for end in range(1, len(row))}) for rows in expected)
    rows = distinct if verifier.config.is_head else sum(len(row) - 1 for rows in expected for row in rows)
    assert decoder.counts["system1_tokens"] >= sum(map(len, prompts)) + rows
    if verifier.config.is_head:
        assert decoder.counts["system1_tokens"] == sum(map(len, prompts)) + rows, "a head's samples share rows"


def test_a_logits_processor_takes_layers_and_refuses_a_head(pair):
    system1, verifier = pair
    if verifier.config.is_head:
        with pytest.raises(ValueError, match="does not see"):
            GuidedLogitsProcessor(Guidance(verifier=verifier))
        return
    guidance = Guidance(verifier=verifier, alpha=0.05, beta=1.0)
    prompts = torch.randint(3, VOCABULARY, (3, 7))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
    processor = GuidedLogitsProcessor(guidance, attention_mask=torch.ones_like(prompts))
    generated = system1.generate(prompts, logits_processor=[processor], **options)[:, 7:]
    decoded = Decoder(system1, guidance).decode(prompts.tolist(), max_new_tokens=8, eos=[1])
    for row, (completion,) in zip(generated.tolist(), decoded, strict=True):
        assert row[: len(completion.token_ids)] == completion.token_ids


class RecomputedGuidance(LogitsProcessor):
    """The slow twin: System 1 reads each row anew."""

    def __init__(self, system1, guidance: Guidance) -> None:
        self.system1, self.guidance = system1, guidance

    def __call__(self, input_ids, scores):
        guided = torch.full_like(scores, -torch.inf)
        embedding = self.system1.get_input_embeddings()
        for row, ids in enumerate(input_ids):
            state = self.system1.model(ids[None]).last_hidden_state[0, -1]
            logits = self.system1.lm_head(state)
            kept = (logits.softmax(-1) >= self.guidance.alpha * logits.softmax(-1).max()).nonzero()[:, 0]
            guided[row, kept] = logits[kept] + self.guidance.beta * self.guidance.verifier.score(state, embedding(kept))
        return guided


@pytest.mark.one_in(4)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generate_is_guided_through_the_output_layer_alone(head_pair, options):
    system1, verifier = head_pair
    guidance = Guidance(verifier=verifier, alpha=0.05, beta=1.0)
    prompts = torch.randint(3, VOCABULARY, (3, 7))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1, "pad_token_id": 2, **options}
    guided = guided_model(system1, guidance).generate(prompts, **options)
    # Beam search takes the log-softmax before the processors, the output layer acts before it.
    processors = [RecomputedGuidance(system1, guidance), LogitNormalization()]
    twin = system1.generate(prompts, logits_processor=LogitsProcessorList(processors), **options)
    assert torch.equal(guided, twin)
    assert not torch.equal(guided, system1.generate(prompts, **options)), "the head must change some choice"


@pytest.mark.one_in(3)
def test_continuous_batching_is_guided_through_the_output_layer(head_pair):
    system1, verifier = head_pair
    guidance = Guidance(verifier=verifier, alpha=0.05, beta=1.0)
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=2)
    prompts = torch.randint(3, VOCABULARY, (3, 7)).tolist()
    cache = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    options = {"generation_config": config, "continuous_batching_config": cache}
    found = guided_model(system1, guidance).generate_batch(prompts, **options)
    plain = system1.generate_batch(prompts, **options)
    decoded = Decoder(system1, guidance).decode(prompts, max_new_tokens=8, eos=[1])
    expected = [completion.token_ids for (completion,) in decoded]
    assert [output.generated_tokens for output in found.values()] == expected
    assert [output.generated_tokens for output in plain.values()] != expected


def test_the_output_layer_takes_prefix_heads_of_plain_models_only(pair):
    system1, verifier = pair
    if not verifier.config.is_head:
        with pytest.raises(ValueError, match="expected a prefix head"):
            guided_model(system1, Guidance(verifier=verifier))
    else:
        system1.config.final_logit_softcapping = 30.0
        with pytest.raises(ValueError, match="final_logit_softcapping changes"):
            guided_model(system1, Guidance(verifier=verifier))


def test_the_output_layer_takes_no_model_that_changes_its_states_before():
    (system1,) = small_models("modernbert-decoder")
    verifier = verifier_of(system1, kind="mlp", prefix_head_size=4)
    with pytest.raises(ValueError, match="ModernBertDecoderForCausalLM changes the states before its output layer"):
        guided_model(system1, Guidance(verifier=verifier))


def train_config(model: str, folder: Path, **changes) -> TrainConfig:
    files = {"train_file": str(folder / "triplets.jsonl"), "output_dir": str(folder / "verifier")}
    sizes = {"global_batch_size": 8, "per_device_train_batch_size": 4, "eval_share": 0.2}
    return TrainConfig(**{"model": model, "device": "cpu", **files, **sizes, **changes})


@pytest.fixture(scope="module")
def trained(system1_folder, tmp_path_factory) -> tuple[TrainConfig, dict]:
    folder = tmp_path_factory.mktemp("head")
    write_triplets(folder / "triplets.jsonl", load_tokenizer(system1_folder), 24)
    changes = {
        "kind": "bilinear",
        "prefix_head_size": 4,
        "learning_rate": 1e-2,
        "num_train_epochs": 6.0,
    }
    config = train_config(system1_folder, folder, **changes)
    return config, train(config)


def test_training_learns_and_saves_the_head_alone(trained):
    config, metrics = trained
    folder = Path(config.output_dir)
    assert metrics["eval_pair_accuracy"] > 0.9
    assert (folder / "model.safetensors").stat().st_size < 20_000
    saved = json.loads((folder / "config.json").read_text())
    assert saved["prefix_head"] == {"kind": "bilinear", "size": 4} and saved["system1_fingerprint"]


def test_a_saved_head_loads_on_system1s_own_parameters_and_scores_the_same(trained, system1_folder):
    config, _ = trained
    llm2 = LLM2.from_pretrained(system1_folder, config.output_dir, device="cpu")
    verifier = llm2.guidance.verifier
    assert verifier.backbone.get_input_embeddings().weight is llm2.system1.get_input_embeddings().weight
    alone = ProcessVerifier.from_pretrained(config.output_dir)
    ids = torch.randint(3, 100, (1, 12))
    with torch.inference_mode():
        assert torch.equal(alone(ids).scores, verifier(ids).scores)


def test_a_token_weight_is_a_factor_of_all_scores_after_a_prefix(pair):
    _, verifier = pair
    weight = verifier.score.token_weight if verifier.config.is_head else verifier.token_weight
    if weight is None:
        pytest.skip("without a weight")
    states, tokens = torch.randn(5, 32), torch.randint(3, VOCABULARY, (5, 7))
    with torch.inference_mode():
        found, factor = verifier.prefix_scores(states, tokens), weight(states)
        weight.weight.zero_(), weight.bias.fill_(-1e4)
        off = verifier.prefix_scores(states, tokens)
        weight.bias.fill_(0.541324854612918)  # softplus of it is 1
        torch.testing.assert_close(
            found, factor[:, None] * verifier.prefix_scores(states, tokens), atol=1e-5, rtol=1e-5
        )
    assert (factor > 0).all() and factor.std() > 1e-3 and not off.any()


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "prefix"},
        {"kind": "prefix_lora", "lora_r": 4, "learning_rate": 1e-2},
        {"kind": "prefix", "token_weight": True, "guided_beta": 1.0},
        {"kind": "prefix_lora", "lora_r": 4, "learning_rate": 1e-2, "token_weight": True},
    ],
    ids=["layers", "lora", "weighted", "weighted lora"],
)
def test_training_with_all_layers_learns_and_loads(changes, system1_folder, tmp_path):
    write_triplets(tmp_path / "triplets.jsonl", load_tokenizer(system1_folder), 24)
    changes = {"learning_rate": 3e-3, "num_train_epochs": 6.0, **changes}
    config = train_config(system1_folder, tmp_path, **changes)
    metrics = train(config)
    assert metrics["eval_pair_accuracy"] > 0.9
    llm2 = LLM2.from_pretrained(system1_folder, config.output_dir, device="cpu")
    alone = ProcessVerifier.from_pretrained(config.output_dir)
    ids = torch.randint(3, 100, (1, 12))
    with torch.inference_mode():
        assert torch.equal(alone(ids).scores, llm2.guidance.verifier(ids).scores)
        new = ProcessVerifier.from_system1(system1_folder, VerifierSpec(kind="prefix"))
        assert not torch.allclose(alone(ids).scores, new(ids).scores)
    saved = load_file(next(Path(config.output_dir).glob("*.safetensors")))
    assert any("score" in name for name in saved) != config.is_adapter, "an adapter leaves the embedding as it is"
    moved = [tensor for name, tensor in saved.items() if "token_weight.weight" in name]
    assert len(moved) == config.token_weight and all(tensor.any() for tensor in moved)


def test_an_untied_output_embedding_is_trained_and_saved(tmp_path):
    tiny_system1().save_pretrained(tmp_path / "system1")
    verifier = ProcessVerifier.from_system1(str(tmp_path / "system1"), VerifierSpec(kind="prefix")).eval()
    with torch.no_grad():
        verifier.score.weight.mul_(2)
    verifier.save_pretrained(tmp_path / "verifier")
    ids = torch.randint(3, VOCABULARY, (1, 12))
    with torch.inference_mode():
        assert torch.equal(ProcessVerifier.from_pretrained(tmp_path / "verifier")(ids).scores, verifier(ids).scores)


def test_only_the_highest_layers_are_trained(system1_folder, tmp_path):
    write_triplets(tmp_path / "triplets.jsonl", load_tokenizer(system1_folder), 24)
    config = train_config(system1_folder, tmp_path, trainable_layers=1, learning_rate=1e-2)
    train(config)
    before = load_system1(system1_folder, torch.device("cpu")).state_dict()
    after = ProcessVerifier.from_pretrained(config.output_dir).backbone.state_dict()
    changed = {name.split(".")[1] for name in after if not torch.equal(after[name], before[f"model.{name}"])}
    assert changed == {str(len(load_system1(system1_folder, torch.device("cpu")).model.layers) - 1)}


def test_the_first_folders_of_prefix_heads_load_though_they_do_not_name_their_score(trained, tmp_path):
    config, _ = trained
    shutil.copytree(config.output_dir, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoint-*"))
    saved = json.loads((tmp_path / "old" / "config.json").read_text())
    assert (saved.pop("score"), saved.pop("beta"), saved.pop("token_weight")) == ("prefix", 0.25, False)
    (tmp_path / "old" / "config.json").write_text(json.dumps(saved))
    ids = torch.randint(3, 100, (1, 12))
    with torch.inference_mode():
        scores = [
            ProcessVerifier.from_pretrained(folder)(ids).scores for folder in (tmp_path / "old", config.output_dir)
        ]
    assert torch.equal(*scores)


def test_beta_null_is_the_one_that_training_chose(trained, tmp_path):
    config, metrics = trained
    assert trained_beta(config.output_dir) == metrics["eval_choice_beta"]
    verifier = ProcessVerifier.from_pretrained(config.output_dir)
    verifier.config.beta = None  # as of a verifier of an earlier version
    verifier.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="beta: null, and the verifier names none"):
        Guidance(verifier=verifier, beta=None)
    with pytest.raises(UserError, match="beta: null, and verifier '.*' names none"):
        trained_beta(str(tmp_path))
    verifier.config.beta = 2.0
    verifier.save_pretrained(tmp_path)
    assert trained_beta(str(tmp_path)) == 2.0
    assert Guidance(verifier=ProcessVerifier.from_pretrained(tmp_path), beta=None).beta == 2.0


def test_a_head_of_another_system1_is_refused(trained, tmp_path):
    config, _ = trained
    other = load_system1(config.model, torch.device("cpu"))
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    other.save_pretrained(tmp_path)
    load_tokenizer(config.model).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="trained on the states of"):
        LLM2.from_pretrained(str(tmp_path), config.output_dir, device="cpu")


def test_a_fingerprint_does_not_depend_on_the_dtype_that_a_model_is_loaded_in():
    stored = tiny_system1().to(torch.bfloat16)
    assert fingerprint(stored.model) == fingerprint(tiny_system1().to(torch.bfloat16).float().model)
    assert fingerprint(stored.model) != fingerprint(tiny_system1(seed=1).model)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", ["bilinear", "lora"])
def test_a_system1_in_float16_is_known_by_its_files(kind, shard, tmp_path):
    """Their values, rounded to float16 and then to bfloat16, are others than those rounded once."""
    system1 = tiny_system1()
    prefix_verifier(tmp_path / "system1", system1, kind).save_pretrained(tmp_path / "verifier")
    system1.save_pretrained(tmp_path / "copy", max_shard_size=shard)
    half = load_language_model(str(tmp_path / "copy"), dtype=torch.float16)
    assert fingerprint(half.model) != fingerprint(system1.model)
    verifier = load_verifier(str(tmp_path / "verifier"), torch.device("cpu"), "auto", VOCABULARY, half)
    assert verifier.dtype == torch.float16 and verifier.config.system1_fingerprint == fingerprint(system1.model)
    tiny_system1(seed=5).save_pretrained(tmp_path / "other")
    other = load_language_model(str(tmp_path / "other"), dtype=torch.float16)
    with pytest.raises(UserError, match="trained on the states of"):
        load_verifier(str(tmp_path / "verifier"), torch.device("cpu"), "auto", VOCABULARY, other)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
def test_a_processor_may_forbid_every_plausible_token_of_the_output_layer(head_pair, options):
    system1, verifier = head_pair
    guided = guided_model(system1, Guidance(verifier=verifier, alpha=1.0, beta=1.0))
    prompt = torch.tensor([[5, 6, 7, 8]])
    logits = system1(prompt).logits[0, -1]
    first, second = logits.topk(2).indices.tolist()
    options = {"max_new_tokens": 1, "suppress_tokens": [first], "eos_token_id": -1, "pad_token_id": 2, **options}
    found = guided.generate(prompt, **options)[0, -1].item()
    assert found == second or (options.get("do_sample") and found != first)
