"""The paper's comparisons (arXiv:2505.09519) as plans, on a real model and in miniature on nano; and the quickstart.

A preset is what `ComparePlan` takes; a plan's own values and flags take precedence. The ablations change one thing of
PT-MoE and keep the number of trainable parameters as near to the standard form's as the change allows: its rank is
picked anew at the budget.
"""

from __future__ import annotations

from typing import Any

from ptmoe import nano
from ptmoe.errors import PtmoeError, near

Plan = dict[str, Any]

MODEL = "meta-llama/Llama-3.2-1B-Instruct"
BUDGET = 81_920  # 40 tokens of Llama-3.2-1B, the paper's 81k
NANO_BUDGET = 3_840  # 20 tokens of nano, as in the quickstart

# The paper's sizes, worked out from its rounded counts (README has them exactly). They are given, not picked: `budget`
# None keeps a method out of the plan's.
PAPER_METHODS: list[Plan] = [
    {"name": "ft", "budget": None},
    {"name": "lora", "rank": 1},
    {"name": "hydralora", "rank": 1, "budget": None},
    {"name": "pt", "num_virtual_tokens": 40},
    {"name": "dpt", "num_virtual_tokens": 40, "rank": 39},
    {"name": "smop", "num_virtual_tokens": 20, "num_experts": 2},
    {"name": "attempt", "num_virtual_tokens": 40, "bottleneck": 2, "num_sources": 2},
    {"name": "pt-moe", "num_virtual_tokens": 40, "num_experts": 2, "rank": 36},
]
# On nano four domains of one world want four experts; what is free is picked at the budget. A model this small wants
# other learning rates than a real one, which the defaults are for: benchmarks/learning_rates.py found these.
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
    "per_device_train_batch_size": 32,
    "max_steps": 400,
    "eval_examples": 500,
    "seeds": 3,
}
NANO_NUMBERS: Plan = NANO_TRAINING | {"tasks": ["nano/mixed"], "eval_tasks": ["nano/mixed"]}
NANO_QUESTION_ANSWERING: Plan = NANO_TRAINING | {
    "tasks": ["nano/words,nano/facts"],
    "eval_tasks": ["nano/words", "nano/facts", "nano/mixed", "nano/skills"],
}
NANO_MATHEMATICS: Plan = NANO_TRAINING | {"tasks": ["nano/mixed"], "eval_tasks": ["nano/mixed", "nano/skills"]}

# The untouched base, one soft prompt for every input, and a prompt composed for each input with no more trainable
# parameters, in under three minutes. docs/findings.md has ten seeds of it.
QUICKSTART: Plan = NANO_TRAINING | {
    "title": "Quickstart",
    "methods": [
        {"name": "base"},
        {"name": "pt", "num_virtual_tokens": 20},
        {"name": "pt-moe", "num_virtual_tokens": 10, "num_experts": 4, "rank": 10},
    ],
    "tasks": ["nano/mixed"],
    "eval_examples": 1000,
    "seeds": 1,
}

PT_MOE: Plan = {"name": "pt-moe", "num_virtual_tokens": 40, "num_experts": 2, "rank": 36}
NANO_PT_MOE: Plan = {"name": "pt-moe", "num_virtual_tokens": 10, "num_experts": 4, "rank": 10}


def _without(entry: Plan, *names: str) -> Plan:
    return {name: value for name, value in entry.items() if name not in names}


def _ablation(*methods: Plan, **plan: Any) -> Plan:
    return QUESTION_ANSWERING | {"methods": list(methods)} | plan


def _nano_ablation(*methods: Plan, **plan: Any) -> Plan:
    return NANO_NUMBERS | {"methods": list(methods)} | plan


def _routing(entry: Plan) -> list[Plan]:
    """The four forms of the gate."""
    return [
        entry | {"label": label, "selective": selective, "probationary": probationary}
        for label, selective, probationary in (
            ("selective, probationary", True, True),
            ("selective", True, False),
            ("probationary", False, True),
            ("neither", False, False),
        )
    ]


def _init(entry: Plan, texts: list[str]) -> list[Plan]:
    """Where the factors start: in the vocabulary, in texts that fit the task, at random; and the router."""
    return [
        entry | start
        for start in (
            {"label": "vocabulary, each expert its own"},
            {"label": "vocabulary, all experts alike", "distinct_experts": False},
            {"label": "one text", "init": "text", "init_text": " ".join(texts)},
            {"label": "a text for each expert", "init": "text", "init_text": texts},
            {"label": "random", "init": "random"},
            {"label": "router at random", "router_init": "random"},
        )
    ]


TEXTS = [
    "Read the passage and answer the question with the shortest span of the passage that is right.",
    "Answer the question in a few words. If the passage does not say so directly, work it out from what it says.",
]
NANO_TEXTS = ["Add the numbers.", "Swap the numbers.", "Name the larger number.", "Name the smaller number."]

# Of each preset, the plan on a real model and the one on nano. A length of 10 on nano stands for 40: inputs are short.
PRESETS: dict[str, tuple[Plan, Plan]] = {
    "quickstart": (QUICKSTART, QUICKSTART),
    "paper-qa": (
        QUESTION_ANSWERING | {"methods": PAPER_METHODS},
        NANO_QUESTION_ANSWERING | {"methods": NANO_METHODS, "budget": NANO_BUDGET},
    ),
    "paper-math": (
        MATHEMATICS | {"methods": PAPER_METHODS},
        NANO_MATHEMATICS | {"methods": NANO_METHODS, "budget": NANO_BUDGET},
    ),
    "ablate-length": (
        _ablation(
            _without(PT_MOE, "rank", "num_virtual_tokens"),
            vary={"num_virtual_tokens": [20, 40, 60, 80]},
            budget=BUDGET,
        ),
        _nano_ablation(
            _without(NANO_PT_MOE, "rank", "num_virtual_tokens"),
            vary={"num_virtual_tokens": [5, 10, 15, 20]},
            budget=NANO_BUDGET,
        ),
    ),
    "ablate-experts": (
        _ablation(_without(PT_MOE, "rank", "num_experts"), vary={"num_experts": [1, 2, 4, 8]}, budget=BUDGET),
        _nano_ablation(
            _without(NANO_PT_MOE, "rank", "num_experts"), vary={"num_experts": [1, 2, 4, 8]}, budget=NANO_BUDGET
        ),
    ),
    "ablate-size": (
        _ablation(_without(PT_MOE, "rank"), vary={"rank": [5, 10, 20, 30, 40]}),
        _nano_ablation(_without(NANO_PT_MOE, "rank"), vary={"rank": [1, 2, 4, 7, 10]}),
    ),
    "ablate-routing": (_ablation(*_routing(PT_MOE)), _nano_ablation(*_routing(NANO_PT_MOE))),
    "ablate-init": (_ablation(*_init(PT_MOE, TEXTS)), _nano_ablation(*_init(NANO_PT_MOE, NANO_TEXTS))),
    "ablate-noise": (
        _ablation(PT_MOE, vary={"router_noise": [0, 0.05, 0.1, 0.2]}),
        _nano_ablation(NANO_PT_MOE, vary={"router_noise": [0, 0.05, 0.1, 0.2]}),
    ),
}


def preset(name: str, model: str | None) -> Plan:
    """The plan of a preset on a model; by default the paper's.

    Raises:
        PtmoeError: an unknown preset.
    """
    if name not in PRESETS:
        raise PtmoeError(f"unknown preset {name!r}{near(name, PRESETS)}")
    real, miniature = PRESETS[name]
    return miniature if model == nano.NAME else real
