"""Rows decoded greedily by `Decoder` and by `transformers`."""

import torch

from testing.bases import tokens

NEW = 12
ROWS = [tokens(length, length).tolist() for length in (6, 2, 11, 4, 9)]


def experts_of(model, rows):
    routings = [
        model.route(torch.tensor([row], device=model.device)) if model.num_virtual_tokens else None for row in rows
    ]
    return [0 if routing is None else int(routing.gate.argmax()) for routing in routings]


def decoded(decoder, rows=ROWS, ended=lambda row: False, **options):
    return decoder(rows, experts_of(decoder.model, rows), max_new_tokens=NEW, ended=ended, **options)


def generated(model, rows=ROWS):
    """By `transformers`, each row alone."""
    ids = [torch.tensor([row], device=model.device) for row in rows]
    return [model.generate(row, max_new_tokens=NEW)[0, row.shape[1] :].tolist() for row in ids]
