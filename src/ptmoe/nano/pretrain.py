"""Pretrain `nano` from scratch: `python -m ptmoe.nano.pretrain --output DIR`.

A model of Llama's architecture with about two million parameters learns the skills of `ptmoe.nano.world`, each
instructed in words. The loss covers the answers only (over all tokens the random inputs would drown the signal), and
each row packs several records, each with its own positions and attention. The seed is fixed and the run is on the CPU.
It writes a checkpoint every 300 steps and resumes from it when started again.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ptmoe.files import replaced, save_tensors
from ptmoe.nano.world import Record, instructed

SEED = 20250519
VOCABULARY = 512
ROW_TOKENS = 128
ROWS = 48
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
# Copying is learned first, with all skills in equal shares; then the slower skills, at larger shares.
PHASES = (0, 400)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the world's text: it encodes any text, digits individually."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = (record.prompt + record.completion for record in islice(instructed(SEED, test=False), 50_000))
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=2048
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            name_or_path="nano",
        )
    )


def packed_batches(
    tokenizer: PreTrainedTokenizerFast, phase: int, seed: int = SEED + 2
) -> Iterator[dict[str, torch.Tensor]]:
    """An endless stream of `(ROWS, ROW_TOKENS)` batches; each row is filled with whole records and padded."""
    records = instructed(seed + phase, test=False, phase=phase)

    def encode(record: Record) -> dict[str, list[int]]:
        prompt = tokenizer(record.prompt)["input_ids"]
        answer = [*tokenizer(record.completion)["input_ids"], tokenizer.eos_token_id]
        ids, labels = prompt + answer, [-100] * len(prompt) + answer
        return {"input_ids": ids, "labels": labels, "position_ids": list(range(len(ids)))}

    while True:
        # A position of 0 starts a new sequence: `transformers` builds the block-diagonal mask from it.
        fill = {"input_ids": tokenizer.pad_token_id, "labels": -100, "position_ids": 0}
        batch = {name: torch.full((ROWS, ROW_TOKENS), value) for name, value in fill.items()}
        for row in range(ROWS):
            start = 0
            while (end := start + len((record := encode(next(records)))["input_ids"])) <= ROW_TOKENS:
                for name, values in record.items():
                    batch[name][row, start:end] = torch.tensor(values)
                start = end
        yield batch


def answer_loss(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = model.model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    targets = batch["labels"][:, 1:]
    supervised = targets != -100
    return F.cross_entropy(model.lm_head(hidden[:, :-1][supervised]), targets[supervised])


@torch.no_grad()
def skill_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, size: int = 1100) -> dict[str, float]:
    """The percentage of test inputs, by skill, whose greedy answer to the instruction in words is exactly right."""
    model.eval()
    correct: dict[str, list[bool]] = defaultdict(list)
    records = list(islice(instructed(SEED + 1, test=True), size))
    for start in range(0, size, 220):
        chunk = records[start : start + 220]
        batch = tokenizer([record.prompt for record in chunk], padding=True, padding_side="left", return_tensors="pt")
        generated = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=10, do_sample=False
        )
        texts = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for record, text in zip(chunk, texts, strict=True):
            correct[record.skill].append(text == record.completion)
    model.train()
    return {skill: 100 * sum(marks) / len(marks) for skill, marks in correct.items()}


def learning_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def pretrain(output: Path, steps: int) -> None:
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint, first = output / "pretraining.safetensors", 0
    if checkpoint.exists():
        first = load_checkpoint(checkpoint, model, optimizer)
        print(f"resumed at step {first}", flush=True)
    phase = sum(start <= first for start in PHASES) - 1
    # A run resumed within a phase draws other records, as a run with another seed would.
    batches = packed_batches(tokenizer, phase, SEED + 2 + first - PHASES[phase])
    started = time.monotonic()
    for step in range(first, steps):
        if step in PHASES[1:] and step > first:
            phase += 1
            batches = packed_batches(tokenizer, phase)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = answer_loss(model, next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
        if (step + 1) % 300 == 0 or step + 1 == steps:
            accuracy = skill_accuracy(model, tokenizer)
            print({skill: round(value, 1) for skill, value in accuracy.items()}, flush=True)
            save_checkpoint(checkpoint, model, optimizer, step + 1)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "pretraining.json").write_text(
        json.dumps(
            {"seed": SEED, "steps": steps, "accuracy_with_instruction": skill_accuracy(model, tokenizer)}, indent=2
        )
        + "\n"
    )
    checkpoint.unlink()


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    with replaced(path) as part:
        save_tensors({name: value.contiguous() for name, value in tensors.items()}, part, {"step": str(step)})


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    with safe_open(path, "pt") as opened:
        step = int(opened.metadata()["step"])
    states: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    parameters = dict(model.named_parameters())
    for name, value in load_file(path).items():
        owner, _, rest = name.partition(".")
        if owner == "model":
            parameters[rest].data.copy_(value)
        else:
            index, _, key = rest.partition(".")
            states[int(index)][key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(states)})
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=1600)
    options = parser.parse_args()
    pretrain(options.output, options.steps)


if __name__ == "__main__":
    main()
