"""Every decoder-only family of transformers, small and random, decodes as transformers does, or is refused."""

import re
import time
from pathlib import Path

import pytest
import torch
import transformers
from reference import decode_one
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from llm2.common.architecture import _examine, backbone_class, examine, refuse_too_long
from llm2.common.loading import NEWEST_TESTED, load_backbone, load_system1, require_model
from llm2.config import VerifierSpec
from llm2.decoding import scheduler
from llm2.decoding.decoder import Decoder
from llm2.decoding.model_runner import ModelRunner
from llm2.decoding.sampling import Guidance
from llm2.errors import UserError
from llm2.verifier.collate import verifier_batch
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.triplets import Example, Triplet

LAYERS, VOCABULARY, WINDOW = 4, 64, 8
README = Path(__file__).parent.parent / "llm2" / "decoding" / "README.md"
TYPES = [type_ for type_, config in CONFIG_MAPPING.items() if config in MODEL_FOR_CAUSAL_LM_MAPPING]
QUICK = ["llama", "gemma2", "gpt2", "opt", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "modernbert-decoder"]
QUICK += ["lfm2", "mamba", "diffllama", "llama4_text", "bloom"]
EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]

# Keys of configs, whatever the family, by their value in a small model.
KEYS = [
    (
        32,
        """
        hidden_size n_embd d_model embedding_dim intermediate_size ffn_dim ffn_hidden_size n_inner
        intermediate_size_mlp d_inner dff dim_ff dim_model_base lru_width word_embed_proj_dim
        dense_intermediate_size attention_hidden_size decoder_ffn_dim
    """,
    ),
    (
        16,
        """
        moe_intermediate_size shared_expert_intermediate_size router_hidden_size
        shared_intermediate_size expert_ffn_hidden_size global_head_dim
        moe_shared_expert_intermediate_size shared_experts_intermediate_size
    """,
    ),
    (
        4,
        """
        num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads
        num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads time_step_rank
        mamba_num_heads linear_num_value_heads linear_num_heads laurel_rank rotary_dim qk_rope_head_dim
        index_topk
    """,
    ),
    (
        2,
        """
        num_key_value_heads num_kv_heads swa_num_key_value_heads index_n_heads n_shared_experts
        num_experts_per_tok num_experts_per_token moe_topk moe_k linear_num_key_heads
        num_kv_shared_layers zero_expert_num
    """,
    ),
    (
        8,
        """
        head_dim dim_head d_head kv_channels swa_head_dim qk_nope_head_dim v_head_dim kv_lora_rank
        q_lora_rank index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
        mamba_d_state state_size ssm_state_size mamba_head_dim mamba_chunk_size chunk_size
        hidden_size_per_layer_input
    """,
    ),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers"),
    (1, "n_group topk_group num_expert_group n_groups first_k_dense_replace num_dense_layers"),
    (
        VOCABULARY,
        """
        max_position_embeddings n_positions n_ctx max_seq_len vocab_size mamba_d_ssm
        vocab_size_per_layer_input unpadded_vocab_size
    """,
    ),
    (
        WINDOW,
        """
        sliding_window sliding_window_size window_size attention_chunk_size attention_window_size
        keep_window_size
    """,
    ),
]
SIZES = {key: value for value, keys in KEYS for key in keys.split()}
SIZES |= {"local_attention": 2 * WINDOW, "qk_head_dim": 12, "mamba_d_head": 16}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2, "init_std": 0.2}
REQUIRED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
REQUIRED += ("linear_num_key_heads", "linear_num_value_heads", "topk_group", "n_group")  # where a default is None
# What a family asks of its own keys.
OWN = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {"intermediate_size": [32] * LAYERS},
}


def small(config: PreTrainedConfig) -> dict:
    """What to change in a family's default config."""
    values, sizes = config.to_dict(), SIZES
    if "kv_lora_rank" in values:  # latent attention: no groups of heads
        sizes = {**SIZES, "num_key_value_heads": SIZES["num_attention_heads"], "head_dim": SIZES["qk_rope_head_dim"]}
    layers, changes = values.get("num_hidden_layers", getattr(config, "num_hidden_layers", None)), {}
    for key, value in values.items():
        if key in sizes and (isinstance(value, int | float) or key.endswith("token_id") or key in REQUIRED):
            changes[key] = sizes[key]
        elif isinstance(value, list) and len(value) == layers:  # as many of each kind as fit
            kinds = list({repr(kind): kind for kind in value}.values())
            changes[key] = (kinds * LAYERS)[:LAYERS]
    return changes


def small_config(family: str, **changes) -> PreTrainedConfig:
    """Skips families that are no decoders, and those that transformers itself cannot make small."""
    kind = CONFIG_MAPPING[family]
    try:
        default = kind()
        parts = {name: getattr(default, name, None) for name in default.sub_configs}
        parts = {name: type(part)(**small(part)) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
        config = kind(**{**small(default), **parts, **OWN.get(family, {}), **changes})
    except Exception as error:
        pytest.skip(f"no small config: {error}")
    if config.is_encoder_decoder or kind in MODEL_FOR_MASKED_LM_MAPPING:
        pytest.skip("no decoder")
    return config


def small_models(family: str, count: int = 1, **changes) -> list[torch.nn.Module]:
    """Models that differ in their random weights."""
    config, models = small_config(family, **changes), []
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        if size > 4_000_000:
            pytest.skip(f"{size:,} parameters")
        for seed in range(count):
            torch.manual_seed(seed)
            models.append(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
            if not models[-1](torch.tensor([[3, 4, 5]]), use_cache=False).logits.isfinite().all():
                pytest.skip("logits are not finite")
    except Exception as error:
        pytest.skip(f"transformers cannot run it: {type(error).__name__}: {error}")
    return models


def verifier_of(model: torch.nn.Module, **spec) -> ProcessVerifier:
    verifier = ProcessVerifier.from_backbone(model.base_model, "small", VerifierSpec(**spec)).eval()
    for name, parameter in verifier.named_parameters():
        if "lora_B" in name or name == "score.weight":  # an adapter starts at zero
            torch.nn.init.normal_(parameter, std=0.3)
    return verifier


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def expect_reference(model, verifier, batch, new: int = 5, **options) -> None:
    """Guided, token by token; plain, by the logits that each token was chosen from, alone and in a batch."""
    settings = {"verifier": verifier, "alpha": 0.02, "beta": 3.0, "top_k": 4}
    guided = Decoder(model, Guidance(**settings, **options)).decode(batch, max_new_tokens=new, eos=[])
    for prompt, (completion,) in zip(batch, guided, strict=True):
        assert completion.token_ids == decode_one(model, prompt, max_new_tokens=new, eos=[], **settings)
    options = {"max_new_tokens": new, "eos": [], "trace": True, "keep_logits": True}
    one_by_one, together = (Decoder(model).decode(batch, batch_size=size, **options) for size in (1, 8))
    for prompt, (alone,), (batched,) in zip(batch, one_by_one, together, strict=True):
        assert batched.token_ids == alone.token_ids
        with torch.inference_mode():
            expected = model(torch.tensor([[*prompt, *alone.token_ids]]), use_cache=False).logits[0, len(prompt) - 1 :]
        for completion in (alone, batched):
            logits = torch.stack([token.logits.raw for token in completion.trace])
            torch.testing.assert_close(logits, expected[:-1], atol=1e-3 * max(1.0, expected.std().item()), rtol=0)


def decodes(family: str, folder: Path) -> bool:
    """Whether a family is decoded; then rightly, otherwise refused before there are weights to load."""
    model, other = small_models(family, 2)
    objection = examine(type(model.base_model), model.base_model.config).objection
    if objection is None:
        expect_reference(model, verifier_of(other), prompts(4, 19))
        return True
    model.config.save_pretrained(folder)
    for load in (require_model, load_backbone, lambda name: load_system1(name, torch.device("cpu"))):
        with pytest.raises(UserError) as refusal:
            load(str(folder))
        assert model.config.model_type in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(UserError):
        Decoder(model)
    return False


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", QUICK)
def test_a_family_decodes_as_transformers_or_is_refused(family, tmp_path):
    try:
        right = decodes(family, tmp_path)
    except pytest.skip.Exception as skipped:
        pytest.fail(str(skipped))
    assert right == (QUICK.index(family) < QUICK.index("lfm2"))


def table() -> set[str]:
    """The families that decoding's README calls right."""
    section = README.read_text().partition("## Families")[2].partition("\n## ")[0]
    row = next(line for line in section.splitlines() if line.startswith("| right"))
    return set(re.findall(r"`([\w-]+)`", row))


@pytest.mark.slow
@pytest.mark.parametrize("family", TYPES)
def test_every_family_is_right_or_refused_and_the_readme_says_which(family, tmp_path):
    right = decodes(family, tmp_path)
    if transformers.__version__ == NEWEST_TESTED:
        assert right == (family in table())


@pytest.mark.one_in(5)
@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("layout", ["varlen", "prefix", "padded", "graphs"])
def test_experts_and_sinks_are_right_in_every_layout(family, layout, monkeypatch):
    model, other = small_models(family, 2)
    long, short = prompts(30, 5)
    batch = [long, long[:25], [*long[:25], 7, 8], short]
    if layout == "prefix":
        monkeypatch.setattr(scheduler, "MIN_IN_PLACE_TOKENS", 0)
    if layout == "padded":
        monkeypatch.setattr(ModelRunner, "unpadded", False)
    verifier = verifier_of(other)
    settings = {"verifier": verifier, "alpha": 0.02, "beta": 3.0, "top_k": 4}
    decoder = Decoder(model, Guidance(**settings), graphs=layout == "graphs")
    completions = decoder.decode(batch, max_new_tokens=6, eos=[])
    for prompt, (completion,) in zip(batch, completions, strict=True):
        assert completion.token_ids == decode_one(model, prompt, max_new_tokens=6, eos=[], **settings)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2", "opt"])
def test_a_lora_verifier_shares_forwards_with_its_system1(family):
    (model,) = small_models(family)
    (copy,) = small_models(family)
    lora = {"kind": "lora", "lora_r": 4}
    if family in EXPERTS:
        with pytest.raises(UserError, match=r"'all-linear': they include the parameters of layers.0.mlp"):
            verifier_of(small_models(family)[0], **lora)
        lora["lora_target_modules"] = ("q_proj", "k_proj", "v_proj", "o_proj")
    expect_reference(model, verifier_of(copy, **lora), prompts(4, 11))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "gpt2", "opt", "deepseek_v3"])
def test_packed_training_scores_are_those_of_each_text_alone(family):
    """Within the window, as training demands."""
    (model,) = small_models(family, **({"sliding_window": 512} if family == "gpt_oss" else {}))
    verifier, texts = verifier_of(model), prompts(9, 14, 6)
    examples = [
        Example(ids=ids, triplets=[Triplet(at, ids[at], 7), Triplet(at + 1, ids[at + 1], 9)], start=1, first_pair_id=0)
        for ids, at in zip(texts, (3, 8, 2), strict=True)
    ]
    batch = verifier_batch(examples, capacity=64)
    with torch.inference_mode():
        margins = verifier(
            batch.input_ids,
            start=batch.start,
            prefix_len=batch.prefix_len,
            pair_indices=batch.pair_indices,
            pair_tokens=batch.pair_tokens,
        ).margins[0]
        alone = []
        for example in examples:
            for position, gold, negative in example.triplets:
                pair = [[*example.ids[:position], token] for token in (gold, negative)]
                scores = [verifier(torch.tensor([ids])).scores[0, -1] for ids in pair]
                alone.append(scores[0] - scores[1])
    torch.testing.assert_close(margins, torch.stack(alone), atol=1e-4, rtol=1e-4)


LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 32}
ROPES = {"dynamic": {"factor": 2.0}, "longrope": LONG}


@pytest.mark.parametrize("kind", ROPES)
def test_a_rope_of_the_length_is_right_up_to_it_and_refused_beyond(kind):
    """Beyond, a short prompt's text would depend on what else is in the batch."""
    if kind == "longrope" and transformers.__version__ < "5.18":
        pytest.skip("refused by the dry run: it asks a tensor for its value, which has none without weights")
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **ROPES[kind]}
    (model,) = small_models("llama", rope_parameters=rope)
    limit = 32 if kind == "longrope" else 64
    batch = prompts(5, limit - 6)
    expect_reference(model, verifier_of(small_models("llama", rope_parameters=rope)[0]), batch)
    with pytest.raises(UserError, match=rf"prompt 1 .* can take {limit + 1} positions, .* \({kind}\) for {limit};"):
        Decoder(model).decode(batch, max_new_tokens=7, eos=[])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_table_of_positions_is_used_up_to_its_end_and_no_further(family):
    (model,) = small_models(family)
    (prompt,) = prompts(58)
    assert len(Decoder(model).decode([prompt], max_new_tokens=6, eos=[])[0][0].token_ids) == 6
    with pytest.raises(UserError, match=rf"can take 65 positions, and the model \({family}\) has a table of 64;"):
        Decoder(model).decode([prompt], max_new_tokens=7, eos=[])


def test_a_constant_rope_goes_on_and_says_so_once(caplog):
    (model,) = small_models("llama", max_position_embeddings=16)
    for _ in range(2):
        expect_reference(model, verifier_of(small_models("llama", max_position_embeddings=16)[0]), prompts(4, 14))
    (message,) = [record.getMessage() for record in caplog.records if record.name == "llm2"]
    assert "longer than the 16 positions of the model (llama)" in message
    refuse_too_long(model.config, 16, "a text")


@pytest.mark.parametrize("validate", [True, False])
def test_a_dry_run_finds_the_same_whether_something_was_compiled_before(validate, monkeypatch):
    """Dynamo turns off the validation of distributions' arguments, for the whole process."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", validate)
    (model,) = small_models("gemma3n_text")
    _examine.cache_clear()
    assert examine(type(model.base_model), model.base_model.config).objection is None
    assert torch.distributions.Distribution._validate_args == validate


def test_a_large_model_is_tried_quickly_and_once():
    sizes = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    config = CONFIG_MAPPING["mixtral"](**sizes, num_key_value_heads=8, head_dim=128)
    begun = time.process_time()
    found = examine(backbone_class(config), config)
    assert found.objection is None and found.values_per_token == 80 * 8 * 128 * 2
    first = time.process_time() - begun
    assert examine(backbone_class(config), config) is found and first < 2
