"""The question answering of the real model's study: SQuAD v1.1's format, split by article.

    python benchmarks/real/prepare.py xquad.en.json DATA

`xquad.en.json` (github.com/google-deepmind/xquad, CC BY-SA 4.0) is a part of SQuAD v1.1's development set, 48
articles. The first 32 by title are to train on and the other 16 to test on; of the 32, every fourth judges what is
searched. Writes `DATA/squad` and `DATA/squad-search`, each a `train-v1.1.json` and a `dev-v1.1.json`, which
`--task mrqa/squad --data-dir` reads.
"""

import argparse
import json
from pathlib import Path

TRAINED = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    articles = sorted(json.loads(given.file.read_text(encoding="utf-8"))["data"], key=lambda article: article["title"])
    trained, tested = articles[:TRAINED], articles[TRAINED:]
    splits = {
        "squad": (trained, tested),
        "squad-search": ([a for i, a in enumerate(trained) if i % 4 != 3], trained[3::4]),
    }
    for name, parts in splits.items():
        (given.folder / name).mkdir(parents=True, exist_ok=True)
        for split, part in zip(("train", "dev"), parts, strict=True):
            questions = sum(len(paragraph["qas"]) for article in part for paragraph in article["paragraphs"])
            file = given.folder / name / f"{split}-v1.1.json"
            file.write_text(json.dumps({"version": "1.1", "data": part}), encoding="utf-8")
            print(f"{file}: {questions} questions on {len(part)} articles")


if __name__ == "__main__":
    main()
