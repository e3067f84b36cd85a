"""Ask the embedded System 1, guided by its System 2. Runs offline in seconds: python examples/decode.py"""

from llm2 import LLM2

llm2 = LLM2.from_pretrained("testbed", "testbed-verifier", beta=None)  # None: the weight that training chose
question = "Nina has 12 shells. Ben has half as many shells as Nina. How many shells do they have together?"
print(llm2.chat(question))
print(llm2.chat(question, do_sample=True, temperature=0.7, seed=1))
