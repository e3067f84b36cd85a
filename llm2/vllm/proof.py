"""What guidance has done since a server started: GET /v1/llm2, so that a client need not trust that it is guided.

`serve` starts the server with SERVER_OPTIONS, which make it answer. Imports no vLLM.
"""

from typing import Any

from llm2.vllm.core import counts

PATH = "/llm2"  # behind the URL of the API
SERVER_OPTIONS = {
    "worker_extension_cls": "llm2.vllm.proof.CountingWorker",
    "middleware": ["llm2.vllm.proof.endpoint"],
}


class CountingWorker:
    """A method that vLLM adds to its workers, for `collective_rpc`."""

    def llm2_counts(self) -> dict[str, Any]:
        return counts()


async def endpoint(request: Any, call_next: Any) -> Any:
    """The `counts` of the rank that guided most: ranks of tensor parallelism guide alike, a pipeline's last one alone.

    Of several data-parallel `engines` vLLM asks the first one only.
    """
    if request.url.path != f"/v1{PATH}":
        return await call_next(request)
    from starlette.responses import JSONResponse

    state = request.app.state
    ranks = await state.engine_client.collective_rpc("llm2_counts")
    most = max(ranks, key=lambda rank: sum(rank["guided_tokens"].values()))
    return JSONResponse(most | {"engines": state.vllm_config.parallel_config.data_parallel_size})
