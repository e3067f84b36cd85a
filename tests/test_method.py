"""The method end to end, small: a verifier trained on a part of dataset/ corrects System 1's mistakes."""

from itertools import islice
from pathlib import Path

import pytest

from llm2.config import EvaluateConfig, TrainConfig
from llm2.evaluation.evaluate import evaluate
from llm2.verifier.train import train

SYSTEM1 = "llm2/testbed/system1"


@pytest.mark.long
def test_system2_lifts_greedy_on_unseen_problems(tmp_path):
    with open("dataset/testbed.jsonl") as file:
        Path(tmp_path, "some.jsonl").write_text("".join(islice(file, 300)))
    metrics = train(
        TrainConfig(
            model=SYSTEM1,
            train_file=str(tmp_path / "some.jsonl"),
            output_dir=str(tmp_path / "verifier"),
            eval_share=0.5,  # enough pairs to compare the verifier with System 1
            num_train_epochs=2.0,
            learning_rate=1e-3,
            global_batch_size=16,
            per_device_train_batch_size=16,
            evaluations=1,
            device="cpu",
        )
    )
    assert metrics["eval_pair_accuracy"] > metrics["system1_pair_accuracy"]
    results = evaluate(
        EvaluateConfig(
            model=SYSTEM1,
            verifier=str(tmp_path / "verifier"),
            output_dir=str(tmp_path / "results"),
            task="testbed",
            split="validation",
            limit=60,
            beta=1.0,
            max_new_tokens=200,
            batch_size=60,
            device="cpu",
        )
    )
    plain, guided = (results["modes"][mode]["accuracy"] for mode in ("plain_greedy", "guided_greedy"))
    assert guided >= plain + 0.1, "measured with all of dataset/: see the README"
