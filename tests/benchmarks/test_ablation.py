"""The ablation on digits: what its arms differ in, what it stores, and its table."""

import itertools
import json
import pathlib
import sys

import pytest

from detailflow_jax import tasks
from detailflow_jax.runtime.config import flatten, load_config
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import flowar as flowar_task
from detailflow_jax.tasks import generator as generator_task

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import ablation
import ablation_detailflow as detailflow
import ablation_flowar as flowar
import digit_figures

NAMES = [arm.name for arm in detailflow.ARMS]
FULL = detailflow.ARMS[-1]


def figures(value):
    return {"classifier": value / 100, "distance": 10 * value, "psnr": value, "steps": 7}


@pytest.mark.parametrize("arm", detailflow.ARMS, ids=NAMES)
def test_arms_make_tasks_that_belong_together(arm):
    tokenizer, generator = (arm.config(part, 3, 40) for part in ("tokenizer", "generator"))
    for config in (tokenizer, generator):
        tasks.make_task(config)
        assert (config.seed, config.total_steps, config.optim.warmup_steps) == (3, 40, 4)
    for field in ("group_size", "causal_num", "num_tokens", "codebook_size"):
        assert tokenizer.model[field] == generator.model[field]
    assert bool(generator.loss.correction) == tokenizer.correction.enabled


def test_each_arm_changes_what_its_row_says():
    tokenizers = [flatten(arm.config("tokenizer", 0, 40)) for arm in detailflow.ARMS]
    changed = [
        {name for name in after if after[name] != before[name]}
        for before, after in itertools.pairwise(tokenizers)
    ]
    assert changed == [
        {"model.causal_encoder"},
        {"full_probability"},
        {"model.group_size", "model.causal_num"},
        {"correction.enabled"},
        {"model.causal_num"},
    ]
    generators = [arm.config("generator", 0, 40).model for arm in detailflow.ARMS]
    models = map(generator_task.model_config, generators)
    assert [detailflow.steps(model) for model in models] == [16, 16, 16, 4, 4, 7]


@pytest.mark.parametrize("part", ["tokenizer", "generator"])
def test_the_last_arm_is_the_whole_system(part):
    """All it has of its own is how long and how quietly it trains."""
    own, usual = (
        flatten(c)
        for c in (
            FULL.config(part, 0, 40),
            load_config(f"{digit_figures.CONFIGS / part}.py:digits"),
        )
    )
    assert own["model.causal_num"] == usual["model.group_size"]
    differing = {name for name in usual if own[name] != usual[name]} - {"model.causal_num"}
    assert differing == {
        "total_steps", "optim.warmup_steps", "figures_every", "keep_checkpoints", "tensorboard",
    }  # fmt: skip


@pytest.mark.parametrize("arm", flowar.ARMS, ids=lambda arm: arm.name)
def test_arms_of_flowar_differ_in_what_their_row_says(arm):
    whole, own = (
        flatten(flowar.config(x, 3, 40, "runs/vae", "runs/latents")) for x in (flowar.ARMS[0], arm)
    )
    changed = {name for name in own if own[name] != whole[name]}
    assert changed == set(arm.fields) | ({"data.source"} if arm.name == "image" else set())
    sections = flowar.config(arm, 3, 40, "runs/vae", "runs/latents")
    flowar_task.model_config(with_side(sections).model)


def with_side(config):
    """What the latents would say."""
    config.model.scales = config.model.scales or (1, 2, 4, 8)
    config.model.channels, config.model.num_classes = 4, 10
    return config


def test_a_finished_run_is_not_run_again(tmp_path):
    settings = detailflow.Settings()
    definition = {**vars(settings), "seed": 0}
    stored = {"settings": definition, "figures": figures(90)}
    (tmp_path / "result.json").write_text(json.dumps(stored))
    assert ablation.run(detailflow, FULL, 0, settings, tmp_path) == figures(90)
    with pytest.raises(ConfigError, match=r"result\.json was made with .*take another --out"):
        ablation.run(detailflow, FULL, 0, settings.scaled(2), tmp_path)


def test_table_of_the_complete_seeds(tmp_path, monkeypatch, capsys):
    """Stopped in the second seed, the table is of the first; run again, of both."""
    stop_at = NAMES[3]

    def run(system, arm, seed, settings, out):
        assert system is detailflow
        assert out == tmp_path / f"seed{seed}" / arm.name
        if seed and arm.name == stop_at:
            raise ConfigError("no more")
        return figures(20 + 10 * seed + NAMES.index(arm.name))

    monkeypatch.setattr(ablation, "run", run)
    assert ablation.main(["--out", str(tmp_path), "--seeds", "2"]) == 2
    assert "stopped: no more" in capsys.readouterr().err
    text = (tmp_path / "ablation.md").read_text()
    assert "| baseline | 16" not in text and "| baseline | 7 | 20.0% | 200.00 | 20.00 |" in text
    stop_at = ""
    assert ablation.main(["--out", str(tmp_path), "--seeds", "2"]) == 0
    assert "baseline                   7      25.0% ± 7.1%" in capsys.readouterr().out
    text = (tmp_path / "ablation.md").read_text()
    row = "| + first group causal | 7 | 30.0% ± 7.1% | 300.00 ± 70.71 | 30.00 ± 7.07 |"
    assert text.splitlines()[1] == "|-|-|-|-|-|" and row in text and "seeds 0, 1;" in text
    content = json.loads((tmp_path / "ablation.json").read_text())
    assert content["runs"]["1"]["parallel"] == figures(33)
    assert content["summary"]["baseline"]["psnr"] == pytest.approx([25, 50**0.5])


@pytest.mark.parametrize("option", ["--seeds=0", "--scale=0"])
def test_senseless_options_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        ablation.parse([option])
    assert "--seeds must be at least 1, and --scale above 0" in capsys.readouterr().err
