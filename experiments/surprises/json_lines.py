"""What `datasets` makes of chats and answers in JSON Lines: each line of output is a file, as it is read back.

python -m experiments.surprises.json_lines
"""

import json
import tempfile
from pathlib import Path

import datasets

datasets.disable_progress_bars()
datasets.logging.set_verbosity_error()
folder = Path(tempfile.mkdtemp())
CHAT = [{"role": "user", "content": "12"}, {"role": "assistant", "content": "2."}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "7"}]}]
LONG = [{"text": "x" * 900}] * 30_000  # more than the first block, from which the types are taken


def read(name, lines, show):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"))
        print(f"{name}: {show(rows)}")
    except datasets.exceptions.DatasetGenerationError as error:
        print(f"{name}: {type(error.__cause__).__name__}: {str(error.__cause__).splitlines()[0]}")


read("texts", [{"messages": CHAT}], lambda rows: rows[0])
read("one chat with parts", [{"messages": CHAT}, {"messages": PARTS}], lambda rows: rows[0])
read("ids", [{"id": each} for each in (1, "1", "01", "1.0", "1e3")], lambda rows: rows["id"][:])
read(
    "instants",
    [{"answer": f"2024-01-05T10:00:00{zone}"} for zone in ("Z", "+02:00", "")],
    lambda rows: rows["answer"][:],
)
read("great numbers", [{"answer": 2**53 + 1}, {"answer": 0.5}], lambda rows: rows["answer"][:])
for name, early, late in (("a string late", 3, "1/2"), ("a number late", "03", 3), ("a fraction late", 3, 0.5)):
    read(name, [line | {"answer": early} for line in LONG] + [{"text": "", "answer": late}], lambda rows: rows[-1])
read("a key late", [*LONG, {"text": "", "quality": 1.0}], lambda rows: rows[-1])
