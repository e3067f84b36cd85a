"""Train the testbed's System 1 from scratch on the careless corpus, and write its model card.

An interrupted run resumes from its last checkpoint; a model in the output folder is replaced only when the new one is
done.
"""

import shutil
from itertools import chain, islice
from math import gcd
from pathlib import Path
from statistics import fmean

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from experiments.testbed.config import PretrainConfig
from experiments.testbed.corpus import careless_conversations
from experiments.testbed.model_card import measured_card
from experiments.testbed.tokenizer import MIN_VOCABULARY, train_tokenizer
from llm2.common.chat import encode_chats
from llm2.common.distributed import dist_info
from llm2.common.files import whole_files
from llm2.errors import UserError
from llm2.verifier.checkpoints import TRAINER_STATE, begin, last_whole_checkpoint, require_own
from llm2.verifier.loss import IGNORE_INDEX

TOKENIZER_SAMPLE = 20_000  # conversations that the tokenizer is trained on
CONTEXT = 1024
INITIALIZER_RANGE = 0.06  # at this width far better in short trials than the usual 0.02
Conversation = list[dict[str, str]]


def check(config: PretrainConfig) -> None:
    """Raises UserError for a shape that no Llama has, and for several processes."""
    if (found := dist_info().world_size) > 1:
        raise UserError(f"pretrain: found {found} processes, expected 1: the model is too small to share")
    for key, divisor in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        if getattr(config, key) % getattr(config, divisor):
            expected = f"a multiple of {divisor}={getattr(config, divisor)}"
            raise UserError(f"{key}: found {getattr(config, key)}, expected {expected}")
    if config.hidden_size // config.num_attention_heads % 2:
        raise UserError(
            f"hidden_size: found {config.hidden_size}, expected an even width for each of num_attention_heads="
            f"{config.num_attention_heads}: rotary embeddings rotate pairs"
        )
    if config.vocab_size < MIN_VOCABULARY:
        raise UserError(
            f"vocab_size: found {config.vocab_size}, expected at least {MIN_VOCABULARY}: all bytes and special tokens"
        )


def pretrain(config: PretrainConfig) -> None:
    """Train and write System 1, its tokenizer and its model card to config.output_dir."""
    check(config)
    output = Path(config.output_dir)
    checkpoints = output / "checkpoints"
    if (last := last_whole_checkpoint(checkpoints)) is not None:
        require_own(checkpoints, config, {}, f"set that back, or delete {checkpoints}")
    begin(checkpoints, config, {})
    set_seed(config.seed)
    print(f"writing {config.documents:,} careless solutions ...", flush=True)
    conversations = list(careless_conversations(config.documents, config.seed))
    texts = (message["content"] for message in chain(*islice(conversations, TOKENIZER_SAMPLE)))
    tokenizer = train_tokenizer(texts, config.vocab_size)
    model = new_model(config, tokenizer)
    trainer = Trainer(
        model,
        pretraining_arguments(config, checkpoints),
        train_dataset=examples(conversations, tokenizer),
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
    )
    if last is not None and last.name == f"checkpoint-{config.max_steps}":  # the Trainer would go beyond it
        model = LlamaForCausalLM.from_pretrained(last, local_files_only=True)
        history = TrainerState.load_from_json(str(last / TRAINER_STATE)).log_history
    else:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        history = trainer.state.log_history
    # Of the whole run, whereas the Trainer's own figure begins anew when a run is resumed.
    loss = fmean(entry["loss"] for entry in history if "loss" in entry)
    model.config.use_cache = True  # the Trainer turned it off
    card = measured_card(config, model.eval(), tokenizer, loss)
    with whole_files(output) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        Path(new, "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(checkpoints, ignore_errors=True)


def new_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            **config.shape() | {"vocab_size": len(tokenizer)},
            max_position_embeddings=CONTEXT,
            initializer_range=INITIALIZER_RANGE,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def pretraining_arguments(config: PretrainConfig, checkpoints: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        train_sampling_strategy="group_by_length",
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_ratio * config.max_steps),
        adam_beta2=0.95,
        weight_decay=0.05,
        save_steps=config.save_steps,
        save_total_limit=1,
        logging_steps=gcd(50, config.save_steps, config.max_steps),  # a checkpoint forgets an interval that it cuts
        dataloader_pin_memory=False,
        report_to="none",
        seed=config.seed,
    )


def examples(conversations: list[Conversation], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    """Token ids of whole conversations; the loss is on the assistant's message, its <|eot_id|> included."""
    whole = encode_chats(tokenizer, conversations)
    prompts = encode_chats(tokenizer, [conversation[:1] for conversation in conversations], generation_prompt=True)
    return [
        {"input_ids": ids, "labels": [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]}
        for ids, prompt in zip(whole, prompts, strict=True)
    ]


def collate(batch: list[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """input_ids and labels (B, T), padded on the right, where causal attention needs no mask."""
    length = max(len(example["input_ids"]) for example in batch)
    return {
        name: torch.tensor([example[name] + [filler] * (length - len(example[name])) for example in batch])
        for name, filler in (("input_ids", pad), ("labels", IGNORE_INDEX))
    }
