"""GET /v1/llm2: counts of guided tokens since a server started, so that a client can verify guidance.

`serve` starts the server with SERVER_OPTIONS, which add this endpoint. Does not import vllm.
"""

import json
from typing import Any

from llm2.vllm.core import counts

PATH = "/llm2"  # appended to the API's URL
SERVER_OPTIONS = {
    "worker_extension_cls": "llm2.vllm.proof.CountingWorker",
    "middleware": ["llm2.vllm.proof.Endpoint"],
}


class CountingWorker:
    """A method that vLLM adds to its workers, for `collective_rpc`."""

    def llm2_counts(self) -> dict[str, Any]:
        return counts()


class Endpoint:
    """ASGI middleware that answers PATH with the `counts` of the rank that guided most.

    All tensor-parallel ranks guide, but only a pipeline's last rank. Of several `engines` vLLM asks only the first.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope.get("path") != f"/v1{PATH}":
            return await self.app(scope, receive, send)
        state = scope["app"].state
        ranks = await state.engine_client.collective_rpc("llm2_counts")
        most = max(ranks, key=lambda rank: sum(rank["guided_tokens"].values()))
        body = json.dumps(most | {"engines": state.vllm_config.parallel_config.data_parallel_size}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
