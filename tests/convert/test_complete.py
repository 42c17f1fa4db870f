"""Configurations take what they leave out from the data and the autoencoder, and are checked."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import detailflow_jax as df
from convert_models import random_params
from detailflow_jax import data, train
from detailflow_jax.convert import published, start
from detailflow_jax.convert.complete import complete, doubling
from detailflow_jax.convert.load import load, reading_once
from detailflow_jax.models.vae import VAEConfig
from detailflow_jax.runtime.config import check_same, load_config, read_config, write_config
from detailflow_jax.runtime.errors import ConfigError

COMMON = {"source": "test", "class_names": ["a", "b", "c"], "num_classes": 3, "image_size": 16}
QUICK = [
    *("--config.batch_size=2", "--config.total_steps=1", "--config.tensorboard=False"),
    *("--config.optim.warmup_steps=0", "--config.log_every=1"),
]


def write(folder, layout, definition, values):
    """A finished extraction of values, one per image."""
    data.open_extraction(str(folder), layout, definition)
    records = [(i, i % 3, value) for i, value in enumerate(values)]
    data.write_shard(str(folder), layout, 0, records, {})
    data.write_manifest(str(folder), layout)
    return str(folder)


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """Two crops of 8 tokens in groups of 2, the first 4 causal, of 16 codes."""
    definition = COMMON | {"tokenizer": "t", "group_size": 2, "causal_num": 4, "crops": "none"}
    values = np.random.default_rng(0).integers(0, 16, (6, 2, 8, 3))
    return write(
        tmp_path_factory.mktemp("codes"),
        data.CodeLayout(6, 6, 2, 8, 16),
        definition | {"seed": 0},
        values,
    )


def generator(codes, *overrides):
    small = ["--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2"]
    arguments = [f"--config=configs/generator.py:digits:codes={codes}", *QUICK, *small]
    return [*arguments, *overrides]


SIZES = {"num_tokens": 8, "group_size": 2, "causal_num": 4, "codebook_size": 16, "num_classes": 3}
FITTING = [f"--config.model.{name}={value}" for name, value in SIZES.items()]


def config_of(arguments):
    spec, *overrides = arguments
    return load_config(spec.removeprefix("--config="), overrides)


def test_a_generator_takes_its_sizes_from_the_codes(codes):
    config = config_of(generator(codes))
    for name in SIZES:
        config.model[name] = None
    assert {name: complete(config).model[name] for name in SIZES} == SIZES
    assert config.model.num_classes is None  # the configuration given stays as it is
    assert complete(config_of(generator(codes, *FITTING))).model.num_classes == 3
    more = generator(codes, *FITTING, "--config.model.num_classes=4")
    assert complete(config_of(more)).model.num_classes == 4


def test_an_older_run_has_the_default_of_a_field_that_it_lacks(codes, tmp_path):
    config = complete(config_of(generator(codes, *FITTING)))
    write_config(config, tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["model"]["class_dropout"], fields["model"]["num_classes"]
    path.write_text(json.dumps(fields))
    for changed in ([], ["--config.model.class_dropout=0.1"]):
        check_same(complete(config_of(generator(codes, *FITTING, *changed))), tmp_path)
    other = complete(config_of(generator(codes, *FITTING, "--config.model.class_dropout=0.5")))
    with pytest.raises(ConfigError, match=r"model.class_dropout: 0.1 in the workdir, 0.5 now"):
        check_same(other, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_classes", x) for x in (2, 1)),
        *(("codebook_size", x) for x in (8, 64)),
        *(("group_size", x) for x in (4, 1)),
        *(("num_tokens", x) for x in (4, 12)),
        ("causal_num", 2),
    ],
)
def test_a_contradiction_ends_before_the_first_step(codes, tmp_path, capsys, field, value):
    wrong = generator(codes, *FITTING, f"--config.model.{field}={value}")
    workdir = ["--workdir", str(tmp_path / "run")]
    assert train.main([*wrong, *workdir]) == 2
    error = capsys.readouterr().err
    assert f"config.model.{field} is {value} in the configuration" in error
    assert f"but {SIZES[field]} according to the codes in {codes}" in error
    assert f"--config.model.{field}={SIZES[field]}" in error
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_corrected_command_is_not_refused(codes, tmp_path):
    workdir = ["--workdir", str(tmp_path)]
    assert train.main([*generator(codes, *FITTING, "--config.model.num_classes=2"), *workdir]) == 2
    assert train.main([*generator(codes, *FITTING), *workdir]) == 0
    assert read_config(tmp_path).model.num_classes == 3


def test_images_are_no_codes(tmp_path, capsys):
    wrong = generator("x", "--config.data.source=digits")
    assert train.main([*wrong, "--workdir", str(tmp_path)]) == 2
    assert "a generator trains on codes:DIR" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- FlowAR

CONFIG = VAEConfig(
    channels=4, multipliers=(1, 2), res_blocks=1, latent_channels=3, norm_groups=2,
    scale_factor=0.5, shift_factor=-0.25, quant_conv=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A published file of an autoencoder of no published size."""
    model = df.VAE(CONFIG, random_params("vae", CONFIG, scan=False))
    return str(df.save_pytorch(model, tmp_path_factory.mktemp("vae") / "vae.safetensors"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Latents of 6 x 6 x 3."""
    definition = COMMON | {"vae": "v", "scale_factor": 0.5, "shift_factor": -0.25, "crop": "none"}
    values = np.ones((6, 2, 6, 6, 6), np.float32)
    layout = data.LatentLayout(6, 6, (6, 6, 3), "float32")
    return write(tmp_path_factory.mktemp("latents"), layout, definition, values)


def flowar(latents, vae, *overrides):
    spec = f"configs/flowar.py:flowar_s:runlocal,latents={latents},vae={vae}"
    return load_config(spec, ["--config.vae.norm_groups=2", *overrides])


def test_flowar_takes_its_sizes_from_the_latents_and_the_autoencoder(latents, vae):
    config = complete(flowar(latents, vae))
    assert (config.model.channels, config.model.num_classes) == (3, 3)
    assert config.model.scales == (1, 2, 4, 6)
    found = VAEConfig(**{k: v for k, v in config.vae.items() if k not in ("path", "random")})
    assert found == CONFIG
    assert complete(flowar(latents, vae, "--config.model.scales=(2,6)")).model.scales == (2, 6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.num_classes=2",
            "num_classes is 2 in the configuration, but 3 according to the latents in",
        ),
        (
            "model.channels=4",
            r"channels is 4 .*, but 3 according to the latents in .* \(6 x 6 x 3\)",
        ),
        (
            "model.scales=(1,2,4)",
            r"scales is \(1, 2, 4\) .*, but \(1, 2, 4, 6\) according to the latents",
        ),
        (
            "data.image_size=64",
            "data.image_size is 64 in the configuration, but 16 according to the latents in",
        ),
        ("vae.channels=8", "vae.channels is 8 .*, but 4 according to the autoencoder"),
    ],
)
def test_flowar_is_checked(latents, vae, override, message):
    with pytest.raises(ConfigError, match=message):
        complete(flowar(latents, vae, f"--config.{override}"))


def test_without_latents_the_images_and_the_autoencoder_tell(vae):
    source = ["--config.data.source=digits", "--config.data.image_size=16"]
    config = complete(flowar("x", vae, *source))
    assert (config.model.num_classes, config.model.channels) == (10, 3)
    assert config.model.scales == (1, 2, 4, 8)
    with pytest.raises(ConfigError, match=r"num_classes is 9 .*, but 10 according to the images"):
        complete(flowar("x", vae, *source, "--config.model.num_classes=9"))


def test_the_autoencoder_is_read_once(latents, vae, tmp_path, monkeypatch):
    """Its sizes, its fingerprint and its weights are asked for at the start of a run."""
    reads, read = [], published.read
    monkeypatch.setattr(published, "read", lambda *a, **k: reads.append(a) or read(*a, **k))
    with reading_once():
        config = complete(flowar(latents, vae))
        start.check_encoder(config, "", tmp_path)
        params = jax.tree.map(jnp.zeros_like, load("vae", vae).params)
        start.read_vae(config.vae, params)
        assert len(reads) == 1
        load("vae", vae, overrides={"scale_factor": 0.75})  # Another autoencoder, so to speak.
        assert len(reads) == 2
    load("vae", vae)
    assert len(reads) == 3


def test_schedules_end_at_the_side():
    assert [doubling(side) for side in (1, 2, 3, 16)] == [
        (1,), (1, 2), (1, 2, 3), (1, 2, 4, 8, 16),
    ]  # fmt: skip
