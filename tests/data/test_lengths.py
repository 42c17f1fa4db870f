"""The lengths of a run follow the number of its images; what the user has set stays."""

import numpy as np
import pytest
from PIL import Image

from detailflow_jax.data.lengths import follow_images
from detailflow_jax.runtime.config import check_same, load_config, write_config


@pytest.fixture
def photos(tmp_path):
    def make(count):
        folder = tmp_path / str(count) / "cat"
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
        return f"--config.data.source=folder:{folder.parent}"

    return make


def test_a_published_recipe_on_a_few_photographs(tmp_path, photos):
    spec = "configs/tokenizer.py:detailflow_16:plain,batch_size=64"
    published = load_config(spec)
    assert published.total_steps == 5_004_500 and published.figures_every == 5000
    config, said = follow_images(load_config(spec, [photos(80)]), tmp_path / "run")
    assert config.total_steps == 2000  # Epochs of 80 images would be no training.
    assert config.optim.warmup_steps == 100
    assert config.figures_every == config.checkpoint_every == 100 and config.log_every == 10
    assert config.discriminator.start_step == config.losses.perceptual.ramp == 100
    assert "for 80 images: total_steps=2000" in said
    # What is asked for is done.
    asked = [
        "--config.total_steps=500",
        "--config.figures_every=7",
        "--config.optim.warmup_steps=3",
    ]
    config, _ = follow_images(load_config(spec, [photos(20), *asked]), tmp_path / "run")
    assert (config.total_steps, config.figures_every, config.optim.warmup_steps) == (500, 7, 3)
    assert config.checkpoint_every == 25
    usual = ["--config.total_steps=5004500", "--config.log_every=100"]  # What the file says.
    config, _ = follow_images(load_config(spec, [photos(30), *usual]), tmp_path / "run")
    assert (config.total_steps, config.log_every) == (5_004_500, 100)
    epochs = load_config(f"{spec},epochs=4", [photos(64)])
    assert follow_images(epochs, tmp_path / "run")[0].total_steps == 4


def test_small_variants_take_more_steps_for_more_images(tmp_path, photos):
    found = {}
    for count in (40, 160):
        config = load_config("configs/vae.py:small", [photos(count)])
        config, _ = follow_images(config, tmp_path / "run")
        found[count] = config.total_steps
        assert config.optim.warmup_steps == config.total_steps // 20
        assert 1 / (1 - config.ema.decay) <= 0.1 * config.total_steps + 1e-6
    assert found == {40: 2000, 160: 4000}


def test_a_run_that_has_begun_keeps_its_lengths(tmp_path, photos):
    """Photographs may be added to the folder."""
    run, spec = tmp_path / "run", "configs/tokenizer.py:small"
    begun, _ = follow_images(load_config(spec, [photos(40)]), run)
    write_config(begun, run)
    again = load_config(spec, [photos(90)])
    again.data.source = begun.data.source
    (tmp_path / "40" / "cat" / "one_more.png").write_bytes(
        (tmp_path / "40" / "cat" / "0.png").read_bytes()
    )
    config, _ = follow_images(again, run)
    assert config.total_steps == begun.total_steps
    check_same(config, run)
    longer = load_config(spec, ["--config.total_steps=9000"])
    longer.data.source = begun.data.source
    config, _ = follow_images(longer, run)
    assert config.total_steps == 9000 and config.optim.warmup_steps == begun.optim.warmup_steps
    check_same(config, run)
    as_the_file = load_config(spec, ["--config.total_steps=10000"])
    as_the_file.data.source = begun.data.source
    assert follow_images(as_the_file, run)[0].total_steps == 10_000


@pytest.mark.parametrize("spec", ["tokenizer.py:digits", "tokenizer.py:detailflow_16:runlocal"])
def test_other_variants_stay_as_they_are(tmp_path, photos, spec):
    config = load_config(f"configs/{spec}", [photos(5)])
    assert follow_images(config, tmp_path)[0] is config
