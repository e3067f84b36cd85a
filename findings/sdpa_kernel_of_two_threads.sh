#!/usr/bin/env bash
# torch 2.13.0: sdpa_kernel in two threads leaves an attention kernel turned off for the whole process, and says nothing.
#
# `with sdpa_kernel(...)` sets flags of the process, not of the thread, and puts back those that it found. Where two such blocks
# overlap in time, the one that began second finds the first one's choice and puts that back when it ends last: from then on
# every attention of the process runs without the kernels that were turned off, here in the slow path that keeps all of
# the attention's scores. In between, threads that asked for nothing run with the choice of another one. A server that answers each request in a thread, around a
# model that chooses its kernels by sdpa_kernel, meets this by chance. Seen on a CPU; the flags are the same on a GPU.
#
#   at the start: FLASH_ATTENTION
#   another thread, while one is within sdpa_kernel(MATH): MATH
#   when both have left: MATH
#   flash_sdp_enabled(): False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/probe.py" <<'PYTHON'
import threading

import torch
from torch.backends.cuda import flash_sdp_enabled
from torch.nn.attention import SDPBackend, sdpa_kernel

query = torch.randn(1, 2, 64, 16)


def kernel() -> str:
    """The kernel that attention would take now."""
    return SDPBackend(torch._fused_sdp_choice(query, query, query)).name


def thread(backend: SDPBackend, go: threading.Event, inside: threading.Event, leave: threading.Event) -> threading.Thread:
    def run() -> None:
        go.wait()
        with sdpa_kernel(backend):
            inside.set()
            leave.wait()

    started = threading.Thread(target=run)
    started.start()
    return started


(go1, in1, leave1), (go2, in2, leave2) = ([threading.Event() for _ in range(3)] for _ in range(2))
first, second = thread(SDPBackend.MATH, go1, in1, leave1), thread(SDPBackend.FLASH_ATTENTION, go2, in2, leave2)
print("at the start:", kernel())
go1.set()
in1.wait()
print("another thread, while one is within sdpa_kernel(MATH):", kernel())
go2.set()
in2.wait()
leave1.set()
first.join()
leave2.set()
second.join()
print("when both have left:", kernel())
print("flash_sdp_enabled():", flash_sdp_enabled())
PYTHON
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") "$folder/seen" && echo "torch 2.13.0: as described"
