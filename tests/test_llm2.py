"""LLM2 takes and returns what transformers' `generate` does; guidance as a custom_generate and a LogitsProcessor."""

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_system1, tiny_verifier
from peft import LoraConfig, get_peft_model
from transformers import (
    ContinuousBatchingConfig,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from llm2 import LLM2
from llm2.decoding.decoder import Decoder
from llm2.decoding.generate import GuidedGenerate
from llm2.decoding.generate_options import refuse_ignored
from llm2.decoding.logits_processor import GuidedLogitsProcessor
from llm2.decoding.sampling import Guidance
from llm2.errors import UserError
from llm2.verifier.model import ProcessVerifier


@pytest.fixture(scope="module")
def llm2(system1_folder, tmp_path_factory) -> LLM2:
    """With beta 0, so that its greedy tokens are System 1's."""
    folder = tmp_path_factory.mktemp("verifier")
    tiny_verifier(folder / "system1", vocab_size=261).save_pretrained(folder / "verifier")
    return LLM2.from_pretrained(system1_folder, str(folder / "verifier"), beta=0.0, device="cpu")


@pytest.fixture(scope="module")
def inputs(llm2) -> dict:
    inputs = llm2.tokenizer(["2 + 2 =", "How many?", "x"], return_tensors="pt", padding=True, padding_side="left")
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 9},
        {"max_length": 14},
        {"max_new_tokens": 9, "repetition_penalty": 1.5},
        {"max_new_tokens": 9, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 9, "bad_words_ids": [[5], [40, 41]]},
        {"max_new_tokens": 9, "min_new_tokens": 4},
        {"generation_config": GenerationConfig(max_new_tokens=7, eos_token_id=list(range(0, 261, 5)), pad_token_id=3)},
    ],
    ids=lambda options: next(reversed(options)),
)
def test_beta_zero_writes_what_generate_writes(llm2, inputs, options):
    assert torch.equal(llm2.generate(**inputs, **options), llm2.system1.generate(**inputs, **options))


def test_a_stop_string_ends_a_sequence(llm2, inputs):
    free = llm2.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    stop = llm2.tokenizer.decode(free[3:5])
    options = {"max_new_tokens": 12, "do_sample": False, "stop_strings": [stop], "tokenizer": llm2.tokenizer}
    assert torch.equal(llm2.generate(**inputs, **options), llm2.system1.generate(**inputs, **options))


def test_a_stopping_criterion_applies_to_each_sequence(llm2, inputs):
    class Even(StoppingCriteria):
        def __call__(self, input_ids, scores, **options):
            return (input_ids[:, -1] % 2 == 0) & (input_ids[:, -1] > 4)

    options = {"max_new_tokens": 12, "do_sample": False, "stopping_criteria": StoppingCriteriaList([Even()])}
    assert torch.equal(llm2.generate(**inputs, **options), llm2.system1.generate(**inputs, **options))


@pytest.mark.parametrize("verified", [True, False])
def test_scores_and_logits_come_as_from_generate(llm2, inputs, verified):
    model = llm2 if verified else LLM2(llm2.system1, llm2.tokenizer)
    outputs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "eos_token_id": None}
    options = {"max_new_tokens": 6, "do_sample": False, **outputs}
    expected, output = llm2.system1.generate(**inputs, **options), model.generate(**inputs, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert len(output.logits) == len(expected.logits) == 6
    for step in range(6):
        torch.testing.assert_close(output.logits[step], expected.logits[step], atol=1e-4, rtol=0)
        kept = output.scores[step].isfinite()
        assert kept.any(-1).all() and (verified or kept.all())
        torch.testing.assert_close(output.scores[step][kept], expected.scores[step][kept], atol=1e-4, rtol=0)
        assert torch.equal(output.scores[step].argmax(-1), output.sequences[:, inputs["input_ids"].shape[1] + step])


@pytest.mark.parametrize("option", [{"repetition_penalty": 1.8}, {"suppress_tokens": [*range(40)]}])
def test_raw_logits_are_those_before_processors(llm2, inputs, option):
    plain = LLM2(llm2.system1, llm2.tokenizer)
    options = {
        "max_new_tokens": 4,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_logits": True,
        **option,
    }
    expected, found = (
        llm2.system1.generate(**inputs, **options),
        plain.generate(**inputs, output_scores=True, **options),
    )
    for step in range(4):
        torch.testing.assert_close(found.logits[step], expected.logits[step], atol=1e-4, rtol=0)
        assert not torch.allclose(found.logits[step], found.scores[step])


def test_a_warper_that_is_passed_acts_without_sampling_too(llm2, inputs):
    plain = LLM2(llm2.system1, llm2.tokenizer)
    options = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    options |= {"logits_processor": LogitsProcessorList([TypicalLogitsWarper(0.1)])}
    expected = llm2.system1.generate(**inputs, **options)
    assert torch.equal(plain.generate(**inputs, **options), expected)
    assert not torch.equal(plain.generate(**inputs, **{**options, "logits_processor": None}), expected)


def test_a_trace_has_an_entry_for_every_token(llm2, inputs):
    output = llm2.generate(**inputs, max_new_tokens=5, eos_token_id=None, trace=True)
    assert [len(trace) for trace in output.trace] == [5, 5, 5]
    new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert [[choice.candidates[choice.chosen] for choice in trace] for trace in output.trace] == new


def test_a_streamer_sees_every_token_once(llm2):
    class Seen(BaseStreamer):
        def __init__(self):
            self.ids, self.ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, ids = Seen(), llm2.tokenizer("2 + 2 =", return_tensors="pt")["input_ids"]
    sequence = llm2.generate(ids, max_new_tokens=8, streamer=streamer)
    assert streamer.ids == sequence[0].tolist() and streamer.ended
    with pytest.raises(ValueError, match="one sequence, found a batch of 2"):
        llm2.generate(ids.repeat(2, 1), max_new_tokens=2, streamer=Seen())


def test_samples_depend_on_seed_and_index_alone(llm2, inputs):
    options = {"max_new_tokens": 9, "do_sample": True, "num_return_sequences": 3, "top_k": 20, "top_p": 0.95}
    sampled = llm2.generate(**inputs, **options, seed=5)
    width = inputs["input_ids"].shape[1]
    assert sampled.shape[0] == 9 and torch.equal(sampled[:3, :width], inputs["input_ids"][:1].expand(3, -1))
    assert torch.equal(sampled, llm2.generate(**inputs, **options, seed=5))
    assert not torch.equal(sampled, llm2.generate(**inputs, **options, seed=6))
    alone = {key: value[:1] for key, value in inputs.items()}
    part = llm2.generate(**alone, **options, seed=5)
    assert torch.equal(part, sampled[:3, : part.shape[1]]), "what else is in the batch must not matter"


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_each_warper_acts_on_the_guided_logits(system1, verifier, option):
    """At its extreme each leaves only the guided logits' best token, which is not System 1's best everywhere."""
    generate = GuidedGenerate(Guidance(verifier=verifier, alpha=0.02, beta=3.0))
    ids = torch.tensor([[5, 9, 3, 17]])
    options = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 2, "custom_generate": generate}
    greedy = system1.generate(ids, do_sample=False, **options)
    off = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    assert torch.equal(system1.generate(ids, do_sample=True, **{**off, **option}, **options), greedy)
    assert not torch.equal(greedy, system1.generate(ids, do_sample=False, **{**options, "custom_generate": None}))


def test_custom_generate_and_processor_write_what_llm2_writes(system1, verifier):
    """With left padding, and rows whose lengths differ."""
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=3.0)
    ids = torch.randint(3, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 2, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    plain = system1.generate(ids, **options)
    custom = system1.generate(ids, custom_generate=GuidedGenerate(guidance), **options)
    processor = LogitsProcessorList([GuidedLogitsProcessor(guidance, attention_mask=mask)])
    assert torch.equal(custom, system1.generate(ids, logits_processor=processor, **options))
    assert not torch.equal(custom, plain)


def test_a_processor_reads_no_padding_whatever_the_pad_token_is(system1, verifier):
    """The pad token may be the one that a prompt begins with, or ends with."""
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=3.0)
    prompts = [[2, 9, 3, 2], [8, 30], [2, 2, 21, 4, 5, 9]]
    ids = torch.tensor([[2] * (6 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (6 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    options |= {"eos_token_id": None}
    processor = GuidedLogitsProcessor(guidance, attention_mask=mask)
    written = system1.generate(ids, logits_processor=[processor], **options)
    decoded = Decoder(system1, guidance).decode(prompts, max_new_tokens=12, eos=[])
    assert written[:, 6:].tolist() == [completion.token_ids for (completion,) in decoded]
    for beams in (1, 2):
        processor = GuidedLogitsProcessor(guidance)
        with pytest.raises(ValueError, match="attention_mask: expected the one of these prompts, found none"):
            system1.generate(ids, logits_processor=[processor], num_beams=beams, **options)
    with pytest.raises(ValueError, match="attention_mask: found 2 rows of 6 tokens for 3 of 6"):
        processor = GuidedLogitsProcessor(guidance, attention_mask=mask[:2])
        system1.generate(ids, logits_processor=[processor], **options)
    with pytest.raises(ValueError, match="expected padding on the left alone"):
        GuidedLogitsProcessor(guidance, attention_mask=mask.flip(1))


def test_a_processor_reads_no_padding_under_beam_search(system1, verifier):
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=3.0)
    ids, mask = torch.tensor([[5, 9, 3, 17], [2, 2, 21, 4]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 10, "pad_token_id": 2}
    processor = GuidedLogitsProcessor(guidance, attention_mask=mask)
    both = system1.generate(ids, attention_mask=mask, logits_processor=[processor], **options)
    alone = system1.generate(ids[1:, 2:], logits_processor=[GuidedLogitsProcessor(guidance)], **options)[0]
    assert both[1, 2 : 2 + len(alone)].tolist() == alone.tolist()


def test_continuous_batching_is_refused_where_it_is_ours_and_noticed_where_it_is_not(llm2, inputs, system1, verifier):
    with pytest.raises(ValueError, match="'paged', which cannot be guided"):
        llm2.generate(**inputs, max_new_tokens=3, cache_implementation="paged")
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=1, pad_token_id=2)
    processor = GuidedLogitsProcessor(Guidance(verifier=verifier))
    assert processor.supports_continuous_batching is False
    cache = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    options = {"generation_config": config, "continuous_batching_config": cache}
    system1.generate_batch([[5, 9, 3, 17]], logits_processor=[processor], **options)
    with pytest.warns(RuntimeWarning, match="never called: nothing was guided"):
        del processor
    processor = GuidedLogitsProcessor(Guidance(verifier=verifier))
    with pytest.raises(ValueError, match=r"found the shape \(1, 2, 64\), expected \(batch, vocabulary\)"):
        processor(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, VOCABULARY))


def test_the_processor_follows_reordered_beams(system1, verifier):
    """Beam search permutes rows; a row must not use what was cached for another."""

    class Forgetful(GuidedLogitsProcessor):
        def __call__(self, input_ids, scores):
            for handle in self.handles:
                self.system2.rewind(handle, 0)
            return super().__call__(input_ids, scores)

    ids = torch.tensor([[5, 9, 3, 17], [8, 30, 21, 4]])
    mask = torch.ones_like(ids)
    written = [
        system1.generate(
            ids,
            num_beams=3,
            do_sample=False,
            max_new_tokens=10,
            pad_token_id=2,
            logits_processor=LogitsProcessorList(
                [kind(Guidance(verifier=verifier, alpha=0.01, beta=2.0), attention_mask=mask)]
            ),
        )
        for kind in (GuidedLogitsProcessor, Forgetful)
    ]
    assert torch.equal(*written)


# A value for every field of a GenerationConfig, and whether greedy or sampled decoding heeds it.
GREEDY = {
    "max_length": 14,
    "max_new_tokens": 7,
    "min_length": 15,
    "min_new_tokens": 4,
    "max_time": 1e-9,
    "stop_strings": [" "],
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[5], [40, 41]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 9,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.5),
    "suppress_tokens": list(range(0, 260, 2)),
    "begin_suppress_tokens": list(range(0, 260, 2)),
    "sequence_bias": [[[5], 9.0], [[40, 41], 9.0]],
    "num_return_sequences": 1,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": list(range(0, 261, 5)),
    "do_sample": False,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "cache_implementation": "static",
    "prefill_chunk_size": 2,
    "early_stopping": True,
    "length_penalty": 2.0,
    "use_cache": False,
    "decoder_start_token_id": 8,
    "num_assistant_tokens": 3,
}
SAMPLED = {"temperature": 1e-4, "top_k": 1, "top_p": 1e-6, "min_p": 1.0, "top_h": 1e-6, "typical_p": 0.3}
SAMPLED |= {"epsilon_cutoff": 0.9, "eta_cutoff": 0.9}
REFUSED = {"num_beams": 2, "use_mtp": True, "guidance_scale": 2.0, "renormalize_logits": True, "penalty_alpha": 0.6}
REFUSED |= {"dola_layers": "high", "num_beam_groups": 2, "diversity_penalty": 0.5, "is_assistant": True}
REFUSED |= {"output_attentions": True, "output_hidden_states": True, "prompt_lookup_num_tokens": 2}
REFUSED |= {"constraints": [1], "force_words_ids": [[5]], "token_healing": True, "assistant_early_exit": 1}
REFUSED |= {"watermarking_config": {"bias": 2.0}, "assistant_ensemble_weight": 0.5, "cache_config": {"nbits": 4}}
REFUSED |= {
    "cache_implementation": "quantized",
    "speculation_type": "any",
    "max_matching_ngram_size": 2,
    "continuous_batching_config": {"num_blocks": 8},
}
NEITHER = {"low_memory", "compile_config", "disable_compile", "max_cache_len", "num_assistant_tokens_schedule"}
NEITHER |= {"assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "transformers_version"}


def test_every_field_of_a_generation_config_is_tried_below():
    """One that a new transformers adds is refused once it is set; whether it should be is to be decided."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= GREEDY.keys() | SAMPLED.keys() | REFUSED.keys() | NEITHER


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", GREEDY)
def test_an_option_of_generate_acts_as_in_generate(llm2, inputs, name):
    options = {"max_new_tokens": 9, "do_sample": False, name: GREEDY[name]}
    tokenizer = {"tokenizer": llm2.tokenizer} if name == "stop_strings" else {}
    if name in ("max_length", "min_length"):
        del options["max_new_tokens"]
    expected = llm2.system1.generate(**inputs, **options, **tokenizer)
    assert torch.equal(llm2.generate(**inputs, **options), expected)
    given = {"eos_token_id": llm2.eos, "pad_token_id": llm2.tokenizer.pad_token_id, **options}
    assert torch.equal(llm2.generate(**inputs, generation_config=GenerationConfig(**given)), expected)


@pytest.mark.parametrize("name", SAMPLED)
def test_an_option_of_sampling_acts_on_the_guided_logits(system1, verifier, name):
    """The scores that tokens are drawn from are the warper's work on the guided logits."""
    generate = GuidedGenerate(Guidance(verifier=verifier, alpha=0.001, beta=3.0))
    options = {"max_new_tokens": 1, "eos_token_id": None, "pad_token_id": 2, "custom_generate": generate}
    options |= {"return_dict_in_generate": True, "output_scores": True, "top_k": 0}
    ids = torch.tensor([[5, 9, 3, 17]])
    guided = system1.generate(ids, do_sample=False, **options).scores[0]
    found = system1.generate(ids, do_sample=True, **{**options, name: SAMPLED[name]}).scores[0]
    kinds = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    kinds |= {"min_p": MinPLogitsWarper, "top_h": TopHLogitsWarper, "typical_p": TypicalLogitsWarper}
    kinds |= {"epsilon_cutoff": EpsilonLogitsWarper, "eta_cutoff": EtaLogitsWarper}
    torch.testing.assert_close(found, kinds[name](SAMPLED[name])(None, guided))
    assert not torch.equal(found, guided)
    passed = system1.generate(ids, do_sample=True, logits_processor=[kinds[name](SAMPLED[name])], **options).scores[0]
    torch.testing.assert_close(passed, found)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_guided_decoding_would_ignore_is_refused(llm2, inputs, name):
    config = GenerationConfig(max_new_tokens=2, pad_token_id=3)
    setattr(config, name, REFUSED[name])
    refuse_ignored(GenerationConfig(), {})
    with pytest.raises(ValueError, match=f"^{name}: found .*, which guided decoding does not do; expected "):
        refuse_ignored(config, {})


def test_a_field_that_a_later_transformers_adds_is_refused_once_it_is_set(llm2, inputs, monkeypatch):
    init = GenerationConfig.__init__

    def later(self, **options):
        self.think_harder = options.pop("think_harder", None)
        init(self, **options)

    monkeypatch.setattr(GenerationConfig, "__init__", later)
    llm2.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="think_harder: found 3, which guided decoding does not do; expected None"):
        llm2.generate(**inputs, max_new_tokens=2, think_harder=3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_beams": 2}, "num_beams: found 2, which guided decoding does not do; expected 1"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha: found 0.6"),
        ({"dola_layers": "high"}, "dola_layers: found 'high'"),
        ({"assistant_model": torch.nn.Module()}, "assistant_model: found a Module"),
        ({"negative_prompt_ids": torch.ones(3, 2)}, "negative_prompt_ids: found a Tensor"),
        ({"custom_generate": print}, "custom_generate: found a builtin_function"),
        ({"position_ids": torch.arange(3, 10).expand(3, -1)}, "position_ids: found others"),
        ({"inputs_embeds": torch.ones(3, 7, 32), "input_ids": None}, "inputs_embeds: guided decoding takes token ids"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_generate_takes_and_guided_decoding_does_not_is_refused(llm2, inputs, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        llm2.generate(**{**inputs, "max_new_tokens": 2, "do_sample": False, **options})


def test_a_cache_with_tokens_is_refused(llm2):
    ids = torch.tensor([[5, 9, 3, 17]])
    output = llm2.system1(ids, use_cache=True)
    name = "cache" if "cache" in output else "past_key_values"
    with pytest.raises(ValueError, match=f"{name}: found 4 tokens, expected none"):
        llm2.generate(torch.cat([ids, ids], dim=-1), max_new_tokens=2, **{name: output[name]})


def test_a_misspelt_guidance_keyword_is_refused_with_and_without_a_verifier(system1, verifier, tokenizer):
    for given in (verifier, None):
        with pytest.raises(TypeError, match="'alhpa'"):
            LLM2(system1, tokenizer, given, alhpa=0.1)
    with pytest.raises(TypeError, match="'alhpa'"):
        LLM2.from_pretrained("no/such/model", alhpa=0.1)


@pytest.fixture(scope="module")
def folders(system1_folder, tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("folders")
    tiny_verifier(folder / "system1", vocab_size=261).save_pretrained(folder / "verifier")
    return system1_folder, str(folder / "verifier")


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "bfloat16"},
        {"torch_dtype": torch.bfloat16},
        {"dtype": None},
        {"device": torch.device("cpu")},
        {"device_map": "cpu"},
        {"device_map": {"": torch.device("cpu")}},
        {"device_map": "auto"},
        {"device_map": None, "device": None},
        {"local_files_only": True, "revision": "main", "token": False, "force_download": False, "cache_dir": None},
        {"trust_remote_code": False},
    ],
    ids=str,
)
def test_arguments_of_from_pretrained_take_the_values_that_transformers_takes(folders, options):
    llm2 = LLM2.from_pretrained(*map(Path, folders), **options)
    expected = torch.bfloat16 if "bfloat16" in str(options) else torch.float32
    assert llm2.system1.dtype == llm2.guidance.verifier.dtype == expected
    assert llm2.system1.device == llm2.guidance.verifier.device == torch.device("cpu")


def test_a_subfolder_is_system1s_alone(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "parts" / "one")
    llm2 = LLM2.from_pretrained(tmp_path / "parts", folders[1], subfolder="one")
    assert llm2.system1.config.vocab_size == len(llm2.tokenizer) == 261


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"dtype": "float23"}, UserError, "dtype: found 'float23', expected auto, float32, bfloat16 or float16"),
        ({"dtype": torch.int8}, UserError, "dtype: found torch.int8"),
        ({"dtype": {"text": "float32"}}, UserError, "dtype: found {'text'"),
        ({"device": "gpu"}, UserError, "device: found 'gpu', expected auto, cpu, cuda or such"),
        ({"device": 1}, UserError, "device cuda:1 needs a CUDA GPU"),
        ({"device": torch.device("cuda", 0)}, UserError, "device cuda:0 needs a CUDA GPU"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, UserError, "device_map: .* expected one device"),
        ({"device_map": "cpu", "device": "cpu"}, UserError, "device_map: .* and device cpu, expected one device"),
        ({"trust_remote_code": True}, UserError, "trust_remote_code: found true, expected false"),
        ({"quantization_config": {}}, TypeError, "takes no 'quantization_config'.* pass it on: LLM2"),
        ({"attn_implementation": "eager"}, TypeError, "takes no 'attn_implementation'"),
        ({"subfolder": "nowhere"}, UserError, "nowhere': expected a folder with config.json, found none"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_other_arguments_of_from_pretrained_are_refused_in_a_sentence(folders, options, error, sentence):
    with pytest.raises(error, match=sentence):
        LLM2.from_pretrained(*folders, **options)


def test_a_device_map_for_several_gpus_is_refused_where_there_are_several(folders, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("auto", "balanced", "sequential"):
        with pytest.raises(UserError, match=f"device_map: found '{name}', expected one device"):
            LLM2.from_pretrained(*folders, device_map=name)
    with pytest.raises(UserError, match="device cuda:2: torch sees 2 GPUs"):
        LLM2.from_pretrained(*folders, device_map=2)


def test_guidance_defaults_are_those_of_the_config(system1, verifier, tokenizer):
    guidance = LLM2(system1, tokenizer, verifier, beta=1.0).guidance
    assert (guidance.alpha, guidance.beta, guidance.top_k) == (0.1, 1.0, None) and guidance.verifier is verifier


def test_chat_answers_what_generate_writes_behind_the_prompt(llm2):
    question = [{"role": "user", "content": "How many?"}]
    ids = torch.tensor([llm2.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)])
    new = llm2.generate(ids, max_new_tokens=9)[0, ids.shape[1] :]
    assert llm2.chat("How many?", max_new_tokens=9) == llm2.tokenizer.decode(new, skip_special_tokens=True) != ""
    assert llm2.chat(question, max_new_tokens=9) == llm2.chat("How many?", max_new_tokens=9)
    assert llm2.chat("How many?", max_new_tokens=9, do_sample=True, seed=3) != llm2.chat("How many?", max_new_tokens=9)
    several = GenerationConfig(do_sample=True, num_return_sequences=2)
    for options in ({"num_return_sequences": 2, "do_sample": True}, {"trace": True}, {"generation_config": several}):
        with pytest.raises(ValueError, match="since chat gives one text; use generate"):
            llm2.chat("How many?", **options)


@torch.inference_mode()
@pytest.mark.parametrize("reduction", ["mean", "min", "last"])
def test_a_solution_is_scored_token_by_token_up_to_its_end(llm2, reduction):
    solutions = ["2 + 2 = 4", "five"]
    found = llm2.score("How many?", solutions, reduction)
    for solution, score in zip(solutions, found, strict=True):
        messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": solution}]
        ids = llm2.tokenizer.apply_chat_template(messages, return_dict=False)
        start = len(llm2.tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False))
        assert ids[-1] in llm2.eos, "the template ends with it"
        scores = llm2.guidance.verifier(torch.tensor([ids])).scores[0, start:]
        expected = {"mean": scores.mean(), "min": scores.min(), "last": scores[-1]}[reduction]
        assert score == pytest.approx(expected.item(), abs=1e-4)
    with pytest.raises(ValueError, match="a score needs a verifier"):
        LLM2(llm2.system1, llm2.tokenizer).score("How many?", solutions)
    with pytest.raises(ValueError, match="reduction: found 'median', expected mean, min, last, product or None"):
        llm2.score("How many?", solutions, "median")
    with pytest.raises(ValueError, match="solutions: found one text, expected a list of texts"):
        llm2.score("How many?", "five", reduction)


def test_chat_takes_the_length_of_a_generation_config(llm2):
    options = {"eos_token_id": -1, "pad_token_id": 3}
    short = llm2.chat("How many?", max_new_tokens=5, **options)
    assert llm2.chat("How many?", generation_config=GenerationConfig(max_new_tokens=5, **options)) == short
    question = [{"role": "user", "content": "How many?"}]
    prompt = llm2.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert llm2.chat("How many?", max_length=len(prompt) + 5, **options) == short


def test_stop_strings_in_the_models_own_generation_config_are_refused(llm2, inputs, monkeypatch):
    monkeypatch.setattr(llm2.system1.generation_config, "stop_strings", ["."])
    with pytest.raises(ValueError, match=r"found \['.'\] in the model's own generation_config, expected None there"):
        llm2.generate(**inputs, max_new_tokens=9)


def test_penalties_and_ngrams_of_a_row_do_not_depend_on_its_padding(llm2):
    rows = [[7, 7, 9, 7], [40, 41, 42, 43, 44, 45, 46, 47], [9]]
    width = max(map(len, rows))
    pad = llm2.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    for option in ({"no_repeat_ngram_size": 2}, {"repetition_penalty": 3.0}, {"encoder_repetition_penalty": 3.0}):
        options = {"max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": pad, **option}
        together = llm2.generate(ids, attention_mask=mask, **options)[:, width:]
        alone = [llm2.generate(torch.tensor([row]), **options)[0, len(row) :] for row in rows]
        assert torch.equal(together, torch.stack(alone))


def test_a_used_llm2_can_be_copied(llm2, inputs):
    expected = llm2.generate(**inputs, max_new_tokens=5)
    for copied in (copy.deepcopy(llm2), pickle.loads(pickle.dumps(llm2))):
        assert torch.equal(copied.generate(**inputs, max_new_tokens=5), expected)


def test_switched_and_merged_adapters_of_system1_act(tokenizer):
    settings = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    system1 = get_peft_model(tiny_system1(vocab_size=261), settings, "first").eval()
    system1.add_adapter("second", settings)
    ids = torch.tensor([[40, 41, 42]])
    options = {"max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 0}

    for model in (system1, system1.get_base_model()):
        llm2, texts = LLM2(model, tokenizer), []

        def found() -> None:
            texts.append(llm2.generate(ids, **options))  # noqa: B023, called at once
            assert torch.equal(texts[-1], model.generate(ids, **options))  # noqa: B023

        found()
        system1.set_adapter("second")
        found()
        system1.merge_adapter()
        found()
        system1.unmerge_adapter()
        with system1.disable_adapter():
            found()
        system1.set_adapter("first")
        assert len({str(text) for text in texts}) == 3  # merged is what it was before


def test_a_processor_behind_ours_may_write_in_place(system1, verifier):
    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 7] = -torch.inf
            return scores

    processors = LogitsProcessorList([GuidedLogitsProcessor(Guidance(verifier=verifier)), Forbid()])
    found = system1.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, logits_processor=processors)
    assert 7 not in found[0, 3:]


def test_a_multimodal_language_model_decodes_and_is_guided(tokenizer, tmp_path):
    text = {"vocab_size": 261, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=260)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ProcessVerifier.from_system1(str(tmp_path)).save_pretrained(tmp_path / "verifier")
    ids = torch.tensor([[40, 41, 42]])
    options = {"max_new_tokens": 5, "eos_token_id": -1, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    for verifier in (None, str(tmp_path / "verifier")):
        llm2 = LLM2.from_pretrained(str(tmp_path), verifier, beta=0.0, device="cpu")
        assert torch.equal(llm2.generate(ids, **options), expected)
