"""Our models as transformers': which family takes which, what is refused, and what an export leaves on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import load_theirs

from moe_train.errors import UserError
from moe_train.generation import load_trained
from moe_train.interop.export import export_run
from moe_train.interop.importing import import_model
from moe_train.training.checkpoints import WEIGHTS

AsRun = Callable[..., Path]
SOFTMAX = ("moe=batch_loss",)
GQA = ("attention=gqa_4x32", "attention.head_dim=8")
YARN = ("+rope_scaling=yarn", "rope_scaling.original_max_position_embeddings=16")


def family_of(run: Path, tmp_path: Path, **options: object) -> str:
    return export_run(run, tmp_path / "hf", **options).family  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "overrides", "changes"),
    [
        ("deepseek_v3", ("moe=group_limited",), {}),
        ("deepseek_v3", ("moe.num_shared_experts=2", "moe.norm_topk_prob=false", "moe.routed_scaling_factor=2.5"), {}),
        ("deepseek_v3", ("moe.num_shared_experts=0", "tie_word_embeddings=false", "attention.q_lora_rank=8"), {}),
        ("deepseek_v3", ("rope_scaling=yarn", *YARN[1:], "rope_scaling.mscale=0.5"), {}),
        ("deepseek_v3", (), {"moe": None}),
        ("deepseek_v2", (*SOFTMAX, "moe.n_group=4", "moe.topk_group=2", "moe.group_score_top_k=1"), {}),
        ("llama", GQA, {"moe": None}),
        ("qwen3", (*GQA, "attention.qk_norm=per_head", "rope_scaling=yarn", *YARN[1:]), {"moe": None}),
        ("mixtral", (*GQA, *SOFTMAX, "moe.norm_topk_prob=true", "moe.num_shared_experts=0",
                     "moe.first_k_dense_replace=0"), {}),
        ("qwen3_moe", (*GQA, *SOFTMAX, "attention.qk_norm=per_head", "moe.num_shared_experts=0"), {}),
        ("olmoe", (*GQA, *SOFTMAX, "attention.qk_norm=all_heads", "moe.num_shared_experts=0",
                   "moe.first_k_dense_replace=0"), {}),
        ("glm4_moe", GQA, {}),
        ("glm4_moe", (*GQA, "attention.qk_norm=per_head", "moe=group_limited", "rope_scaling=yarn", *YARN[1:],
                      "rope_scaling.mscale=0.0"), {}),
    ],
)  # fmt: skip
def test_every_kind_of_model_has_a_family_that_computes_the_same(
    family: str,
    overrides: tuple[str, ...],
    changes: dict[str, None],
    as_run: AsRun,
    tokens: torch.Tensor,
    tmp_path: Path,
) -> None:
    run = as_run(*overrides, biased=family in ("deepseek_v3", "glm4_moe"), **changes)
    assert family_of(run, tmp_path) == family
    theirs, wrong_keys = load_theirs(tmp_path / "hf")
    assert not wrong_keys
    ours = load_trained(run).model
    with torch.no_grad():
        expected = ours.logits(tokens)
        assert (theirs(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()

    import_model(tmp_path / "hf", tmp_path / "again")
    again = load_trained(tmp_path / "again").model.state_dict()
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.state_dict().items())


def test_the_selection_bias_arrives_in_fp32_whatever_the_weights_are(as_run: AsRun, tmp_path: Path) -> None:
    run = as_run()
    export_run(run, tmp_path / "hf", dtype="bfloat16")
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as stored:
        bias = stored.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias")
        assert stored.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    assert bias.dtype == torch.float32
    assert torch.equal(bias, load_trained(run).model.routers()[0].selection_bias)
    loaded, wrong_keys = load_theirs(tmp_path / "hf")
    assert not wrong_keys
    assert loaded.dtype == torch.bfloat16


def test_mtp_modules_are_refused_or_dropped_and_the_rest_predicts_the_same(
    as_run: AsRun, tokens: torch.Tensor, tmp_path: Path
) -> None:
    run = as_run("mtp=depth_2")
    with pytest.raises(UserError, match=r"mtp\.depth=2 has no place in what transformers loads by default: mtp=drop"):
        export_run(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    export_run(run, tmp_path / "hf", mtp="drop")
    theirs, wrong_keys = load_theirs(tmp_path / "hf")
    assert not wrong_keys
    with torch.no_grad():
        expected = load_trained(run).model.logits(tokens)
        assert (theirs(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert "2 MTP module(s)" in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "asked", "message"),
    [
        (("moe=expert_choice",), "auto", r"expert_choice has no place in any family"),
        (("rms_norm_eps=1e-5",), "auto", r"no family takes this model.*rms_norm_eps=1e-05"),
        (("moe=group_limited", "moe.group_score_top_k=1"), "deepseek_v3", r"group_score_top_k=1 \(it has 2\)"),
        (("moe.num_experts=1", "moe.top_k=1"), "deepseek_v3", r"num_experts=1 \(a group needs 2\)"),
        (SOFTMAX, "deepseek_v3", r"scoring_func=softmax has no place in deepseek_v3: family=deepseek_v2 takes it"),
        ((*SOFTMAX, "moe.norm_topk_prob=true"), "deepseek_v2", r"norm_topk_prob=true has no place in deepseek_v2"),
        (GQA, "deepseek_v3", r"attention\.kind=gqa has no place in deepseek_v3: family=glm4_moe takes it"),
        (GQA, "mixtral", r"scoring_func=sigmoid has no place in mixtral: family=glm4_moe takes it"),
        ((*GQA, "attention.qk_norm=all_heads"), "auto", r"no family takes this model"),
        ((*GQA, "moe=switch"), "auto", r"nearest, glm4_moe, has no place for model\.moe\.scoring_func=softmax$"),
        ((*GQA, *SOFTMAX, "moe.routed_scaling_factor=2.0", "moe.num_shared_experts=0"), "qwen3_moe", r"qk_norm=null"),
        ((), "nonsense", r"family=nonsense is unknown: choose auto or one of deepseek_v3"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused_by_name(
    overrides: tuple[str, ...], asked: str, message: str, as_run: AsRun, tmp_path: Path
) -> None:
    run = as_run(*overrides, biased=False)
    with pytest.raises(UserError, match=message) as error:
        export_run(run, tmp_path / "hf", family=asked)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [run.name]


def test_a_selection_bias_that_a_family_has_no_place_for_is_refused(as_run: AsRun, tmp_path: Path) -> None:
    run = as_run(*SOFTMAX, biased=True)
    with pytest.raises(UserError, match=r"a selection bias .* has no place in deepseek_v2"):
        export_run(run, tmp_path / "hf", family="deepseek_v2")


def test_a_trained_runs_lost_tokenizer_is_to_be_put_back(as_run: AsRun, tmp_path: Path) -> None:
    run = as_run()
    shutil.rmtree(run / "tokenizer")
    shutil.rmtree(run / "configs")  # which starting points have and trained runs have not
    with pytest.raises(UserError, match=r"no tokenizer in .*: put back the one the weights were trained with$"):
        export_run(run, tmp_path / "hf")
    with pytest.raises(UserError, match=r"no tokenizer in .*: put back the one the weights were trained with$"):
        load_trained(run)


def test_weights_are_cut_into_shards_that_an_index_names(as_run: AsRun, tmp_path: Path) -> None:
    exported = export_run(as_run(), tmp_path / "hf", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert exported.shards == len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert all((tmp_path / "hf" / file).stat().st_size < 50_000 for file in files)
    assert not load_theirs(tmp_path / "hf")[1]


def test_only_an_empty_place_is_written_to(as_run: AsRun, tmp_path: Path) -> None:
    run = as_run()
    (tmp_path / "hf").mkdir()
    export_run(run, tmp_path / "hf")
    with pytest.raises(UserError, match=r"is not empty: choose another folder"):
        export_run(run, tmp_path / "hf")


def test_a_checkpoint_is_named_where_it_is_damaged_or_missing(as_run: AsRun, tmp_path: Path) -> None:
    run = as_run()
    with pytest.raises(UserError, match=r"there is no such folder"):
        export_run(tmp_path / "nothing", tmp_path / "hf")
    weights = run / "checkpoints/step_0" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[:8] = b"\xff" * 8
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"step_0 cannot be read"):
        export_run(run, tmp_path / "hf")
    weights.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"is damaged .* put back a whole copy of it, or train again"):
        export_run(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
