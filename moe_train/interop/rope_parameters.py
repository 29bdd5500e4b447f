"""Rotary settings in transformers' words: the frequencies are the same, YaRN's temperature sits in another place.

Ours multiplies the softmax scale by (0.1 · mscale · ln factor + 1)². Theirs does so under the name mscale_all_dim in
MLA; in other attention it multiplies cosines and sines, so queries and keys, by the plain factor.
"""

from __future__ import annotations

import math
from typing import Any

from moe_train.config import MLAConfig, ModelConfig, YarnConfig
from moe_train.errors import UserError


def to_theirs(model: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of a configuration."""
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    shared = {
        "rope_type": scaling.kind,
        "rope_theta": model.rope_theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
    if not isinstance(scaling, YarnConfig):
        return shared | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    yarn = shared | {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if isinstance(model.attention, MLAConfig):
        # Equal, so that the factor on cosines and sines, which the other features would miss, is one.
        return yarn | {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale, "attention_factor": 1.0}
    return yarn | {"attention_factor": _temperature(scaling.factor, scaling.mscale)}


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def to_settings(theirs: dict[str, Any], *, mla: bool, where: str) -> dict[str, Any] | None:
    """`rope_scaling` of a model file, None without scaling. Raises UserError for what is not the same function here."""
    kind = theirs.get("rope_type", "default")
    if float(theirs.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor={theirs['partial_rotary_factor']} turns part of each head, which has no "
            "place here: choose a model with 1.0"
        )
    if kind == "default":
        return None
    if kind not in ("yarn", "llama3"):
        raise UserError(f"{where}: rope_type={kind} has no place here: choose a model with default, yarn or llama3")
    try:
        shared = {
            "kind": kind,
            "factor": float(theirs["factor"]),
            "original_max_position_embeddings": int(theirs["original_max_position_embeddings"]),
        }
        if kind == "llama3":
            return shared | {key: float(theirs[key]) for key in ("low_freq_factor", "high_freq_factor")}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: rope_parameters of {kind} are incomplete ({theirs}): put them right") from None
    if theirs.get("truncate") is False:
        raise UserError(f"{where}: YaRN with truncate=false has no place here: choose a model without it")
    yarn = {"beta_fast": float(theirs.get("beta_fast") or 32), "beta_slow": float(theirs.get("beta_slow") or 1)}
    return shared | yarn | {"mscale": _mscale(theirs, shared["factor"], mla=mla, where=where)}


def _mscale(theirs: dict[str, Any], factor: float, *, mla: bool, where: str) -> float:
    mscale, all_dim = theirs.get("mscale"), theirs.get("mscale_all_dim")
    on_tables = theirs.get("attention_factor")
    if on_tables is None and mscale and all_dim:
        on_tables = _temperature(factor, mscale) / _temperature(factor, all_dim)
    elif on_tables is None:
        on_tables = _temperature(factor, 1.0)
    if mla:
        if not math.isclose(on_tables, 1.0, rel_tol=1e-6):
            raise UserError(
                f"{where}: YaRN's attention factor {on_tables:.4g} on the rotary features alone has no place here: "
                "choose a model whose mscale and mscale_all_dim are equal"
            )
        return float(all_dim or 0.0)
    if factor <= 1:
        return 0.0
    found = (float(on_tables) - 1) / (0.1 * math.log(factor))
    return float(round(found, 12))  # 1.0 and not 0.9999999999999998
