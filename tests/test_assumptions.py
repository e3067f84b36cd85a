"""What llm2 relies on that its libraries do not document, each in a test that says so in a sentence when it goes.

A name that is private, underscored or undocumented stands in RELIED_ON, with the test below that holds it. What vLLM
must have is checked where it is used, before an engine starts (llm2/vllm/processor.py, `check_interfaces`).
"""

import ast
import inspect
import sys
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from conftest import VOCABULARY, tiny_system1
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    Gemma2Config,
    GenerationConfig,
    LogitsProcessor,
    MistralConfig,
    Trainer,
    TrainingArguments,
    cache_utils,
)
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

import llm2.decoding.attention
import llm2.verifier.model
from experiments.baselines.prefer import PreferenceTrainer
from llm2.common.training import CHECKPOINTING
from llm2.verifier.trainer import VerifierTrainer

LLM2 = Path(llm2.__file__).parent
LIBRARIES = ("accelerate", "datasets", "deepspeed", "lm_eval", "peft", "transformers", "trl")
RELIED_ON = {
    # imports from modules whose names their documentation does not list
    "deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint": "deepspeed",
    "lm_eval.__main__.cli_evaluate": "lm_eval",
    "lm_eval.api.instance.Instance": "lm_eval",
    "lm_eval.api.model.LM": "lm_eval",
    "lm_eval.api.registry.register_model": "lm_eval",
    "lm_eval.models": "lm_eval",
    "peft.tuners.lora.LoraLayer": "lora",
    "peft.tuners.lora.layer.ParamWrapper": "lora",
    "peft.tuners.tuners_utils.BaseTunerLayer": "lora",
    "peft.utils.SAFETENSORS_WEIGHTS_NAME": "file_names",
    "transformers.cache_utils.CacheLayerMixin": "cache_layers",
    "transformers.cache_utils.DynamicLayer": "cache_layers",
    "transformers.cache_utils.DynamicSlidingWindowLayer": "cache_layers",
    "transformers.cache_utils.LinearAttentionCacheLayerMixin": "cache_layers",
    "transformers.generation.BaseStreamer": "custom_generate",
    "transformers.generation.EosTokenCriteria": "custom_generate",
    "transformers.generation.GenerateDecoderOnlyOutput": "custom_generate",
    "transformers.generation.MaxLengthCriteria": "custom_generate",
    "transformers.generation.StopStringCriteria": "custom_generate",
    "transformers.integrations.ggml.GGUF_CONFIG_MAPPING": "gguf",
    "transformers.integrations.get_reporting_integration_callbacks": "reporting",
    "transformers.modeling_outputs.BaseModelOutputWithPast": "outputs",
    "transformers.trainer.TRAINING_ARGS_NAME": "file_names",
    "transformers.utils.ModelOutput": "outputs",
    "transformers.utils.SAFE_WEIGHTS_INDEX_NAME": "file_names",
    "transformers.utils.SAFE_WEIGHTS_NAME": "file_names",
    "transformers.utils.cached_file": "file_names",
    # underscored attributes
    "_attn_implementation": "attention",
    "_forward_hooks": "hooks",
    "_forward_pre_hooks": "hooks",
    "_get_default_generation_params": "custom_generate",
    "_supports_attention_backend": "attention",
    "_load_best_model": "trainer",
    "_load_from_checkpoint": "trainer",
    "_is_mkldnn_bf16_supported": "onednn",
    "_linear_pointwise": "onednn",
    "_reorder_linear_weight": "onednn",
    "_scaled_dot_product_flash_attention_for_cpu": "flash_attention",
    "_validate_args": "distributions",
}
NOT_OTHERS = {"_asdict", "_replace", "_run"}  # of named tuples, and our own


def hold(library: str, holds: object, sentence: str) -> None:
    """Fails with a sentence about a library."""
    if not holds:
        pytest.fail(f"{library} {sys.modules[library].__version__} {sentence}", pytrace=False)


def test_the_list_is_complete():
    found = set()
    for node in (node for path in LLM2.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.ImportFrom) and "." in (node.module or "") and node.module.split(".")[0] in LIBRARIES:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if "." in alias.name and alias.name.split(".")[0] in LIBRARIES}
        elif isinstance(node, ast.Attribute) and node.attr[0] == "_" and node.attr[1] != "_":
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= set() if own else {node.attr}
    assert found - NOT_OTHERS == set(RELIED_ON)
    tests = {name for name in globals() if name.startswith("test_")}
    assert all(any(f"test_{held}" in name for name in tests) for held in set(RELIED_ON.values()))


@pytest.mark.parametrize("trainer", [VerifierTrainer, PreferenceTrainer])
def test_trainer_calls_the_private_methods_that_we_override(trainer):
    source = inspect.getsource(Trainer)
    for name, method in vars(trainer).items():
        if name.startswith("_") and not name.startswith("__") and name != "_refuse":
            theirs = getattr(Trainer, name, None)
            hold("transformers", theirs and f"self.{name}" in source, f"no longer calls Trainer.{name}")
            ours, expected = (list(inspect.signature(each).parameters) for each in (method, theirs))
            hold("transformers", ours == expected, f"calls Trainer.{name} with {expected}, not with {ours}")


def test_trainer_writes_its_own_state_last_and_leaves_the_division_of_the_loss_to_us():
    order = [
        inspect.getsource(Trainer._save_checkpoint).find(text)
        for text in ("save_model(", "_rng_state(", ".save_to_json(")
    ]
    hold("transformers", -1 not in order and order == sorted(order), "writes trainer_state.json before the weights")
    source = inspect.getsource(Trainer)
    hold("transformers", "self.model_accepts_loss_kwargs" in source, "ignores Trainer.model_accepts_loss_kwargs")
    hold("transformers", "self.save_model(output_dir, _internal_call" in source, "saves checkpoints without save_model")


def test_trainer_takes_a_ratio_for_warmup_steps_and_our_name_of_checkpointing(tmp_path):
    arguments = TrainingArguments(str(tmp_path), warmup_steps=0.1, use_cpu=True, **{CHECKPOINTING: True})
    hold("transformers", arguments.get_warmup_steps(200) == 20, "takes warmup_steps below 1 for no ratio")
    hold("transformers", arguments.gradient_checkpointing, "no longer mirrors activation_checkpointing")


ARCHITECTURES = {"llama": {}, "mistral": {"sliding_window": 4}, "gemma2": {"attn_logit_softcapping": 20.0}}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_attention_functions_get_their_arguments_once_a_layer(kind):
    """Under a name without a mask function they get no mask; an argument that the model does not know reaches them."""
    calls = []

    def attend(module, query, key, value, attention_mask, **options):
        calls.append((module.layer_idx, tuple(query.shape), tuple(key.shape), attention_mask, options))
        return query.transpose(1, 2), None

    AttentionInterface.register("llm2_probe", attend)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    if kind == "llama":
        model = tiny_system1()
    else:
        config = {"mistral": MistralConfig, "gemma2": Gemma2Config}[kind](**shape, **ARCHITECTURES[kind])
        model = AutoModelForCausalLM.from_config(config)
    hold("transformers", model.base_model._supports_attention_backend, "has no _supports_attention_backend any more")
    body = model.base_model.eval()
    body.set_attn_implementation("llm2_probe")
    hold(
        "transformers", body.config._attn_implementation == "llm2_probe", "has no config._attn_implementation any more"
    )
    body(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False, attention_metadata="ours")
    hold("transformers", [call[0] for call in calls] == [0, 1], "does not call attention once a layer, by layer_idx")
    for _, query, key, mask, options in calls:
        hold("transformers", query == (1, 4, 3, 8) and key == (1, 2, 3, 8), "passes queries or keys of another shape")
        hold("transformers", mask is None, "makes a mask for an attention that registers none")
        hold("transformers", options.get("attention_metadata") == "ours", "no longer passes unknown arguments through")
        hold("transformers", options.get("scaling"), "no longer passes scaling to attention")
        window = options.get("sliding_window")
        hold("transformers", window == 4 or kind != "mistral", "no longer passes sliding_window to attention")
        softcap = options.get("softcap")
        hold("transformers", softcap == 20.0 or kind != "gemma2", "no longer passes softcap to attention")


def test_cache_layers_tell_keys_and_values_from_other_states():
    found = {}
    for kind in ("llama", "mistral", "mamba", "jamba"):
        layers = DynamicCache(config=AutoConfig.for_model(kind)).layers
        found[kind] = {type(layer) for layer in layers}
    hold("transformers", found["llama"] == {cache_utils.DynamicLayer}, "caches llama's keys in another class")
    hold("transformers", found["mistral"] == {cache_utils.DynamicSlidingWindowLayer}, "caches windows in another class")
    for kind in ("mamba", "jamba"):
        states = any(issubclass(layer, cache_utils.LinearAttentionCacheLayerMixin) for layer in found[kind])
        hold("transformers", states, f"says nothing of the states of {kind}")


def test_attention_of_transformers_is_not_replaced_by_ours():
    theirs = find_spec("transformers.integrations.flex_attention").name
    for registry in (AttentionInterface(), AttentionMaskInterface()):
        hold("transformers", "flex_attention" in registry, "no longer registers flex_attention")
        assert registry["flex_attention"].__module__ in (theirs, "transformers.masking_utils")
        assert llm2.verifier.model.LLM2_FLEX in registry
    assert llm2.decoding.attention.IMPLEMENTATION in AttentionInterface()
    assert llm2.decoding.attention.IMPLEMENTATION not in AttentionMaskInterface()


def test_custom_generate_is_called_with_prepared_arguments(system1):
    found = {}

    def recipe(model, input_ids, seed=0, **arguments):
        found.update(arguments, model=model, input_ids=input_ids, seed=seed)
        return input_ids

    ids = torch.tensor([[5, 6, 7]])
    system1.generate(ids, custom_generate=recipe, max_new_tokens=4, seed=3, attention_mask=torch.ones_like(ids))
    hold("transformers", found["model"] is system1 and found["input_ids"].shape == (1, 3), "calls custom_generate anew")
    for name in ("logits_processor", "stopping_criteria", "generation_config", "attention_mask"):
        hold("transformers", name in found, f"no longer passes {name} to custom_generate")
    hold("transformers", found.get("seed") == 3, "no longer passes a recipe the arguments that it names")
    hold("transformers", found["generation_config"].max_length == 7, "leaves max_length to custom_generate")
    defaults = GenerationConfig._get_default_generation_params()
    same = all(getattr(found["generation_config"], name) == defaults[name] for name in ("num_beams", "num_beam_groups"))
    hold("transformers", same and defaults["num_beams"] == 1, "has other defaults of options")


class Forced(LogitsProcessor):
    calls = 0

    def __call__(self, input_ids, scores):
        Forced.calls += 1
        return scores


@pytest.mark.filterwarnings("ignore")
def test_generate_batch_still_ignores_processors(system1):
    """If it heeds them, GuidedLogitsProcessor and the decoding README have to say something else."""
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=1, pad_token_id=2)
    cache = ContinuousBatchingConfig(
        num_blocks=8, max_batch_tokens=64
    )  # else it takes most of the memory (5.18 to 5.22)
    options = {"generation_config": config, "continuous_batching_config": cache}
    system1.generate_batch([[5, 6, 7]], logits_processor=[Forced()], **options)
    hold("transformers", Forced.calls == 0, "calls the logits processors of generate_batch")


def test_outputs_are_dataclasses_with_the_fields_that_are_set():
    states = torch.ones(1, 2, 3)
    output = BaseModelOutputWithPast(last_hidden_state=states)
    hold("transformers", output.last_hidden_state is states and len(output) == 1, "changed BaseModelOutputWithPast")
    output = llm2.verifier.model.VerifierOutput()
    output.margins = states
    hold("transformers", isinstance(output, ModelOutput) and output[0] is states, "changed how a ModelOutput is filled")


def test_from_pretrained_tells_what_the_files_lack_and_logs_it_where_we_listen(system1_folder):
    model, found = AutoModelForCausalLM.from_pretrained(system1_folder, output_loading_info=True)
    hold("transformers", {"missing_keys", "mismatched_keys"} <= set(found), "changed output_loading_info")
    hold(
        "transformers",
        "transformers.modeling_utils" in str(sys.modules["transformers.modeling_utils"].logger),
        "moved its log",
    )


def test_file_names_are_those_that_are_written(system1_folder):
    names = [transformers.utils.SAFE_WEIGHTS_NAME, transformers.utils.SAFE_WEIGHTS_INDEX_NAME]
    names += [transformers.trainer.TRAINING_ARGS_NAME]
    expected = ["model.safetensors", "model.safetensors.index.json", "training_args.bin"]
    hold("transformers", names == expected, f"calls its files {names}")
    path = transformers.utils.cached_file(system1_folder, "config.json", local_files_only=True)
    hold("transformers", path == str(Path(system1_folder, "config.json")), "finds files of folders elsewhere")
    name = peft.utils.SAFETENSORS_WEIGHTS_NAME
    hold("peft", name == "adapter_model.safetensors", f"calls its file {name}")


def test_gguf_keys_that_are_read_are_those_of_the_mapping():
    keys = GGUF_CONFIG_MAPPING["llama"]
    hold(
        "transformers", keys.get("rope.freq_base") and keys.get("block_count"), "changed how it maps keys of GGUF files"
    )
    hold("transformers", not keys.get("rope.scaling.factor"), "reads rope scaling, which we refuse")


def test_reporting_integrations_are_checked_by_name():
    callbacks = transformers.integrations.get_reporting_integration_callbacks
    hold("transformers", callbacks(["tensorboard"]), "no longer finds the callback of tensorboard")
    with pytest.raises(ValueError):
        callbacks(["nothing"])


def test_lora_layers_have_the_parts_that_we_read():
    model = tiny_system1()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model.base_model)
    layers = [each for each in model.modules() if isinstance(each, peft.tuners.lora.LoraLayer)]
    hold("peft", len(layers) == 2, "no longer puts a LoraLayer on each target")
    for layer in layers:
        hold("peft", isinstance(layer, BaseTunerLayer), "no longer makes LoraLayer a BaseTunerLayer")
        hold("peft", list(layer.active_adapters) == ["default"], "changed LoraLayer.active_adapters")
        hold("peft", not layer.disable_adapters and not layer.merged_adapters, "changed what LoraLayer says it does")
        weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        delta = layer.scaling["default"] * weights[1] @ weights[0]
        hold("peft", torch.allclose(layer.get_delta_weight("default"), delta), "changed LoraLayer.get_delta_weight")
        hold("peft", layer.get_base_layer().weight.shape == (32, 32), "changed LoraLayer.get_base_layer")
    hold("peft", hasattr(model.base_model, "peft_config"), "no longer marks a model by peft_config")
    keys = get_peft_model_state_dict(model.base_model, save_embedding_layers=False)
    hold("peft", "layers.0.self_attn.q_proj.lora_A.weight" in keys, f"calls the weights of an adapter {min(keys)}")


def test_onednn_operators_of_torch_compute_a_linear_layer():
    weight, states = torch.randn(8, 4), torch.randn(1, 3, 4)
    operators = torch.ops.mkldnn
    reordered = operators._reorder_linear_weight(weight)
    found = operators._linear_pointwise(states, reordered, None, "none", [], "")
    hold("torch", torch.allclose(found, states @ weight.T, atol=1e-5), "changed the oneDNN operators of torch.compile")
    if operators._is_mkldnn_bf16_supported():  # else the first operator raises
        operators._reorder_linear_weight(weight.bfloat16())


def test_flash_attention_of_torch_returns_the_logarithm_of_its_total_on_a_cpu():
    query, keys, bias = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 1, 1, 5)
    output, log_total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, keys, attn_mask=bias, scale=0.5
    )
    scores = 0.5 * query @ keys.transpose(-1, -2) + bias
    holds = torch.allclose(log_total, scores.logsumexp(-1), atol=1e-5)
    holds &= torch.allclose(output, scores.softmax(-1) @ keys, atol=1e-5)
    hold("torch", holds, "changed what flash attention on a CPU returns")


def test_distributions_keep_whether_they_validate_where_we_restore_it(monkeypatch):
    kind = torch.distributions.Distribution
    monkeypatch.setattr(kind, "_validate_args", kind._validate_args)
    for value in (False, True):
        kind.set_default_validate_args(value)
        hold("torch", kind._validate_args == value, "keeps the default validation of distributions elsewhere")


def test_datasets_read_their_offline_switch_when_they_load():
    import datasets

    hold("datasets", hasattr(datasets.config, "HF_HUB_OFFLINE"), "has no config.HF_HUB_OFFLINE any more")


def test_trl_takes_token_ids():
    trl = pytest.importorskip("trl")
    source = inspect.getsource(sys.modules[trl.RewardTrainer.__module__])
    columns = ("chosen_ids", "rejected_ids")
    hold("trl", all(f'"{column}"' in source for column in columns), f"RewardTrainer has no columns {columns}")


def test_lm_eval_has_the_parts_of_its_model_and_command_that_we_fill():
    pytest.importorskip("lm_eval")
    import lm_eval.__main__
    from lm_eval.api.model import LM

    hold("lm_eval", callable(lm_eval.__main__.cli_evaluate), "has no lm_eval.__main__.cli_evaluate any more")
    source = inspect.getsource(LM)
    for name in ("_rank", "_world_size", "cache_hook"):
        hold("lm_eval", f"self.{name}" in source, f"no longer reads LM.{name}")
    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    samples = yaml.safe_load(path.read_text())["fewshot_config"]["samples"] if path.exists() else ()
    hold("lm_eval", len(samples) == 8 and {"question", "target"} <= set(samples[0]), "moved the examples of gsm8k-cot")


def test_deepspeed_gathers_its_shards_by_this_function():
    pytest.importorskip("deepspeed")
    from deepspeed.utils import zero_to_fp32

    hold("deepspeed", hasattr(zero_to_fp32, "get_fp32_state_dict_from_zero_checkpoint"), "moved zero_to_fp32")


def test_hooks_of_a_module():
    layer = torch.nn.Linear(2, 2)
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    assert layer._forward_hooks and layer._forward_pre_hooks
