"""Train a verifier on triplets: python examples/train.py [TRIPLETS.jsonl [OUTPUT_DIR]]

dataset/README.md explains their format; `llm2 check FILE --tokenizer MODEL` checks each position.
"""

import sys

from llm2 import LLM2, TrainConfig, train

config = TrainConfig(
    model="testbed",
    train_file=sys.argv[1] if len(sys.argv) > 1 else "dataset/testbed.jsonl",
    output_dir=sys.argv[2] if len(sys.argv) > 2 else "results/examples/verifier",
    kind="bilinear",  # a head on System 1's states; leave it out for the paper's verifier
    num_train_epochs=6.0,
    learning_rate=1e-2,
    global_batch_size=32,
    per_device_train_batch_size=32,
    device="cpu",
)
metrics = train(config)
print(f"held-out pairs in which gold is preferred: {metrics['eval_pair_accuracy']:.1%}")
question = "Ann has 3 apples. Ben has 4 times as many apples as Ann. How many apples do they have together?"
print(LLM2.from_pretrained(config.model, config.output_dir, beta=None).chat(question))
