"""A System 2 that is only a head on System 1's states: exact to its slow twin, small on disk, of one System 1 alone."""

import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_system1
from reference import decode_one
from test_collate import examples
from test_train import write_triplets

from llm2.common.loading import load_system1, load_tokenizer
from llm2.config import TrainConfig
from llm2.decoding.decoder import Decoder
from llm2.decoding.llm2 import LLM2
from llm2.decoding.logits_processor import GuidedLogitsProcessor
from llm2.decoding.sampling import Guidance, SamplingParams
from llm2.errors import UserError
from llm2.verifier.collate import verifier_batch
from llm2.verifier.heads import fingerprint
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.train import train

HEADS = [{"kind": "bilinear", "size": 4}, {"kind": "mlp", "size": 16}]


def prefix_verifier(folder: Path, system1, head) -> ProcessVerifier:
    """On the weights of `system1`, with scores large enough to change choices."""
    system1.save_pretrained(folder)
    torch.manual_seed(3)
    verifier = ProcessVerifier.from_system1(str(folder), prefix_head=head, local_files_only=True).eval()
    with torch.no_grad():
        for weight in verifier.score.parameters():
            weight.mul_(2.0)
    return verifier


@pytest.fixture(params=HEADS, ids=lambda head: head["kind"])
def pair(request, tmp_path, system1):
    return system1, prefix_verifier(tmp_path / "system1", system1, request.param)


@torch.inference_mode()
def test_a_score_is_the_heads_of_the_prefix_state_and_the_tokens_embedding(pair):
    system1, verifier = pair
    ids = torch.randint(3, VOCABULARY, (1, 9))
    scores = verifier(ids).scores[0]
    embedding = system1.get_input_embeddings()
    for position in range(1, 9):
        state = system1.model(ids[:, :position]).last_hidden_state[0, -1]
        expected = verifier.score(state[None], embedding(ids[0, position])[None])
        assert scores[position].item() == pytest.approx(expected.item(), abs=1e-4)


@torch.inference_mode()
def test_packed_pairs_have_the_margins_of_each_pair_alone(pair):
    _, verifier = pair
    solutions = examples(4)
    batch = verifier_batch(solutions, capacity=200)
    inputs = {name: getattr(batch, name) for name in ("input_ids", "start", "prefix_len", "pair_indices")}
    margins = verifier(**inputs).margins[0].tolist()
    expected = []
    for example in solutions:
        for position, gold, negative in example.triplets:
            prefix = example.ids[:position]
            gold, negative = (verifier(torch.tensor([[*prefix, v]])).scores[0, -1].item() for v in (gold, negative))
            expected.append(gold - negative)
    assert margins == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("graphs", [False, True])
def test_guided_greedy_equals_the_uncached_reference_without_any_verifier_forward(pair, batch_size, graphs):
    system1, verifier = pair
    prompts = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in (5, 9, 2, 7, 5, 12)]
    options = {"alpha": 0.05, "beta": 1.0}
    decoder = Decoder(system1, Guidance(verifier=verifier, **options), graphs=graphs)
    written = decoder.decode(prompts, max_new_tokens=10, eos=[1], batch_size=batch_size)
    expected = [decode_one(system1, p, max_new_tokens=10, eos=[1], verifier=verifier, **options) for p in prompts]
    assert [completion.token_ids for (completion,) in written] == expected
    plain = Decoder(system1).decode(prompts, max_new_tokens=10, eos=[1])
    assert [completion.token_ids for (completion,) in plain] != expected, "the head must change some choice"
    assert decoder.counts["system2_forwards"] == 0
    assert all(completion.num_verifier_calls == 0 for (completion,) in written)


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


def test_a_logits_processor_refuses_a_prefix_head(pair):
    with pytest.raises(ValueError, match="does not see"):
        GuidedLogitsProcessor(Guidance(verifier=pair[1]))


def train_config(model: str, folder: Path, **changes) -> TrainConfig:
    files = {"train_file": str(folder / "triplets.jsonl"), "output_dir": str(folder / "verifier")}
    sizes = {"global_batch_size": 8, "per_device_train_batch_size": 4, "eval_share": 0.2}
    return TrainConfig(**{"model": model, "device": "cpu", **files, **sizes, **changes})


@pytest.fixture(scope="module")
def trained(system1_folder, tmp_path_factory) -> tuple[TrainConfig, dict]:
    folder = tmp_path_factory.mktemp("head")
    write_triplets(folder / "triplets.jsonl", load_tokenizer(system1_folder), 24)
    changes = {"prefix_head": "bilinear", "prefix_head_size": 4, "learning_rate": 1e-2, "num_train_epochs": 6.0}
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


def test_a_head_takes_no_adapter_and_no_lm_loss(trained, tmp_path):
    config, _ = trained
    for changes in ({"lora_r": 4}, {"lm_loss_coef": 0.1}):
        with pytest.raises(UserError, match="prefix_head: a head on frozen states"):
            train(train_config(config.model, tmp_path, **changes, prefix_head="mlp", train_file=config.train_file))
