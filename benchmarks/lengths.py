"""Lengths of real examples, recorded once, so that the benchmarks need no data: random tokens at these lengths.

    python -m benchmarks.lengths --data ../shared/data

`lengths.json` holds a pair (tokens of the prompt, tokens of the answer with its end token) for every question of
`passages`, xquad.en's questions on passages of SQuAD, and of `gsm8k`, the test problems with their worked solutions;
both in ptmoe's own templates. No text is kept. The tokenizer is a byte-level BPE of at most 32,000 tokens, trained on
these same texts: an estimate of what a base's own tokenizer would give.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

FILE = Path(__file__).with_name("lengths.json")
SOURCES = {"passages": ("mrqa/squad", "squad/xquad.en.json"), "gsm8k": ("gsm8k", "gsm8k")}
VOCABULARY = 32_000
FIRST_TOKEN = 3  # below it: padding, end, and one to spare

Lengths = list[list[int]]  # a [prompt, answer] for each example


def sample(name: str, count: int, seed: int) -> Lengths:
    """The lengths of `count` examples drawn without replacement."""
    return random.Random(seed).sample(json.loads(FILE.read_text())[name], count)


def rows(lengths: Lengths, vocabulary: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """A random prompt and answer of each pair of lengths."""
    drawn = random.Random(seed)
    return [
        (
            [drawn.randrange(FIRST_TOKEN, vocabulary) for _ in range(prompt)],
            [drawn.randrange(FIRST_TOKEN, vocabulary) for _ in range(answer)],
        )
        for prompt, answer in lengths
    ]


def record(data: Path) -> dict[str, Lengths]:
    """Measure the data sets in a folder."""
    from tokenizers import ByteLevelBPETokenizer

    from ptmoe.tasks import load_task

    texts = {
        name: [(example.input, example.target) for example in load_task(task, "test", data / place)]
        for name, (task, place) in SOURCES.items()
    }
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (text for pairs in texts.values() for pair in pairs for text in pair), vocab_size=VOCABULARY
    )
    return {
        name: [[len(tokenizer.encode(prompt).ids), len(tokenizer.encode(answer).ids) + 1] for prompt, answer in pairs]
        for name, pairs in texts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with gsm8k/ and squad/xquad.en.json")
    found = record(parser.parse_args().data)
    lines = [f"{json.dumps(name)}: {json.dumps(pairs, separators=(',', ':'))}" for name, pairs in found.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for name, pairs in found.items():
        prompts, answers = (sorted(column) for column in zip(*pairs, strict=True))
        middle = len(pairs) // 2
        print(f"{name}: {len(pairs):,} examples; median prompt {prompts[middle]}, answer {answers[middle]} tokens")


if __name__ == "__main__":
    main()
