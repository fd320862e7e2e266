"""The paper's comparisons (arXiv:2505.09519) as plans, on a real model and in miniature on nano; and the quickstart.

A preset is what `ComparePlan` takes; a plan's own values and flags take precedence. An ablation changes one setting of
PT-MoE and keeps the number of trainable parameters as near to the standard form's as that allows: where the setting
changes it, the rank is picked again at the budget.
"""

from typing import Any

from ptmoe import nano
from ptmoe.errors import PtmoeError, near, shown

Plan = dict[str, Any]

BUDGET = 81_920  # 40 tokens of Llama-3.2-1B, the paper's 81k
NANO_BUDGET = 3_840  # 20 tokens of nano, as in the quickstart
PT_MOE: Plan = {"name": "pt-moe", "num_virtual_tokens": 40, "num_experts": 2, "rank": 36}
NANO_PT_MOE: Plan = {"name": "pt-moe", "num_virtual_tokens": 10, "num_experts": 4, "rank": 10}

# The paper's sizes, worked out from its rounded counts (docs/mathematics.md). They are given, not picked: `budget` None
# keeps a method out of the plan's.
PAPER_METHODS: list[Plan] = [
    {"name": "ft", "budget": None},
    {"name": "lora", "rank": 1},
    {"name": "hydralora", "rank": 1, "budget": None},
    {"name": "pt", "num_virtual_tokens": 40},
    {"name": "dpt", "num_virtual_tokens": 40, "rank": 39},
    {"name": "smop", "num_virtual_tokens": 20, "num_experts": 2},
    {"name": "attempt", "num_virtual_tokens": 40, "bottleneck": 2, "num_sources": 2},
    PT_MOE,
]
# On nano four domains of one world want four experts; what is free is picked at the budget. Learning rates that differ
# from the defaults are those that benchmarks/learning_rates.py found.
NANO_METHODS: list[Plan] = [
    {"name": "ft", "budget": None, "learning_rate": 0.001},
    {"name": "lora", "learning_rate": 0.01},
    {"name": "hydralora", "rank": 1, "budget": None, "learning_rate": 0.01},
    {"name": "pt"},
    {"name": "dpt", "num_virtual_tokens": 20},
    {"name": "smop", "num_experts": 4},
    {"name": "attempt", "bottleneck": 1, "learning_rate": 0.1},
    {"name": "pt-moe", "num_virtual_tokens": 10, "num_experts": 4},
]

MODEL = "meta-llama/Llama-3.2-1B-Instruct"
TRAINING: Plan = {"model": MODEL, "dtype": "bfloat16", "per_device_train_batch_size": 32}
QUESTION_ANSWERING: Plan = TRAINING | {
    "tasks": ["mrqa-in"],
    "eval_tasks": ["mrqa-in", "mrqa-out"],
    "max_length": 512,
    "max_steps": 5000,
}
MATHEMATICS: Plan = TRAINING | {
    "tasks": ["gsm8k"],
    "eval_tasks": ["gsm8k", "svamp", "asdiv", "mawps", "math_problems"],
    "num_train_epochs": 3,
}
# nano's tokenizer knows its own world's words only, so a preset trains and evaluates there, as long as the quickstart.
NANO_TRAINING: Plan = {
    "model": nano.NAME,
    "tasks": ["nano/mixed"],
    "per_device_train_batch_size": 32,
    "max_steps": 400,
    "eval_examples": 500,
    "seeds": 3,
}
NANO_QUESTION_ANSWERING: Plan = NANO_TRAINING | {
    "tasks": ["nano/words,nano/facts"],
    "eval_tasks": ["nano/words", "nano/facts", "nano/mixed", "nano/skills"],
}
NANO_MATHEMATICS: Plan = NANO_TRAINING | {"eval_tasks": ["nano/mixed", "nano/skills"]}

# The untouched base, one soft prompt for every input, and a prompt composed for each input with no more trainable
# parameters, in under three minutes. docs/findings.md has ten seeds of it.
QUICKSTART: Plan = NANO_TRAINING | {
    "title": "Quickstart",
    "methods": [{"name": "base"}, {"name": "pt", "num_virtual_tokens": 20}, NANO_PT_MOE],
    "eval_examples": 1000,
    "seeds": 1,
}


def _presets(
    qa: Plan,
    maths: Plan,
    ablated: Plan,
    standard: Plan,
    budget: int,
    lengths: list[int],
    ranks: list[int],
    texts: list[str],
) -> dict[str, Plan]:
    """All presets on one model; the ablations are `ablated` with one setting of the `standard` PT-MoE changed."""

    def vary(field: str, values: list[Any], *, pick: str | None = None) -> Plan:
        """With `pick`, a size to pick at the budget."""
        entry = {name: value for name, value in standard.items() if name not in (field, pick)}
        return ablated | {"methods": [entry], "vary": {field: values}, **({"budget": budget} if pick else {})}

    def forms(changes: dict[str, Plan]) -> Plan:
        return ablated | {"methods": [standard | {"label": label} | change for label, change in changes.items()]}

    return {
        "quickstart": QUICKSTART,
        "paper-qa": qa,
        "paper-math": maths,
        "ablate-length": vary("num_virtual_tokens", lengths, pick="rank"),
        "ablate-experts": vary("num_experts", [1, 2, 4, 8], pick="rank"),
        "ablate-size": vary("rank", ranks),
        "ablate-routing": forms(
            {
                "selective, probationary": {"selective": True, "probationary": True},
                "selective": {"selective": True, "probationary": False},
                "probationary": {"selective": False, "probationary": True},
                "neither": {"selective": False, "probationary": False},
            }
        ),
        "ablate-init": forms(
            {
                "vocabulary, all experts alike": {},
                "vocabulary, each expert its own": {"distinct_experts": True},
                "no shared factor": {"shared_factor": False},
                "experts split after 0.4": {"split_after": 0.4},
                "one text": {"init": "text", "init_text": " ".join(texts)},
                "a text for each expert": {"init": "text", "init_text": texts},
                "training examples": {"init": "examples"},
                "random": {"init": "random"},
                "router at random": {"router_init": "random"},
                "no test of the routing": {"router_test": False},
            }
        ),
        "ablate-noise": vary("router_noise", [0, 0.05, 0.1, 0.2]),
    }


ON_REAL_MODELS = _presets(
    QUESTION_ANSWERING | {"methods": PAPER_METHODS},
    MATHEMATICS | {"methods": PAPER_METHODS},
    QUESTION_ANSWERING,
    PT_MOE,
    BUDGET,
    lengths=[20, 40, 60, 80],
    ranks=[5, 10, 20, 30, 40],
    texts=[
        "Read the passage and answer the question with the shortest span of the passage that is right.",
        "Answer the question in a few words. If the passage does not say so directly, work it out from what it says.",
    ],
)
ON_NANO = _presets(
    NANO_QUESTION_ANSWERING | {"methods": NANO_METHODS, "budget": NANO_BUDGET},
    NANO_MATHEMATICS | {"methods": NANO_METHODS, "budget": NANO_BUDGET},
    NANO_TRAINING | {"eval_tasks": ["nano/mixed"]},
    NANO_PT_MOE,
    NANO_BUDGET,
    lengths=[5, 10, 15, 20],  # 10 stands for 40: inputs are short
    ranks=[1, 2, 4, 7, 10],
    texts=["Add the numbers.", "Swap the numbers.", "Name the larger number.", "Name the smaller number."],
)
# Of each preset, the plan on a real model and the one on nano.
PRESETS = {name: (ON_REAL_MODELS[name], ON_NANO[name]) for name in ON_NANO}


def preset(name: Any, model: str | None) -> Plan:
    """The plan of a preset on a model; by default the paper's.

    Raises:
        PtmoeError: an unknown preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise PtmoeError(f"unknown preset {shown(name)}{near(str(name), PRESETS)}")
    return PRESETS[name][model == nano.NAME]
