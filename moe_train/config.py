"""Every setting of a run, as frozen dataclasses: what exists, what type it has, and what cannot be combined.

hydra composes `configs/`; `compose.py` converts the result into a `RunConfig` once, and nothing beyond that line sees
a DictConfig. Names are those of Hugging Face's configurations where these have one. A combination that cannot work is
refused here, with the key, the value and the remedy, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True)


def _whole(value: Any) -> Any:
    """1e6 on a command line is a float: take it where a whole number is meant."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10**18)]
Size = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10**6)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=10**18)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e3)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True, config=_STRICT)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kind: Literal["mla"]
    num_attention_heads: Positive
    kv_lora_rank: Positive
    q_lora_rank: Positive | None  # None: queries are not compressed
    qk_nope_head_dim: Positive
    qk_rope_head_dim: Positive
    v_head_dim: Positive

    def __post_init__(self) -> None:
        _require(
            self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE turns pairs"
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, config=_STRICT)
class GQAConfig:
    """Grouped-query attention (arXiv 2305.13245); num_key_value_heads = num_attention_heads is plain multi-head."""

    kind: Literal["gqa"]
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive

    def __post_init__(self) -> None:
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_key_value_heads={self.num_key_value_heads} does not divide "
            f"num_attention_heads={self.num_attention_heads}: choose a divisor",
        )


AttentionConfig = Annotated[MLAConfig | GQAConfig, Field(discriminator="kind")]


@dataclass(frozen=True, config=_STRICT)
class MoEConfig:
    """DeepSeekMoE with auxiliary-loss-free balancing (arXiv 2401.06066; 2408.15664; 2412.19437, section 2.1.2)."""

    num_experts: Positive  # routed experts
    top_k: Positive  # routed experts a token visits
    num_shared_experts: Count  # experts every token visits
    moe_intermediate_size: Positive  # width of one expert
    first_k_dense_replace: Count  # the first layers keep a dense FFN
    norm_topk_prob: bool  # chosen gate values are scaled to sum 1
    routed_scaling_factor: PositiveFloat
    bias_update_speed: NonNegative  # u (gamma in V3): the selection bias moves by this much a step; 0 turns it off
    sequence_loss_weight: NonNegative  # alpha of the sequence-wise balance loss; 0 turns it off

    def __post_init__(self) -> None:
        _require(
            self.top_k <= self.num_experts,
            f"top_k={self.top_k} is more than num_experts={self.num_experts}: lower top_k or raise num_experts",
        )


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """Shape of a transformer. With `dense_twin_of_moe` it stands for the dense model of equal active FLOPs."""

    name: str
    vocab_size: Positive | None  # None: taken from the tokenizer, rounded up to a multiple of 64
    hidden_size: Positive
    num_hidden_layers: Positive
    intermediate_size: Positive  # width of the dense FFNs
    attention: AttentionConfig
    moe: MoEConfig | None  # None: every FFN is dense
    dense_twin_of_moe: bool
    tie_word_embeddings: bool
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    initializer_range: PositiveFloat
    dropout: Annotated[float, Field(ge=0, lt=1)]

    def __post_init__(self) -> None:
        if self.moe is None:
            _require(
                not self.dense_twin_of_moe, "dense_twin_of_moe=true needs moe settings to be the twin of: give moe.*"
            )
            return
        _require(
            self.moe.first_k_dense_replace < self.num_hidden_layers,
            f"moe.first_k_dense_replace={self.moe.first_k_dense_replace} leaves no MoE layer among "
            f"num_hidden_layers={self.num_hidden_layers}: lower it, or set model.moe=null for a dense model",
        )

    @property
    def num_moe_layers(self) -> int:
        return 0 if self.moe is None else self.num_hidden_layers - self.moe.first_k_dense_replace

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.first_k_dense_replace

    def resolved(self) -> ModelConfig:
        """The model that is really built: a twin becomes a plain dense model whose FFN width gives equal FLOPs.

        A SwiGLU of width w costs 3·hidden·w multiply-adds a token and the router hidden·num_experts, so per MoE layer
        the equal width is (top_k + num_shared_experts)·moe_intermediate_size + num_experts/3. It is averaged over all
        layers and rounded to a multiple of 8 (16 bytes in BF16, what grouped and FP8 matmuls want).
        """
        if not self.dense_twin_of_moe or self.moe is None:
            return self
        moe = self.moe
        active = (moe.top_k + moe.num_shared_experts) * moe.moe_intermediate_size + moe.num_experts / 3
        total = moe.first_k_dense_replace * self.intermediate_size + self.num_moe_layers * active
        width = max(8, 8 * round(total / self.num_hidden_layers / 8))
        return dataclasses.replace(self, moe=None, dense_twin_of_moe=False, intermediate_size=width)


# ----------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class DataConfig:
    """What every corpus shares. `tokenizer`: `bpe` (trained on it), `bytes`, or a Hugging Face name or folder."""

    name: str
    tokenizer: str
    vocab_size: Size  # of the trained BPE
    sequence_length: Positive  # tokens a block predicts
    val_fraction: Annotated[float, Field(gt=0, lt=1)]  # of the documents, chosen by a hash of their text
    cache_dir: str | None  # None: the user's cache folder

    def __post_init__(self) -> None:
        _require(
            self.tokenizer != "bpe" or self.vocab_size >= 257,
            f"vocab_size={self.vocab_size} is too small for byte-level BPE: it needs 256 bytes and an end token, "
            "so at least 257",
        )


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class LocalPythonConfig(DataConfig):
    """The source of the installed Python's standard library: real text that is on every machine."""

    kind: Literal["local_python"]


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class LocalPackagesConfig(DataConfig):
    """The standard library and the Python source of every installed package."""

    kind: Literal["local_packages"]


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class TextFilesConfig(DataConfig):
    """Files of the user's own: txt (cut at blank lines), jsonl and parquet (one document a row)."""

    kind: Literal["text_files"]
    files: tuple[str, ...]  # globs
    val_files: tuple[str, ...]  # globs; empty: val_fraction of the documents of `files`
    text_field: str  # column of jsonl and parquet


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class HubConfig(DataConfig):
    """A dataset of the Hugging Face hub."""

    kind: Literal["hub"]
    dataset: str
    subset: str | None
    split: str
    val_split: str | None  # None: val_fraction of the documents of `split`
    text_field: str
    streaming: bool
    max_documents: Positive | None  # stop reading after as many documents of `split`


AnyDataConfig = Annotated[
    LocalPythonConfig | LocalPackagesConfig | TextFilesConfig | HubConfig,
    Field(discriminator="kind"),
]


# ------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, config=_STRICT)
class PrecisionConfig:
    """In what number format matrix products run; weights, gradients and optimizer states stay in FP32."""

    name: str
    compute_dtype: Literal["auto", "float32", "bfloat16"]  # auto: bfloat16 where the device multiplies it faster


@dataclass(frozen=True, config=_STRICT)
class AdamWConfig:
    """AdamW (arXiv 1711.05101); no decay on norms, biases and embeddings."""

    kind: Literal["adamw"]
    lr: Rate
    betas: tuple[Beta, Beta]
    eps: PositiveFloat
    weight_decay: NonNegative
    max_grad_norm: PositiveFloat | None


@dataclass(frozen=True, config=_STRICT)
class MuonConfig:
    """Muon for hidden matrices, stacked experts included (arXiv 2502.16982); AdamW for the rest, at the same rate."""

    kind: Literal["muon"]
    lr: Rate
    momentum: Beta
    nesterov: bool
    ns_steps: Positive
    weight_decay: NonNegative
    max_grad_norm: PositiveFloat | None
    adamw_betas: tuple[Beta, Beta]
    adamw_eps: PositiveFloat


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


@dataclass(frozen=True, config=_STRICT)
class ScheduleConfig:
    """Learning rate over the run's progress from 0 to 1, which is counted in whatever stop condition ends it."""

    kind: Literal["wsd", "cosine", "constant"]
    warmup_fraction: Fraction
    decay_fraction: Fraction  # wsd only: the last part of the run, over which the rate falls linearly
    final_lr_fraction: Fraction  # of the peak rate

    def __post_init__(self) -> None:
        _require(
            self.kind != "wsd" or self.warmup_fraction + self.decay_fraction <= 1,
            f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} overlap: "
            "their sum must be at most 1",
        )


@dataclass(frozen=True, config=_STRICT)
class StopConfig:
    """The first limit reached ends the run. With none given it ends after `default_tokens`."""

    steps: Positive | None
    tokens: Positive | None
    flops: PositiveFloat | None
    seconds: PositiveFloat | None  # of the whole process, start-up and evaluation included
    usd: PositiveFloat | None  # likewise, all devices
    default_tokens: Positive


@dataclass(frozen=True, config=_STRICT)
class EvalConfig:
    every_tokens: Positive | None  # None: only at the end
    max_tokens: Positive | None  # None: the whole validation split


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    every_steps: Positive | None  # None: only at the end
    keep_last: Positive


# ---------------------------------------------------------------------------------------------- cost and tracking


@dataclass(frozen=True, config=_STRICT)
class PeakConfig:
    """Dense matmul rates in TFLOP/s (never the sparse figures of vendor tables); None where unknown or not there."""

    bfloat16: PositiveFloat | None
    float8: PositiveFloat | None
    float32: PositiveFloat | None


@dataclass(frozen=True, config=_STRICT)
class HardwareConfig:
    """One device: what it can do and what an hour of it costs, each with where the figure is from. None is unknown."""

    name: str
    match: tuple[str, ...]  # regular expressions on the name the driver reports
    memory_gb: PositiveFloat | None
    bandwidth_tb_s: PositiveFloat | None
    tdp_w: PositiveFloat | None
    peak_tflops: PeakConfig
    peak_source: str | None
    price_usd_per_hour: Annotated[float, Field(ge=0, le=1e9)] | None  # a device; a core where kind is cpu
    price_source: str | None
    price_date: str | None


@dataclass(frozen=True, config=_STRICT)
class TrackingConfig:
    wandb: Literal["auto", "offline", "online", "off"]  # auto: online where an API key is found, offline otherwise
    project: str
    group: str | None
    tags: tuple[str, ...]
    notes: str | None
    log_every_steps: Positive


# ------------------------------------------------------------------------------------------------------------ run


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """One training run. `identity` names what makes two runs the same run."""

    model: ModelConfig
    data: AnyDataConfig
    precision: PrecisionConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    hardware: HardwareConfig
    tracking: TrackingConfig
    stop: StopConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    name: str
    run_dir: str | None
    resume: str | None
    seed: Count
    batch_size: Size  # sequences an optimizer step, over all devices
    micro_batch_size: Size | None  # sequences a device takes at once; None: all of its share
    num_threads: Positive | None  # CPU cores of a process; None: those there are, shared out
    z_loss_weight: NonNegative
    deterministic: bool
    traceback: bool

    def __post_init__(self) -> None:
        _require("/" not in self.name, f"name={self.name} is part of a folder's name: leave out the /")

    _NOT_IDENTITY = ("name", "run_dir", "resume", "tracking", "checkpoint", "hardware", "num_threads", "traceback")

    def identity(self) -> dict[str, Any]:
        """The settings that can change a run's losses: all but where it is, what it is called and what is reported."""
        settings = to_dict(self)
        for key in self._NOT_IDENTITY:
            del settings[key]
        del settings["data"]["cache_dir"]
        return settings

    def config_hash(self, without: tuple[str, ...] = ()) -> str:
        """Twelve hex digits that name the run: the same for the same settings and seed, on any machine."""
        canonical = json.dumps({k: v for k, v in self.identity().items() if k not in without}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts and lists, ready for YAML and JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain
