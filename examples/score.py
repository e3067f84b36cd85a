"""Choose the best of several solutions by the verifier: python examples/score.py"""

from llm2 import LLM2

llm2 = LLM2.from_pretrained("testbed", "testbed-verifier")
question = "Nina has 12 shells. Ben has half as many shells as Nina. How many shells do they have together?"
solutions = [llm2.chat(question, do_sample=True, temperature=1.0, seed=seed) for seed in range(4)]
for score, solution in sorted(zip(llm2.score(question, solutions), solutions, strict=True), reverse=True):
    print(f"{score:6.2f}  {solution}")
