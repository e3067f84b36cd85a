"""Nothing is reached over a network unless a hub id is named, and nothing about the user lands in a file.

The commands run in a home folder, as a user and on a host with marked names, with marked tokens in the environment, and
with sockets that refuse every address; where Linux allows it, in a network namespace without any network as well.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

from tests.robustness.commands import ROOT
from tests.robustness.row import Row

MARK = "marked7f3a"
SECRETS = {
    "HF_TOKEN": f"hf_{MARK}HuggingFaceToken",
    "WANDB_API_KEY": f"{MARK}0123456789abcdef0123456789ab",
    "OPENAI_API_KEY": f"sk-{MARK}OpenAI",
    "USER": f"{MARK}user",
    "LOGNAME": f"{MARK}user",
    "USERNAME": f"{MARK}user",
    "HOSTNAME": f"{MARK}host",
}
# Python imports it at its start. Unix sockets stay: processes of one machine use them.
GUARD = f"""
import os, platform, socket

def refuse(self, address, *others):
    if self.family == socket.AF_UNIX:
        return connect(self, address)
    with open(os.environ["REACHED"], "a") as file:
        print(address, file=file)
    raise OSError(f"the test refuses the address {{address}}")

def resolve(host, *others, **options):
    with open(os.environ["REACHED"], "a") as file:
        print(host, file=file)
    raise socket.gaierror(f"the test refuses the host {{host}}")

connect = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.gethostbyname = resolve
socket.gethostname = platform.node = lambda: "{MARK}host"
"""
SIZES = ["eval_share=0.3", "global_batch_size=4", "per_device_train_batch_size=4", "num_train_epochs=1.0"]
TASK = ["task=testbed", "max_new_tokens=120", "batch_size=64"]
# In one process: starting Python anew for every command would take longer than the commands.
DRIVER = """
import json, sys
from llm2.__main__ import main
for arguments in json.loads(sys.argv[1]):
    if status := main(arguments):
        sys.exit(f"{arguments}: status {status}")
from llm2.verifier.model import ProcessVerifier
ProcessVerifier.from_pretrained(sys.argv[2])  # its base_model is found again
"""


@cache
def without_network() -> list[str]:
    """What a command line begins with to run in namespaces of its own, without network; nothing if not allowed."""
    isolated = ["unshare", "--map-root-user", "--net", "--uts"]
    try:
        allowed = subprocess.run([*isolated, "true"], capture_output=True).returncode == 0
    except OSError:  # no unshare
        allowed = False
    return isolated if allowed else []


def marked_environment(folder: Path) -> dict[str, str]:
    """HOME, user, host and tokens with the mark, and the guard; nothing that says to stay offline."""
    home = folder / f"{MARK}home"
    (folder / "guard").mkdir()
    home.mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    kept = {key: value for key, value in os.environ.items() if "OFFLINE" not in key and "proxy" not in key.lower()}
    path = f"{folder / 'guard'}:{ROOT}"
    return kept | SECRETS | {"HOME": str(home), "PYTHONPATH": path, "REACHED": str(folder / "reached.txt")}


def commands(home: Path) -> list[list[str]]:
    """The method from end to end, with absolute paths under the home folder, as completion in a shell writes them."""
    model = [f"model={home / 'models' / 'system1'}", "device=cpu"]
    triplets, out = home / "out" / "triplets.jsonl", home / "out"
    train = ["train", *model, f"train_file={triplets}", *SIZES]
    return [
        ["explore", *model, *TASK, f"output={triplets}", "limit=12"],
        [*train, f"output_dir={out / 'full'}"],
        [*train, f"output_dir={out / 'lora'}", "kind=lora", "lora_r=2"],
        ["evaluate", *model, *TASK, f"verifier={out / 'lora'}", f"output_dir={out / 'results'}", "limit=4"],
        ["report", str(out / "results")],
    ]


def run_commands(folder: Path) -> tuple[subprocess.CompletedProcess, Path]:
    """Run `commands` in `folder`; returns how they ended, and the home folder."""
    environment = marked_environment(folder)
    home = Path(environment["HOME"])
    shutil.copytree(ROOT / "llm2" / "testbed" / "system1", home / "models" / "system1")
    line = [*without_network(), sys.executable, "-c", DRIVER, json.dumps(commands(home)), str(home / "out" / "lora")]
    return subprocess.run(line, cwd=home, env=environment, capture_output=True, text=True), home


def addresses_asked_for(folder: Path) -> list[str]:
    """The addresses that were asked for."""
    path = folder / "reached.txt"
    return path.read_text().splitlines() if path.exists() else []


def leaks(folder: Path) -> tuple[list[str], int]:
    """The files that hold the mark in their name or content, archives unpacked; and how many were searched."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {str(path.relative_to(folder)): path for path in paths}
    return [name for name, path in names.items() if MARK in name or _holds(path)], len(paths)


def _holds(path: Path) -> bool:
    contents = [path.read_bytes()]
    if zipfile.is_zipfile(path):  # what torch.save writes
        with zipfile.ZipFile(path) as archive:
            contents += [archive.read(name) for name in archive.namelist()]
    return any(MARK.encode() in content for content in contents)


def run(folder: Path, scale: float) -> list[Row]:
    """The commands and, at full scale, the whole quickstart from a copy of the checkout."""
    small = folder / "commands"
    small.mkdir(parents=True)
    finished, home = run_commands(small)
    found, searched = leaks(home / "out")
    where = "a namespace without network" if without_network() else "sockets that refuse"
    asked = addresses_asked_for(small)
    rows = [
        Row(
            f"commands in {where}",
            len(commands(home)),
            int(finished.returncode != 0),
            finished.stderr[-300:] * (finished.returncode != 0),
        ),
        Row("addresses asked for", len(commands(home)), len(asked), ", ".join(asked[:3])),
        Row("files searched for tokens, user, host and home", searched, len(found), ", ".join(found[:3])),
    ]
    if scale >= 1:
        rows.append(_quickstart(folder / "quickstart"))
    return rows


def _quickstart(folder: Path) -> Row:
    folder.mkdir(parents=True)
    environment = marked_environment(folder)
    checkout = folder / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    (checkout / ".venv").mkdir()
    for path in (ROOT / ".venv").iterdir():
        (checkout / ".venv" / path.name).symlink_to(path.resolve())
    (checkout / ".venv" / "requirements.installed").unlink(missing_ok=True)
    shutil.copy(ROOT / "requirements.txt", checkout / ".venv" / "requirements.installed")  # it is set up
    environment["PYTHONPATH"] = str(folder / "guard")
    line = [*without_network(), "bash", "scripts/quickstart.sh"]
    finished = subprocess.run(line, cwd=checkout, env=environment, capture_output=True, text=True)
    found, searched = leaks(checkout / "results")
    asked = addresses_asked_for(folder)
    failed = (finished.returncode != 0) + len(asked) + len(found)
    tail = finished.stderr[-300:] if finished.returncode else ""
    return Row(
        "the quickstart without network", 1, failed, tail or f"{searched} files searched, {len(asked)} addresses"
    )
