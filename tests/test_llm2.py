"""LLM2 takes and returns what transformers' `generate` does; guidance as a custom_generate and a LogitsProcessor."""

import pytest
import torch
from conftest import VOCABULARY, tiny_verifier
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from llm2 import LLM2
from llm2.decoding.llm2 import GuidedGenerate
from llm2.decoding.logits_processor import GuidedLogitsProcessor
from llm2.decoding.sampling import Guidance


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
    processor = LogitsProcessorList([GuidedLogitsProcessor(guidance, pad_token_id=2)])
    assert torch.equal(custom, system1.generate(ids, logits_processor=processor, **options))
    assert not torch.equal(custom, plain)


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
            self.cached_ids = [[] for _ in self.cached_ids]
            return super().__call__(input_ids, scores)

    ids = torch.tensor([[5, 9, 3, 17], [8, 30, 21, 4]])
    written = [
        system1.generate(
            ids,
            num_beams=3,
            do_sample=False,
            max_new_tokens=10,
            pad_token_id=2,
            logits_processor=LogitsProcessorList([kind(Guidance(verifier=verifier, alpha=0.01, beta=2.0))]),
        )
        for kind in (GuidedLogitsProcessor, Forgetful)
    ]
    assert torch.equal(*written)


def test_beam_search_is_refused(llm2, inputs):
    with pytest.raises(ValueError, match="does not search beams"):
        llm2.generate(**inputs, max_new_tokens=2, num_beams=2)


def test_a_misspelt_guidance_keyword_is_refused_with_and_without_a_verifier(system1, verifier, tokenizer):
    for given in (verifier, None):
        with pytest.raises(TypeError, match="'alhpa'"):
            LLM2(system1, tokenizer, given, alhpa=0.1)
    with pytest.raises(TypeError, match="'alhpa'"):
        LLM2.from_pretrained("no/such/model", alhpa=0.1)


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
