"""Guided decoding in vLLM, which is installed by scripts/setup_vllm.sh: python examples/vllm_guided.py

A prefix head lives inside the model: `architectures` names System 1's class with the head's states shown.
"""

from vllm import LLM, SamplingParams

from llm2.common.loading import model_path

if __name__ == "__main__":  # vLLM starts processes
    llm = LLM(
        model=model_path("testbed"),
        hf_overrides={"architectures": ["LLM2LlamaForCausalLM"]},
        logits_processors=["llm2.vllm:GuidedProcessor"],
        additional_config={"llm2_verifier": model_path("testbed-verifier")},
        dtype="float32",
        max_model_len=256,
    )
    question = "Nina has 12 shells. Ben has half as many shells as Nina. How many shells do they have together?"
    for guidance in ({}, {"llm2_beta": 0.5}):
        sampling = SamplingParams(temperature=0.0, max_tokens=120, extra_args=guidance)
        answers = llm.chat([{"role": "user", "content": question}], sampling)
        print("guided:" if guidance else "plain:", answers[0].outputs[0].text)
