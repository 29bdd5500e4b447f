"""The commands of the README and of the pages behind it work as written, and the map shows the files there are."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from command_line import ROOT, Commands
from small_model import SMALL

from moe_train.claims import markdown
from moe_train.claims.markdown import BEGIN, END
from moe_train.compose import compose_model
from moe_train.cost.hardware import load_hardware
from moe_train.forecast.parts import Machine, Task, step
from moe_train.forecast.published import published_runs
from moe_train.forecast.utilization_model import leave_one_out

README = (ROOT / "README.md").read_text()
REPRODUCED = README[README.index("## What was reproduced") : README.index("## The map")]
PUBLISHED = (ROOT / "docs/published.md").read_text()
MAP = (ROOT / "docs/map.md").read_text()
# As one would read them: some of the later commands look at runs of the earlier ones.
PAGES = ("runs", "cost", "precision", "sweeps", "weights", "parallel", "dashboard", "benchmark", "claims", "published")
TEXT = "\n".join([README, *((ROOT / f"docs/{page}.md").read_text() for page in PAGES)])
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
COMMANDS = list(dict.fromkeys(LINES))


def test_the_first_command_installs_and_trains_and_the_second_installs_and_tests() -> None:
    assert COMMANDS[:2] == ["pip install -e . && accelerate launch train.py", 'pip install -e ".[dev]" && pytest']
    assert "pip install" in (ROOT / ".ci/run").read_text()
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("pytest")


@pytest.mark.xdist_group("readme")
def test_every_other_command_runs(commands: Commands, text_corpus: Path) -> None:
    (commands.folder / "books").mkdir()
    (commands.folder / "books/one.txt").write_text("\n\n".join(["some words of a book " * 400] * 200))
    for command in COMMANDS[2:]:
        commands.run(*made_small(shlex.split(command, comments=True), commands))


NARROW = ["model.intermediate_size=44", "data.vocab_size=320", "data.sequence_length=16", "num_threads=1"]
SHAPE = ["model.hidden_size=32", "model.num_hidden_layers=2"]


def made_small(words: list[str], commands: Commands) -> list[str]:
    """The command with the repository's files in place, on the tiny text and a tiny model, for three steps."""
    own = {word.split("=")[0] for word in words}
    if "train.py" in words:
        tiny = [o for o in commands.tiny if not o.startswith(("data=", "data.files=", "stop", "model", "tracking="))]
        tiny += ["data.val_fraction=0.3"]
        if "--config-dir" not in words:  # else the model and its tokenizer are given
            tiny += [*SHAPE, "data.tokenizer=bytes"]
            tiny += [] if "model.moe=null" in words else ["model.moe.num_experts=8"]
        else:
            tiny = [o for o in tiny if not o.startswith("data.tokenizer=")]
        if "data=text_files" not in words:
            tiny += [o for o in commands.tiny if o.startswith(("data=", "data.files="))]
        tiny = [o for o in tiny if o.split("=")[0] not in own]
        # Steps end it early whatever else the command stops by.
        return [str(ROOT / w) if w == "train.py" else w for w in words] + tiny + ["stop.steps=3"]
    if words[:2] == ["wandb", "leet"]:
        (file,) = commands.folder.glob(words[2] + "/run-*.wandb")
        return ["wandb", "leet", "inspect", "--json", str(file)]  # a terminal's view, read without one
    script = words[1].removeprefix("scripts/")
    if script == "reproduce.py":
        return [words[0], str(ROOT / words[1]), *of_a_tiny_claim(words[2:], commands)]
    if script == "sweep.py":
        tiny = [o for o in commands.tiny if not o.startswith("stop")]
        return [words[0], str(ROOT / words[1]), *words[2:], "trials=1", *tiny, *NARROW[:1], "stop.steps=3"]
    if "probe=true" in words:
        tiny = [o for o in commands.tiny if not o.startswith("stop")]
        return [
            words[0],
            str(ROOT / words[1]),
            *[w for w in words[2:] if w != "model=nano"],
            *tiny,
            "model=nano",
            *SHAPE,
        ]
    extra = {"generate.py": ["max_new_tokens=3"], "upcycle.py": SHAPE, "benchmark.py": [*SMALL, *NARROW]}
    return [words[0], str(ROOT / words[1]), *words[2:], *extra.get(script, [])]


def of_a_tiny_claim(words: list[str], commands: Commands) -> list[str]:
    """One arm and two seeds in place of the claim; a page with markers, if one is asked for."""
    if any(word.startswith("readme=") for word in words):
        (commands.folder / "MINE.md").write_text(f"{BEGIN}\n{END}\n")
    if "scale=smoke" not in words:
        return words
    folder = commands.folder / "own/claim"
    folder.mkdir(parents=True)
    claim = yaml.safe_load((ROOT / "configs/claim/latent_attention.yaml").read_text())
    comparison = {"arm": "mha", "against": None, "measure": "val_loss", "test": {"kind": "below", "margin": 3.0}}
    base = [o for o in commands.tiny if not o.startswith(("stop", "tracking", "num_threads"))]
    scale = {"smoke": {"overrides": [], "tokens": [1280], "seeds": 2}}
    tiny = {"base": base, "arms": {"mha": claim["arms"]["mha"]}, "comparisons": [comparison], "scales": scale}
    (folder / "latent_attention.yaml").write_text(yaml.safe_dump(claim | tiny))
    return [*words, "--config-dir", "own", "num_threads=1"]


def test_every_page_is_reached_from_the_readme_and_links_only_to_what_is_there() -> None:
    pages = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    assert pages == sorted([*(f"{page}.md" for page in PAGES), "map.md", "log.md"])
    for page in ("README.md", *(f"docs/{name}" for name in pages)):
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text())
        for link in links:
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
        if page == "README.md":
            assert {f"docs/{name}" for name in pages} <= set(links)


def test_the_map_names_every_module_and_no_other() -> None:
    described = MAP[MAP.index("train.py                 the entry") :]
    for folder in (
        "model",
        "data",
        "training",
        "cost",
        "forecast",
        "precision",
        "tracking",
        "interop",
        "generation",
        "evaluation",
        "benchmark",
        "claims",
        "dashboard",
        "parallel",
        "sweeps",
        "search",
    ):
        for file in (ROOT / "moe_train" / folder).glob("[a-z]*.py"):
            assert re.search(rf"\b{file.stem}\b", described), f"{folder}/{file.name}"
    for name in re.findall(r"^(?:  )?([\w.]+/?)\s", described, re.M):
        assert (ROOT / name).exists() or (ROOT / "moe_train" / name).exists(), name
    rooms = [path.name for path in (ROOT / "moe_train").iterdir() if path.is_dir() and path.name != "__pycache__"]
    short = README[README.index("## The map") :]
    for room in rooms:
        assert re.search(rf"`(moe_train/)?{room}`", short), room


def test_every_choice_of_the_small_groups_is_named() -> None:
    groups = (
        "optimizer",
        "schedule",
        "precision",
        "parallel",
        "tracking",
        "debug",
        "experiment",
        "model/moe",
        "model/mtp",
    )
    for group in (*groups, "model/rope_scaling", "sweep"):
        for file in (ROOT / "configs" / group).glob("*.yaml"):
            assert f"`{file.stem}`" in TEXT, f"{group}={file.stem}"


def test_every_configuration_file_is_valid_yaml_with_a_comment_that_says_what_it_is() -> None:
    for file in (ROOT / "configs").rglob("*.yaml"):
        text = file.read_text()
        yaml.safe_load(text)
        assert "# " in text.split("\n\n")[0], file


def test_the_readme_says_of_claims_what_their_report_says_and_no_more() -> None:
    inside = README[README.index(BEGIN) + len(BEGIN) : README.index(END)].strip()
    links = list(dict.fromkeys(re.findall(r"\]\((docs/results/claims/[^)]+)\)", inside)))
    contents = {link: json.loads((ROOT / link).read_text()) for link in links}
    assert sorted(links) == sorted(
        f"docs/results/claims/{each.name}"
        for each in (ROOT / "docs/results/claims").glob("*.json")
        if not each.stem.endswith("_smoke")
    )
    assert all(claim["digest"] for content in contents.values() for claim in content["claims"])  # edits are noticed
    assert inside == markdown.readme_section(contents).strip()


def test_the_published_figures_are_those_of_the_files_and_these_are_what_the_code_says_now() -> None:
    results = ROOT / "docs/results"
    v3, runs = (json.loads((results / f"{name}.json").read_text()) for name in ("deepseek_v3_cost", "published_runs"))
    text = " ".join(REPRODUCED.split())
    low, high = (f"{hours / 1e6:.2f}M" for hours in v3["predicted_interval"])
    for figure in (
        f"{v3['gpu_hours']:,} H800 hours",
        f"${v3['usd']:,}",
        f"{v3['flops_per_token'] / 1e9:.1f} GFLOPs",
        f"{v3['tokens_per_second_per_gpu']:,.0f} tokens/s and {v3['tflops_per_gpu']:.0f} TFLOP/s",
        f"{v3['share_of_bf16_peak']:.1%} of the BF16 peak",
        f"{v3['share_of_fp8_peak']:.1%} of the FP8 peak",
        f"{v3['mixed_precision_utilization']:.1%} of what its mix",
        f"{v3['predicted_gpu_hours'] / 1e6:.2f}M hours ({low} to {high})",
        f"{runs['within_1_5x']:.1%} within",
        f"median error {runs['median_error']:.1%} ({runs['nested_median_error']:.1%}",
        f"{runs['baseline_within_1_5x']:.1%} and {runs['baseline_median_error']:.1%}",
        f"held {runs['interval_coverage']:.1%}",
    ):
        assert figure in text, figure
        assert figure in " ".join(PUBLISHED.split()), figure
    assert f"{v3['peer_ratio']:.1f} times" in text
    left_out = leave_one_out(published_runs())
    assert [row["predicted_gpu_hours"] for row in runs["rows"]] == pytest.approx([p.gpu_hours for p in left_out])
    (own,) = (p for p in left_out if p.run.model == "DeepSeek-V3")
    assert own.gpu_hours == pytest.approx(v3["predicted_gpu_hours"])


def test_the_parts_of_published_runs_are_those_of_the_files() -> None:
    v3, v2 = (json.loads((ROOT / f"docs/results/deepseek_v{n}_parts.json").read_text()) for n in (3, 2))
    text = " ".join(PUBLISHED.split())
    hours, parts, hidden = v3["gpu_hours"], v3["gpu_hours_by_part"], v3["hidden_gpu_hours"]
    products = sum(part for name, part in parts.items() if name.startswith("products"))
    for figure in (
        f"{hours / 1e3:.1f}K GPU-hours a trillion tokens, {1 - hours / v3['published_gpu_hours']:.1%} fewer",
        f"Products take {products / hours:.1%}, attention {parts['attention'] / hours:.1%}",
        f"memory {parts['passes through memory'] / hours:.1%}",
        f"communication {parts['multiprocessors lent to communication'] / hours:.1%}",
        f"bubbles {parts['pipeline bubbles'] / hours:.1%}",
        f"{(hidden['expert dispatch'] + hidden['expert combine']) / 1e3:.1f}K hours",
        f"{1 - v2['gpu_hours'] / v2['published_gpu_hours']:.1%} fewer than its",
        f"would make {hours * v2['published_gpu_hours'] / v2['gpu_hours'] / 1e3:.1f}K",
        f"nothing {(parts['expert dispatch'] + parts['expert combine']) / hours:.1%}",
    ):
        assert figure in text, figure
    model = compose_model(["model=deepseek_v3", "model/mtp=depth_1"]).model.resolved()
    h800 = load_hardware(ROOT / "configs/hardware/h800.yaml")
    task = Task(model, 129280, 4096, 15360, 1, fp8=True, attention_kernel="flash_attention_3")
    other = step(task, Machine(h800, 2048, 16, 64, "dualpipe", "zero1"))
    hours = other.seconds * 2048 / 3600 * 1e12 / other.tokens
    later = f"{1 - hours / v3['published_gpu_hours']:.1%} fewer"
    assert f"FlashAttention-3 {hours / 1e3:.1f}K, {later}" in text
    usual = f"{1 - v3['gpu_hours'] / v3['published_gpu_hours']:.1%} fewer GPU-hours than it took, or {later}"
    assert usual in " ".join(REPRODUCED.split())


def test_the_figures_under_what_was_reproduced_are_the_measured_ones() -> None:
    summary = json.loads((ROOT / "docs/results/cpu_2_cores/quick_start.json").read_text())
    for text in (
        f"{summary['tokens']:,}",
        f"{summary['val_bits_per_byte']:.3f}",
        f"{summary['unigram_bits_per_byte']:.3f}",
        f"{summary['tokens_per_second']:,.0f}",
        f"{summary['model_flops_utilization']:.1%}",
        f"{summary['train_seconds']:.1f} and {summary['wall_seconds']:.1f}",
        f"{summary['usd_total']:.5f}",
        f"torch {summary['versions']['torch'].split('+')[0]}",
    ):
        assert text in REPRODUCED, text


def figures(file: str) -> dict[tuple[str, str], float | None]:
    """Of a device, by name and what was measured."""
    content = json.loads((ROOT / f"docs/results/{file}.json").read_text())
    return {(figure["name"], figure["of"]): figure["value"] for figure in content["figures"]}


def cells(text: str, label: str) -> list[str]:
    """Of the row of a table that begins with `label`, without it."""
    (row,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", text, re.M)
    return [cell.strip() for cell in row.split("|")]


def two_places(value: float) -> str:
    return f"{value:.2f}"


def percent(value: float) -> str:
    return f"{value:.0%}"


ON_CPU = {
    "tokens/s against the same weights in transformers' compiled DeepseekV3": ("peer_speedup", two_places),
    "peak memory against theirs (eager)": ("peak_memory_ratio", two_places),
    "a mixture of 64 experts against its dense twin of equal FLOPs, seconds a token": ("moe_tax", two_places),
    "the same without the optimizer": ("moe_tax_forward_backward", two_places),
    "256 experts against 8, tokens/s lost": ("experts_8_to_256_slowdown", percent),
    "share of the measured matmul rate": ("utilization_of_measured_peak", percent),
}


def test_the_steps_on_a_cpu_are_those_of_the_files() -> None:
    page = (ROOT / "docs/benchmark.md").read_text()
    page = page[page.index("**A step against") : page.index("**The same on one")]
    files = re.findall(r"\(results/(amd_\w+)\.json\)", page)
    assert len(files) == 4
    for label, (name, written) in ON_CPU.items():
        for file, cell in zip(files, cells(page, label)[1:], strict=True):
            value = {key[0]: each for key, each in figures(file).items()}.get(name)
            assert cell in (("", "not measured") if value is None else (written(value),)), (label, file)


def test_the_steps_of_the_readme_are_those_of_the_files() -> None:
    cpu = {name: value for (name, _), value in figures("amd_epyc_2_threads_adamw_64x256").items()}
    h200, wide = figures("nvidia_h200"), figures("nvidia_h200_2048")
    on_gpu = {name: value for (name, of), value in h200.items() if value is not None and of.startswith("base, ")}
    for label, name, here, there in (
        (
            "a mixture of 64 experts against its dense twin of equal FLOPs, seconds a token",
            *("moe_tax", "{:.2f} times", "{:.2f} times"),
        ),
        ("256 experts against 8, tokens/s lost", "experts_8_to_256_slowdown", "{:.0%}", "{:.1%}"),
        ("share of the measured matmul rate", "utilization_of_measured_peak", "{:.0%}", "{:.1%}"),
        (
            "tokens/s against the same weights in transformers' DeepseekV3",
            *("peer_speedup", "{:.2f} times (compiled)", "{:.2f} times (compiled"),
        ),
    ):
        _, small, _, large = cells(REPRODUCED, label)
        assert small == here.format(cpu[name]), label
        assert large.startswith(there.format(on_gpu[name])), label
    theirs = cells(REPRODUCED, "tokens/s against the same weights in transformers' DeepseekV3")[3]
    in_autocast = on_gpu["our_tokens_per_second"] / on_gpu["peer_tokens_per_second"]
    assert theirs.endswith(f" {in_autocast:.1f} times (BF16 autocast)")
    _, small, _, large = cells(REPRODUCED, "peak memory against theirs (eager)")
    assert small == f"{cpu['peak_memory_ratio']:.2f}"
    assert large == f"{on_gpu['peak_memory_ratio_bf16_weights']:.2f} and {on_gpu['peak_memory_ratio']:.2f}"
    (at_2048,) = (value for (name, _), value in wide.items() if name == "moe_tax")
    mixture = cells(REPRODUCED, "a mixture of 64 experts against its dense twin of equal FLOPs, seconds a token")
    assert mixture[3].endswith(f" {at_2048:.3f}")
    fp8 = [value for (name, _), value in h200.items() if name == "fp8_speedup" and value is not None]
    assert f"{min(fp8):.2f} to {max(fp8):.2f} times" in cells(REPRODUCED, "FP8 against BF16, tokens/s")[3]
