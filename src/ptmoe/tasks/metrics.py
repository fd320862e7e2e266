"""How an answer is graded."""

from collections.abc import Sequence


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction is one of the references, white space folded."""
    folded = " ".join(prediction.split())
    return any(folded == " ".join(reference.split()) for reference in references)
