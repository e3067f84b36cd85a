"""A tiny System 1 that answers the weekday questions of llm2/tasks/README.md, often wrongly."""

import random
from pathlib import Path

import torch
from conftest import tiny_system1, tiny_tokenizer

from llm2.common.chat import LLAMA3_PLAIN, encode_chats
from llm2.tasks import Task

STEPS = 150


def save_weekday_model(folder: Path, task: Task) -> str:
    """Trained on solutions of which a half name another day."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = LLAMA3_PLAIN
    problems = task.problems("train", 40)
    draw = random.Random(0)
    conversations = []
    for problem in problems * 4:
        messages = task.conversation(problem)
        if draw.random() < 0.5:
            other = draw.choice([day for day in ("Monday", "Thursday", "Sunday") if day != problem.gold])
            messages[-1] = {"role": "assistant", "content": problem.solution.replace(f" {problem.gold}.", f" {other}.")}
        conversations.append(messages)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_system1(
        vocab_size=len(tokenizer), initializer_range=0.05, pad_token_id=tokenizer.pad_token_id, **special
    )
    texts = encode_chats(tokenizer, conversations)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        batch = [torch.tensor(ids) for ids in draw.sample(texts, 16)]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
