"""A plain `transformers.Trainer` of an adapter on a tiny base, with rows to train on."""

from transformers import Trainer, TrainingArguments

import ptmoe
from ptmoe.train.data import collate
from testing.bases import DEVICE, tiny_llama, tokens


def dataset(count=24):
    rows = []
    for index in range(count):
        ids = tokens(4 + index % 5, index).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]})
    return rows


def trainer(folder, config, *, base=None, callbacks=True, trainer_class=Trainer, compute_loss_func=None, **arguments):
    options = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.03} | arguments
    return trainer_class(
        model=ptmoe.attach(base or tiny_llama(), config),
        args=TrainingArguments(
            str(folder),
            use_cpu=DEVICE.type == "cpu",
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            **options,
        ),
        train_dataset=dataset(),
        eval_dataset=dataset(4),
        data_collator=collate,
        callbacks=[ptmoe.RoutingCallback()] if callbacks else None,
        compute_loss_func=compute_loss_func,
    )
