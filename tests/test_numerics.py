"""In 16 bits nothing becomes NaN, and a number that is NaN or infinite ends a run with its problem and position."""

import math

import pytest
import torch
from conftest import tiny_system1
from test_collate import model_inputs
from test_decoder import EOS, of_family, prompts, use_padded_batches
from test_prefix_score import prefix_verifier

from llm2.common.loading import load_tokenizer
from llm2.config import TrainConfig, VerifierSpec
from llm2.decoding import scheduler
from llm2.decoding.candidates import plausible
from llm2.decoding.decoder import Decoder
from llm2.decoding.logits_processor import GuidedLogitsProcessor
from llm2.decoding.output_layer import guided_model
from llm2.decoding.sampling import Guidance, SamplingParams
from llm2.decoding.system2.reader import Reader
from llm2.errors import UserError
from llm2.verifier.arguments import new_verifier
from llm2.verifier.collate import verifier_batch
from llm2.verifier.loss import pairwise_loss
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.scoring import score_tokens
from llm2.verifier.train import train
from llm2.verifier.triplets import EMPTY_EXAMPLE, Example, Triplet, record_line

HALVES = [torch.bfloat16, torch.float16]
LONG = [[*range(3, 60)] * 2, [5], [7, 8], [*range(3, 60)] * 2 + [9]]  # a prompt of one token beside one of 114


@pytest.mark.one_in(5)
@pytest.mark.parametrize("layout", ["varlen", "padded", "graphs"])
@pytest.mark.parametrize(
    "kind, family, dtype",
    [
        ("full", "llama", torch.float16),
        ("lora", "gemma2", torch.bfloat16),  # gemma2: soft caps, windows
        pytest.param("full", "llama", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("lora", "gemma2", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_decoding_in_16_bits_gives_finite_numbers(dtype, layout, kind, family, tmp_path, monkeypatch):
    if layout == "padded":
        use_padded_batches(monkeypatch)
    monkeypatch.setattr(scheduler, "MIN_IN_PLACE_TOKENS", 0)
    lora = {"lora": {"rank": 4}} if kind == "lora" else {}
    model, verifier = of_family(family, tmp_path, windowed=family == "gemma2", **lora)
    model, verifier = model.to(dtype), (verifier.to(dtype) if not lora else verifier)
    if lora:
        options = {"attn_implementation": "eager", "dtype": dtype}
        verifier = ProcessVerifier.from_system1(str(tmp_path), VerifierSpec(kind="lora", lora_r=4), **options).eval()
    decoder = Decoder(model, Guidance(verifier=verifier, alpha=0.001, beta=3.0), graphs=layout == "graphs")
    for sampling in (None, SamplingParams()):
        completions = decoder.decode(
            LONG, max_new_tokens=6, eos=EOS, sampling=sampling, seeds=[[1, 2]] * 4, batch_size=3, trace=True
        )
        numbers = [
            number
            for samples in completions
            for completion in samples
            for token in completion.trace
            for number in [*token.logprobs, *(token.scores or [])]
        ]
        assert len(numbers) > 100 and all(map(math.isfinite, numbers))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("branches", [True, False])
def test_training_in_16_bits_gives_finite_losses_and_gradients(dtype, attention, branches, tmp_path):
    """Batches of a long row beside short ones, of solutions without branches, of nothing but empty examples."""
    tiny_system1().save_pretrained(tmp_path)
    spec = VerifierSpec(kind="full" if branches else "prefix")
    verifier = ProcessVerifier.from_system1(str(tmp_path), spec, dtype=dtype, attn_implementation=attention)
    long = Example([*range(3, 60)] * 5, [Triplet(1, 4, 9), Triplet(284, 59, 8)])
    for batch in ([long, EMPTY_EXAMPLE, Example([3, 4], [Triplet(1, 4, 5)])], [EMPTY_EXAMPLE] * 3, [EMPTY_EXAMPLE]):
        verifier.zero_grad()
        tensors = verifier_batch(batch, branches=branches, lm_targets=True)
        output = verifier.train()(**model_inputs(tensors), targets=tensors.targets)
        loss = pairwise_loss(output.margins, tensors.pair_weights, targets=tensors.pair_targets)
        loss = loss + 0.1 * output.lm_loss.sum()
        loss.backward()
        gradients = [each.grad for each in verifier.parameters() if each.grad is not None]
        assert gradients and loss.isfinite() and all(each.isfinite().all() for each in gradients)


@pytest.mark.parametrize("dtype", HALVES)
def test_scoring_in_16_bits_with_long_padding_gives_finite_scores(dtype, verifier):
    half = ProcessVerifier(verifier.config)
    half.load_state_dict(verifier.state_dict())
    scores = score_tokens(half.to(dtype).eval(), LONG, [[4, 5], [6] * 300, [7], [8, 9]])
    assert [len(row) for row in scores] == [2, 300, 1, 2]


# --- A number that is not finite ---


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("names, called", [(None, "prompt 3"), ([f"test-{i}" for i in range(5)], "problem 'test-3'")])
def test_a_score_that_is_not_finite_ends_decoding_with_problem_and_position(
    system1, verifier, value, names, called, monkeypatch
):
    batch, score = prompts(5), Reader.score

    def spoilt(self, handles, candidates):
        scores = score(self, handles, candidates)
        for row, handle in enumerate(handles):
            if handle.token_ids[: len(batch[3])] == batch[3] and len(handle.token_ids) >= len(batch[3]) + 2:
                scores[row, len(candidates.lists[row]) - 1] = value
        return scores

    monkeypatch.setattr(Reader, "score", spoilt)
    decoder = Decoder(system1, Guidance(verifier=verifier, alpha=0.001, beta=1.0))
    position = len(batch[3]) + 2
    with pytest.raises(
        UserError, match=rf"^{called}, position {position} \(new token 2\): .* token \d+ is {value}, exp"
    ):
        decoder.decode(batch, max_new_tokens=6, eos=[], names=names)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("sampling", [None, SamplingParams(), SamplingParams(temperature=0.5, top_p=0.9)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_ends_decoding(system1, verifier, guided, sampling, value):
    def spoil(indices, new, logits):
        for row, (index, tokens) in enumerate(zip(indices, new, strict=True)):
            if index == 1 and len(tokens) == 1:
                logits[row, 40] = value
        return logits

    guidance = Guidance(verifier=verifier, alpha=0.1) if guided else None
    options = {"sampling": sampling, "seeds": [[1], [2], [3]], "process_logits": spoil}
    with pytest.raises(UserError, match=rf"^prompt 1, position .* System 1's logit of token 40 is {value}"):
        Decoder(system1, guidance).decode(prompts(3), max_new_tokens=4, eos=[], **options)


def test_a_row_of_nan_moves_no_other_rows_candidates():
    logits = torch.tensor([[0.0, math.nan, 1.0], [2.0, 2.0, -9.0]])
    candidates, valid = plausible(logits, 0.5)
    assert candidates[0, 0] == 1 and candidates[1, :2].tolist() == [0, 1] and valid[1].tolist() == [True, True, False]


def test_a_solution_whose_score_is_not_finite_is_named(verifier):
    broken = ProcessVerifier(verifier.config)
    broken.load_state_dict(verifier.state_dict())
    with torch.no_grad():
        broken.get_input_embeddings().weight[9] = math.nan
    with pytest.raises(
        UserError, match=r"^problem 'b', position 2 \(token 0 of the solution\): the verifier's score is nan"
    ):
        score_tokens(broken.eval(), [[3, 4], [5, 6]], [[7, 8], [9, 7]], names=["a", "b"])


@pytest.mark.parametrize("kind", ["logits processor", "output layer"])
def test_a_score_that_is_not_finite_ends_transformers_generate(kind, system1, verifier, tmp_path):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 2}
    if kind == "logits processor":
        broken = ProcessVerifier(verifier.config)
        broken.load_state_dict(verifier.state_dict())
        with torch.no_grad():
            broken.score.weight[:] = math.nan
        model = system1
        guidance, mask = Guidance(verifier=broken.eval(), alpha=0.001), torch.ones(2, 3)
        options["logits_processor"] = [GuidedLogitsProcessor(guidance, attention_mask=mask)]
    else:
        head = prefix_verifier(tmp_path, system1, "bilinear")
        with torch.no_grad():
            next(head.score.parameters())[:] = math.nan
        model = guided_model(system1, Guidance(verifier=head, alpha=0.001))
    with pytest.raises(UserError, match=r"^row 0: the verifier's score of token \d+ is nan, expected a finite number"):
        model.generate(torch.tensor([[5, 6, 7], [8, 9, 10]]), **options)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("changes", [{}, {"kind": "prefix"}, {"lm_loss_coef": 0.1, "logging_steps": 1}])
@pytest.mark.parametrize("line", [4, 21])
def test_training_that_becomes_nan_names_the_solution(system1_folder, tmp_path, monkeypatch, changes, line):
    """One solution has a token whose embedding is NaN; what follows spoils all weights, and is not what is named."""
    tokenizer = load_tokenizer(system1_folder)
    right, wrong, spoilt = (tokenizer(text)["input_ids"][0] for text in "74#")
    lines = [record_line([{"role": "user", "content": "no triplet"}], [])]
    while len(lines) < 24:
        question = "#" if len(lines) == line - 1 else "?"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "7"}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        lines.append(record_line(messages, [Triplet(len(ids) - 2, right, wrong)]))
    (tmp_path / "triplets.jsonl").write_text("".join(lines))

    def spoilt_verifier(*arguments):
        verifier = new_verifier(*arguments)
        with torch.no_grad():
            verifier.get_input_embeddings().weight[spoilt] = math.nan
        return verifier

    monkeypatch.setattr("llm2.verifier.trainer.new_verifier", spoilt_verifier)
    config = {
        "model": system1_folder,
        "train_file": str(tmp_path / "triplets.jsonl"),
        "output_dir": str(tmp_path / "v"),
    }
    config |= {"eval_share": 0.2, "global_batch_size": 4, "per_device_train_batch_size": 4, "device": "cpu", **changes}
    with pytest.raises(
        UserError, match=rf"^step \d+, line {line} of the solutions that are .*, position {len(ids) - 2}: "
    ):
        train(TrainConfig(**config))
    assert not list((tmp_path / "v").glob("*.safetensors")), "nothing is saved"
