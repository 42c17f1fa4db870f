"""The command `detailflow` and the modules that are commands."""

import subprocess
import sys
import time

import pytest

from detailflow_jax import cli

# What every subcommand's help begins with: the command line, and the name that it has to show.
HELP = {
    "train": "train",
    "extract-codes": "extract-codes",
    "extract_codes": "extract-codes",
    "extract --tokenizer runs/tok": "extract-codes",
    "extract --source digits --vae=runs/vae": "extract-latents",
    "generate": "generate",
    "evaluate generation": "evaluate generation",
    "convert": "convert",
    "push": "push",
    "weights": "weights",
    "prepare": "prepare",
    "compile-pod": "compile-pod",
    "demo": "demo",
    "demo flowar": "demo flowar",
    "demo photos": "demo photos",
    "demo adversarial": "demo adversarial",
}


def run(capsys, line: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `detailflow LINE`."""
    with pytest.raises(SystemExit) as left:
        cli.main(line.split())
    return left.value.code, *capsys.readouterr()


@pytest.mark.parametrize(("line", "name"), HELP.items())
def test_help_of_a_subcommand_shows_its_name(capsys, line, name):
    code, out, _ = run(capsys, f"{line} --help")
    assert code == 0
    assert out.startswith(f"usage: detailflow {name} [")
    assert "(default: None)" not in out and "(default: False)" not in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("generate --seed -1", "--seed: '-1': expected a whole number from 0 to 4294967295"),
        ("generate --per_class 1.5", "--per_class: '1.5': expected a whole number of at least 1"),
        ("generate --cfg_scale 0.5", "--cfg_scale: '0.5': expected a number of at least 1"),
        ("generate --temperature nan", "--temperature: 'nan': expected a number above 0"),
        ("generate --top_p 2", "--top_p: '2': expected a number above 0, at most 1"),
        ("generate --num_tokens 4,x", "--num_tokens: 'x': expected a whole number of at least 1"),
        ("generate --num_steps 0", "--num_steps: '0': expected"),
        ("evaluate generation --cfg_scale 1.5,inf", "--cfg_scale: 'inf': expected a number of at"),
        ("evaluate reconstruction --noise_groups 0,-4", "--noise_groups: '-4': expected a whole"),
        ("evaluate reconstruction --batch_size 0", "--batch_size: '0': expected a whole number"),
        ("extract-codes --seed 4294967296", "--seed: '4294967296': expected"),
        ("extract-codes --noise_top 0", "--noise_top: '0': expected"),
        ("extract-latents --image_size x", "--image_size: 'x': expected a whole number of at"),
        ("extract-latents --shard_size 0", "--shard_size: '0': expected"),
        ("convert --num_heads 2.5", "--num_heads: '2.5': expected a whole number"),
        ("push --step -1", "--step: '-1': expected a whole number of at least 0"),
        ("compile-pod --batch_size 0", "--batch_size: '0': expected a whole number of at least 1"),
        ("app --port 70000", "--port: '70000': expected a whole number from 0 to 65535"),
        ("demo --seed -1", "--seed: '-1': expected a whole number from 0 to 4294967295"),
        ("generate --num_processes 0", "--num_processes: '0': expected"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_its_name(capsys, line, found):
    code, _, error = run(capsys, line)
    assert code == 2 and found in error.splitlines()[-1]


def test_help_is_one_screen_with_every_subcommand(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    for name in cli.SHOWN:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1


def test_help_starts_without_jax():
    code = (
        "import sys; from detailflow_jax import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'numpy', 'absl', 'tensorflow'} & set(sys.modules)"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - start < 5  # 0.2 s on an idle machine


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("", 2, ["usage: detailflow COMMAND"]),
        ("trian --config x", 2, ["unknown command 'trian'", "closest names: train"]),
        ("qqqq", 2, ["unknown command 'qqqq'", "expected one of train, extract,"]),
        ("demo-flowar", 2, ["unknown command"]),
        ("extract --source digits", 2, ["expected one of --tokenizer, --vae", "extract-codes"]),
        ("extract --help", 0, ["extract-codes", "extract-latents"]),
        ("demo flowr", 2, ["unrecognized arguments: flowr"]),
        ("train --config nothing.py --workdir x", 2, ["there is no config file 'nothing.py'"]),
        ("weights nothing", 2, ["unknown recipe 'nothing'"]),
    ],
)
def test_unusable_command_lines(capsys, line, code, words):
    found, out, err = run(capsys, line)
    assert found == code
    assert all(word in out + err for word in words)


def test_exit_code_is_that_of_the_command(monkeypatch, capsys):
    from detailflow_jax.runtime import distributed, weights

    monkeypatch.setattr(weights, "main", lambda argv: len(argv))
    assert run(capsys, "weights a b c")[0] == 3
    # Where others may wait for this process, it leaves as `distributed.leave` does.
    from detailflow_jax.inference import generate

    left = []
    monkeypatch.setattr(distributed, "leave", left.append)
    monkeypatch.setattr(generate, "main", lambda argv: 7)
    run(capsys, "generate")
    assert left == [7]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("detailflow_jax", "usage: detailflow COMMAND"),
        ("detailflow_jax.weights", "usage: python -m detailflow_jax.weights ["),
        ("detailflow_jax.extract_codes", "usage: python -m detailflow_jax.extract_codes ["),
    ],
)
def test_modules_are_commands_too(module, name):
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(name)
