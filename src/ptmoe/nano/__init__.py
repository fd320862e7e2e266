"""The embedded base model: a small Llama that the project pretrained itself (`python -m ptmoe.nano.pretrain`)."""

from pathlib import Path

NAME = "nano"
FOLDER = Path(__file__).parent / "base"
