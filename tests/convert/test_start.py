"""Training that starts from weights: what goes where, when, and what refuses to start."""

import functools
import json
import shutil

import jax
import ml_collections
import numpy as np
import pytest
import torch

from convert_models import published, random_params
from detailflow_jax import train
from detailflow_jax.convert import CheckpointError, export, mapping, start
from detailflow_jax.models import layers
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.checkpoint import restore_params
from detailflow_jax.runtime.config import load_config
from detailflow_jax.tasks import generator as generator_task
from detailflow_jax.tasks import make_task
from detailflow_jax.tasks import tokenizer as tokenizer_task

TASKS = {"tokenizer": tokenizer_task, "generator": generator_task}


def digits(**fields) -> ml_collections.ConfigDict:
    config = load_config("configs/tokenizer.py:digits:runlocal")
    config.model.scan = True
    for part in (config.model.encoder, config.model.decoder):
        part.update(patch_size=8, table_side=4)
    config.update_from_flattened_dict(fields)
    return config


def generator(**fields) -> ml_collections.ConfigDict:
    config = load_config("configs/generator.py:digits:runlocal")
    config.model.scan = True
    config.update_from_flattened_dict(fields)
    return config


def aligned(**fields) -> ml_collections.ConfigDict:
    """A tokenizer with alignment, of the sizes of the small SigLIP2."""
    config = load_config("configs/tokenizer.py:detailflow_16:runlocal")
    size = {"width": 48, "num_heads": 4, "mlp_dim": 80, "patch_size": 4, "table_side": 6}
    config.model.update(image_size=24, num_tokens=16, teacher_width=48, dtype="float32")
    config.model.encoder.update(size, depth=2)
    config.model.decoder.update(size, depth=1)
    config.teacher.update(size, depth=3, random=False)
    config.update_from_flattened_dict(fields)
    return config


def new_state(config):
    """The state of a new run; it does not depend on the weights named, so it is made once."""
    plain = config.copy_and_resolve_references()
    plain.init_from = {}
    if "teacher" in plain:
        plain.teacher.update(path=None, random=True)
    return _state_of(plain.to_json())


@functools.cache
def _state_of(text):
    config = ml_collections.ConfigDict(json.loads(text))
    mesh = sharding.make_mesh(config.mesh)
    abstract = sharding.abstract_state(make_task(config).init, jax.random.key(1), mesh)
    rng = np.random.default_rng(1)

    def fill(leaf):  # much faster than to compile the initialisation
        return jax.device_put(rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, abstract)


def assert_equal(got, want):
    got, want = mapping.flatten(got), mapping.flatten(want)
    assert got.keys() == want.keys()
    for path, x in want.items():
        np.testing.assert_array_equal(got[path], x, err_msg=path)


def exported(tmp_path, config, **change):
    """A published folder of random weights for a config's network: (path, parameters)."""
    network = TASKS[config.task].model_config(config.model)
    params = random_params(config.task, network, scan=True, **change)
    export.export(config.task, network, params, tmp_path / "published")
    return str(tmp_path / "published"), params


# ------------------------------------------------------------------------------ what goes where


@pytest.mark.parametrize("scan", [True, False])
def test_whole_tokenizer(tmp_path, scan):
    path, params = exported(tmp_path, digits())
    config = digits(**{"init_from.model": path, "model.scan": scan, "ema.decay": 0.5})
    before = new_state(config)
    after = start.load_into(config, before, make_task(config).frozen, fresh=True)
    want = params if scan else layers.unstack_layers(params)
    assert_equal(after.params, want)
    assert_equal(after.ema, want)
    for path, leaf in mapping.flatten(after.params).items():
        assert leaf.sharding == mapping.flatten(before.params)[path].sharding
        # A step gives the memory of both away: they may not be the same.
        average = mapping.flatten(after.ema)[path]
        assert leaf.unsafe_buffer_pointer() != average.unsafe_buffer_pointer()
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), after.opt_state, before.opt_state)
    )


def test_whole_generator(tmp_path):
    path, params = exported(tmp_path, generator())
    config = generator(**{"init_from.model": path})
    assert_equal(
        start.load_into(config, new_state(config), make_task(config).frozen, fresh=True).params,
        params,
    )


def test_raw_weights_or_their_average(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(start.logging, "info", lambda text, *args: said.append(text % args))
    path, params = exported(tmp_path, generator())
    file = tmp_path / "published" / "checkpoints" / "16.pt"
    content = torch.load(file, weights_only=True)
    content["ema"] = {name: x + 1 for name, x in content["model"].items()}
    torch.save(content, file)
    for choice, shift, name in (("", 1, "average"), ("#ema", 1, "average"), ("#model", 0, "raw")):
        config = generator(**{"init_from.model": f"{path}{choice}", "ema.decay": 0.5})
        state = start.load_into(config, new_state(config), make_task(config).frozen, fresh=True)
        want = jax.tree.map(lambda x, shift=shift: x + np.float32(shift), params)
        assert_equal(state.params, want)
        assert_equal(state.ema, want)
        assert any(name in line and path in line for line in said)
        said.clear()


def test_other_classes_start_anew(tmp_path, caplog):
    """Every tensor of the file but the class table, which the log names."""
    path, params = exported(tmp_path, generator(**{"model.num_classes": 7}))
    config = generator(**{"init_from.model": path, "model.num_classes": 10})
    before = new_state(config)
    with caplog.at_level("INFO", logger="absl"):
        after = start.load_into(config, before, make_task(config).frozen, fresh=True)
    want = params | {"class_embedding": before.params["class_embedding"]}
    assert_equal(after.params, want)
    assert "starts anew: it has 7 classes in the file, 10 here" in caplog.text


def test_classes_start_as_those_named(tmp_path):
    path, params = exported(tmp_path, generator(**{"model.num_classes": 7}))
    mapped = {"init_from.model": path, "init_from.classes": "6, new, 0", "model.num_classes": 3}
    config = generator(**mapped)
    after = start.load_into(config, new_state(config), make_task(config).frozen, fresh=True)
    rows = np.asarray(params["class_embedding"]["embedding"])[[6, 7, 0, 7]]  # 7: the null class
    assert_equal(after.params, params | {"class_embedding": {"embedding": rows}})
    for classes, found in (("6,0", "2 are named"), ("6,8,0", "'8' is no class of it")):
        config = generator(**(mapped | {"init_from.classes": classes}))
        with pytest.raises(CheckpointError, match=f"init_from.classes={classes}.*{found}.*3 words"):
            start.load_into(config, new_state(config), make_task(config).frozen, fresh=True)


def test_tables_of_another_grid_are_resized(tmp_path):
    """From 32 pixels to 48: the tables change as the network would resize them on the fly."""
    path, params = exported(tmp_path, digits())
    fields = {"model.image_size": 48, "init_from.model": path}
    fields |= {f"model.{part}.table_side": 6 for part in ("encoder", "decoder")}
    config = digits(**fields)
    state = start.load_into(config, new_state(config), make_task(config).frozen, fresh=True)
    for part in ("encoder", "decoder"):
        old = params[part]["trunk"]["position_table"].reshape(4, 4, -1)
        want = torch.nn.functional.interpolate(
            torch.from_numpy(old).permute(2, 0, 1)[None], (6, 6), mode="bilinear", antialias=True
        )
        got = state.params[part]["trunk"]["position_table"].reshape(6, 6, -1)
        np.testing.assert_allclose(got, want[0].permute(1, 2, 0).numpy(), atol=1e-6)
    np.testing.assert_array_equal(state.params["codebook"], params["codebook"])


@pytest.mark.parametrize("count", [8, 32])
def test_tables_of_another_number_of_tokens_are_resized(tmp_path, caplog, count):
    path, params = exported(tmp_path, digits())
    config = digits(**{"model.num_tokens": count, "init_from.model": path})
    with caplog.at_level("INFO", logger="absl"):
        state = start.load_into(config, new_state(config), make_task(config).frozen, fresh=True)
    got, want = mapping.flatten(state.params), mapping.flatten(params)
    tables = [name for name in want if got[name].shape != want[name].shape]
    names = ("latent_positions", "latent_tokens", "refined_tokens")
    assert tables and all(name.endswith(names) for name in tables)
    for name in tables:
        table = torch.from_numpy(np.array(want[name])).T[None, :, None]
        kept = torch.nn.functional.interpolate(
            table, (1, count), mode="bilinear", antialias=True, align_corners=False
        )
        np.testing.assert_allclose(got[name], kept[0, :, 0].T.numpy(), atol=1e-5)
        assert f"resized from 16 to {count} tokens" in caplog.text
    assert_equal(
        {name: x for name, x in got.items() if name not in tables},
        {name: x for name, x in want.items() if name not in tables},
    )


def test_alignment_projection_starts_anew_where_the_file_has_none(tmp_path, theirs):
    files = theirs[1]
    path, params = exported(tmp_path, aligned(**{"teacher.random": True}))  # leaves it out
    config = aligned(**{"init_from.model": path, "teacher.path": str(files["vision"])})
    before = new_state(config)
    after = start.load_into(config, before, make_task(config).frozen, fresh=True)
    for name, x in after.params.items():
        fresh = name.startswith("align_layers")
        assert_equal({name: x}, {name: (before.params if fresh else params)[name]})


def test_encoder_and_teacher_from_siglip(theirs):
    model, files = theirs
    names = {"init_from.encoder": str(files["both"]), "teacher.path": str(files["vision"])}
    config = aligned(**names)
    before = new_state(config)
    after = start.load_into(config, before, make_task(config).frozen, fresh=True)
    state = {k: x.numpy() for k, x in model.state_dict().items()}
    teacher, encoder = after.frozen["teacher"], after.params["encoder"]["trunk"]
    for got, depth in ((teacher, 3), (encoder, 2)):
        kernel = got["blocks"]["layers"]["fc1"]["kernel"]
        assert kernel.shape[0] == depth
        for i in range(depth):
            np.testing.assert_array_equal(kernel[i], state[f"encoder.layers.{i}.mlp.fc1.weight"].T)
        np.testing.assert_array_equal(got["final_norm"]["bias"], state["post_layernorm.bias"])
    others = {k: x for k, x in after.params.items() if k != "encoder"}
    assert_equal(others, {k: before.params[k] for k in others})
    for name in ("latent_tokens", "refined_tokens", "latent_positions"):
        np.testing.assert_array_equal(after.params["encoder"][name], before.params["encoder"][name])


def test_restored_state_gets_its_teacher_alone(theirs):
    files = theirs[1]
    names = {"init_from.encoder": "not/there", "teacher.path": str(files["training.pt"])}
    config = aligned(**names)
    before = new_state(config)
    after = start.load_into(config, before, make_task(config).frozen, fresh=False)
    assert_equal(after.params, before.params)
    old, new = (s.frozen["teacher"]["final_norm"]["bias"] for s in (before, after))
    assert not np.array_equal(old, new)


def test_nothing_named_nothing_read():
    config = digits()
    state = new_state(config)
    assert start.load_into(config, state, make_task(config).frozen, fresh=True) is state
    assert (
        start.load_into(ml_collections.ConfigDict({"task": "toy"}), state, (), fresh=True) is state
    )


# ------------------------------------------------------------------------------------ in the loop


def test_run_starts_from_weights_once(tmp_path, monkeypatch):
    path, params = exported(tmp_path, digits())
    config = digits(**{"init_from.model": path, "tensorboard": False})
    seen = []

    def leave_after_one(run, task, state, step):
        seen.append(jax.device_get(state.params))
        run.feed.take()
        run.record()
        run.averages.add(step + 1, {"loss": np.float32(0)})
        state = state.replace(params=jax.tree.map(lambda x: x + 1, state.params))
        run.save(step + 1, state)
        raise train.Preempted(step + 1)

    monkeypatch.setattr(train, "run_steps", leave_after_one)
    for _ in range(2):
        with pytest.raises(train.Preempted):
            train.train(config, str(tmp_path / "run"))
        # What is restored is newer than the file, which is not looked at again.
        shutil.rmtree(tmp_path / "published", ignore_errors=True)
    assert_equal(seen[0], params)
    assert_equal(seen[1], jax.tree.map(lambda x: x + 1, params))
    # And a run can itself be started from.
    other = digits(**{"init_from.model": str(tmp_path / "run")})
    got = start.load_into(other, new_state(other), make_task(other).frozen, fresh=True).params
    assert_equal(got, restore_params(tmp_path / "run"))


def test_what_cannot_start(tmp_path, capsys):
    arguments = ["--workdir", str(tmp_path / "run"), "--config"]
    assert train.main([*arguments, "configs/tokenizer.py:detailflow_16"]) == train.UNUSABLE
    error = capsys.readouterr().err
    assert "config.teacher.path is not set" in error
    assert (
        "google/siglip2-so400m-patch16-naflex" in error and "config.losses.align.weight=0" in error
    )
    assert "Traceback" not in error

    arguments = ["--workdir", str(tmp_path / "digits"), "--config.tensorboard=False", "--config"]
    arguments += ["configs/tokenizer.py:digits:runlocal", "--config.init_from.model=nowhere.pt"]
    assert train.main(arguments) == train.UNUSABLE
    assert "error: nowhere.pt: there is no such file or folder" in capsys.readouterr().err


def test_contradictions(tmp_path, theirs):
    both = {"init_from.model": "a.pt", "init_from.encoder": "b.pt"}
    with pytest.raises(CheckpointError, match=r"both model=a\.pt and encoder=b\.pt"):
        start.load_into(digits(**both), None, (), fresh=True)
    path = str(published(tmp_path / "gen", "generator_a"))
    config = digits(**{"init_from.model": path})
    with pytest.raises(CheckpointError, match=r"looks like a DetailFlow generator"):
        start.load_into(config, new_state(config), make_task(config).frozen, fresh=True)
    vision = str(theirs[1]["vision"])
    for field, message in (
        ("model", "looks like a SigLIP2 vision model"),
        ("encoder", r"vision.*has shape \(48, 48\); expected \(\d+, \d+\)"),
    ):
        config = digits(**{f"init_from.{field}": vision})
        with pytest.raises(CheckpointError, match=message):
            start.load_into(config, new_state(config), make_task(config).frozen, fresh=True)
    path, _ = exported(tmp_path, digits())
    config = digits(**{"init_from.encoder": path})
    with pytest.raises(CheckpointError, match=r"looks like a DetailFlow tokenizer.*a SigLIP2 vis"):
        start.load_into(config, new_state(config), make_task(config).frozen, fresh=True)
    config = digits(**{"init_from.model": path, "model.codebook_size": 7})
    with pytest.raises(CheckpointError, match=r"quantize.embedding.* has shape .*; expected \(7, "):
        start.load_into(config, new_state(config), make_task(config).frozen, fresh=True)
    with pytest.raises(ValueError, match=r"config\.teacher\.path is not set"):
        make_task(aligned())
