"""What the chat templates of instruct families write around a chat, and which of them our commands accept.

python -m experiments.surprises.templates; needs trl, which carries the families' templates
"""

from collections import Counter
from pathlib import Path

import trl

from llm2.common.chat import render
from llm2.common.loading import load_tokenizer
from llm2.errors import UserError

tokenizer = load_tokenizer("testbed")
user, answer = {"role": "user", "content": " How many? "}, {"role": "assistant", "content": " He has 3.\n\nSo 3. "}
system, developer = ({"role": role, "content": "Be brief."} for role in ("system", "developer"))
counts = Counter()
for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
    if file.stem.endswith("_training"):  # trl's own changes
        continue
    template, said = file.read_text(), []

    def write(messages, template=template, **options):
        try:
            return render(tokenizer, messages, template, **options)
        except UserError as error:
            return error

    prompt, whole = write([user], add_generation_prompt=True), write([user, answer])
    twice = write([user, answer, user, answer])
    if isinstance(whole, UserError):
        causes = {"writes today's date": "date", "leaves out": "leaves out the question", "": "fails"}
        said = ["refused: " + next(cause for words, cause in causes.items() if words in str(whole))]
    else:
        rest = whole.removeprefix(prompt)
        said += ["prompt is another"] if rest == whole else []
        said += ["writes before the answer"] if rest != whole and not rest.startswith((" He", "He")) else []
        said += ["trims"] if answer["content"] not in whole else []
        said += ["nothing ends the answer"] if whole.endswith("So 3.") or whole.endswith("So 3. ") else []
        said += [] if str(twice).startswith(whole) else ["a second turn rewrites the first"]
        said += ["system message of its own"] if "system" in whole.lower() else []
        for message in (system, developer):
            told = write([message, user, answer])
            said += (
                [f"refuses {message['role']}"] if isinstance(told, UserError) and "leaves out" not in str(told) else []
            )
            said += (
                [f"leaves out {message['role']}"] if isinstance(told, UserError) and "leaves out" in str(told) else []
            )
    counts.update(said)
    print(f"{file.stem}: {'; '.join(said) or 'as the messages hold'}")
print(dict(counts.most_common()))
