"""Validation loss over the fixed validation split, in nats a token and in bits per byte of its text.

Bits per byte do not depend on the tokenizer, so they can be compared across vocabularies and with published figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from moe_train.data.batches import validation_blocks
from moe_train.data.packing import PreparedData
from moe_train.model.loss import IGNORE
from moe_train.model.transformer import Transformer
from moe_train.training.runtime import Runtime


class Evaluation(NamedTuple):
    loss: float  # nats a token
    bits_per_byte: float
    tokens: int
    mtp_losses: tuple[float, ...]  # nats a token of each MTP module
    complete: bool  # all the tokens that were asked for; False where a limit of the run cut it short


@torch.no_grad()
def evaluate(
    model: Transformer,
    data: PreparedData,
    runtime: Runtime,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None,
    out_of_time: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Loss on the first `max_tokens` validation tokens (None: all), shared out over the ranks.

    `out_of_time`, the same on every rank, is asked before every batch: once it says so, what has been seen counts, and
    None is returned where that is nothing.
    """
    was_training = model.training
    model.eval()
    depth = model.config.mtp_depth
    # Nats and targets, then the same of each MTP module.
    totals = torch.zeros(2 + 2 * depth, dtype=torch.float64, device=runtime.device)
    blocks = validation_blocks(data.val, sequence_length, batch_size, max_tokens, runtime.rank, runtime.world_size)
    complete = True
    with runtime.accelerator.autocast():
        for inputs, targets in blocks:
            if out_of_time is not None and out_of_time():
                complete = False
                break
            losses = model(inputs.to(runtime.device), targets.to(runtime.device))
            main = torch.stack([losses.nll.double(), (targets != IGNORE).sum().to(runtime.device).double()])
            totals += torch.cat([main, losses.mtp_nll_k.double(), losses.mtp_targets_k.double()])
    model.train(was_training)
    nats, targets_seen, *mtp = runtime.summed(totals).tolist()
    if not targets_seen:
        return None
    return Evaluation(
        loss=nats / targets_seen,
        bits_per_byte=nats / math.log(2) / data.val_bytes(int(targets_seen)),
        tokens=int(targets_seen),
        mtp_losses=tuple(sum_ / max(1, count) for sum_, count in zip(mtp[:depth], mtp[depth:])),
        complete=complete,
    )
