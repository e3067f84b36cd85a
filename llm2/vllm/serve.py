"""The command `serve`: check the config, print an example request, start vLLM's OpenAI-compatible server."""

import json
import runpy
import shlex
import sys
from dataclasses import replace
from typing import Any

from llm2.common.chat import encode_chats, resolve_template
from llm2.common.loading import load_tokenizer
from llm2.config import GuidanceConfig, ServeConfig
from llm2.decoding.processing import require_processor
from llm2.errors import UserError
from llm2.verifier.load import require_same_template, require_verifier
from llm2.vllm.checks import resolve_guidance
from llm2.vllm.engine import check_options, engine_options, require_vllm
from llm2.vllm.proof import SERVER_OPTIONS
from llm2.vllm.settings import NO_PENALTY, guidance_args

QUESTION = "Nina has 12 shells. Ben has half as many shells as Nina. How many shells do they have together?"


def check(config: ServeConfig) -> None:
    """Raise UserError for keys that do not fit, a missing verifier, a chat template not its own or with a date."""
    require_verifier(config.verifier)
    require_processor(config, in_vllm=True)
    if config.float16_weights:
        raise UserError("float16_weights: found true, expected false: vLLM keeps its own weights")
    if config.server is not None:
        raise UserError(f"server: found {config.server!r}, expected null: this command starts one")
    require_same_template(config.verifier, config.model, config.chat_template)
    chat = [{"role": "user", "content": QUESTION}]
    encode_chats(load_tokenizer(config.model), [chat], resolve_template(config.chat_template), generation_prompt=True)


def serve(config: ServeConfig) -> None:
    """Runs until it is interrupted."""
    check(config)
    require_vllm()
    guidance = resolve_guidance(config, config.verifier)
    # Without beta the others are still those of requests that do not set them.
    default = guidance if config.guide_by_default else replace(guidance, beta=None)
    options = engine_options(config, config.verifier, default)
    check_options(options)
    extra = {"max_num_seqs": config.batch_size, "data_parallel_size": config.data_parallel}
    extra["override_generation_config"] = NO_PENALTY  # a model's own would refuse guided requests
    extra |= {"served_model_name": config.model, "host": config.host, "port": config.port, "seed": config.seed}
    if config.chat_template is not None:
        extra["chat_template"] = resolve_template(config.chat_template)
    print(f"once the server is up:\n\n{curl(config, guidance)}\n", flush=True)
    sys.argv = ["serve", *command_line(options | SERVER_OPTIONS | extra)]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


def command_line(options: dict[str, Any]) -> list[str]:
    """Arguments of `LLM` as command line of the server."""
    arguments = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *value]
        else:
            arguments += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments


def curl(config: ServeConfig, guidance: GuidanceConfig) -> str:
    """A curl command with a guided request."""
    content = {
        "model": config.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 200,
        "temperature": 0,
        "vllm_xargs": guidance_args(guidance),
    }
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    url = f"http://{host}:{config.port}/v1/chat/completions"
    return f"curl -s {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(content))}"
