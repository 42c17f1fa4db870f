"""Draws the figures of docs/how_it_works.md from the package's own functions.

    python docs/figures/make.py [FOLDER]

Nothing here repeats a formula: layouts and masks are read out of the networks while they run.
The photograph is scikit-learn's sample image `china.jpg`.
"""

import argparse
import contextlib
import pathlib
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import detailflow_jax as df
from detailflow_jax.models.flow_head import FlowHead, FlowHeadConfig
from detailflow_jax.models.generator import Generator, GeneratorConfig
from detailflow_jax.models.siglip import VisionTransformer, ViTConfig
from detailflow_jax.models.tokenizer import Tokenizer, TokenizerConfig
from detailflow_jax.ops import correction, interpolation, masks, resolution, scales

WIDTH = 4.4  # inches: text of 8 points stays legible on a phone
INK, PAPER, EMPTY = "#26303b", "#fcfcfa", "#eceef0"
GREY, BLUE, ORANGE, RED, GREEN = "#8b96a3", "#3b6fb6", "#d9822b", "#c2453c", "#3f8f5b"
# Three groups of four: as small as a sequence can be that still shows every case.
TOKENS, GROUP = 12, 4
STYLE = {
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.hashsalt": "detailflow_jax",
    "axes.titlesize": 8.5,
}


# ---------------------------------------------------------------- read out of the networks


@contextlib.contextmanager
def listening(module: type[nn.Module], method: str, name: str | None = None) -> Iterator[list]:
    """Collects (args, kwargs) of every call of a method of a module, whatever runs within."""
    calls = []

    def intercept(call, args, kwargs, context):
        is_wanted = isinstance(context.module, module) and context.method_name == method
        if is_wanted and name in (None, context.module.name):
            calls.append((args, kwargs))
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield calls


def tagged_generator() -> tuple[GeneratorConfig, dict]:
    """A tiny generator whose embeddings say what they stand for: class 0, z_i i, s_j -j."""
    config = GeneratorConfig(
        width=8,
        depth=1,
        num_heads=1,
        num_tokens=TOKENS,
        group_size=GROUP,
        codebook_size=TOKENS,
        num_classes=1,
        scan=False,
    )
    model = Generator(config)
    codes = jnp.zeros((1, TOKENS), jnp.int32)
    init = jax.jit(model.init)
    params = nn.unbox(init(jax.random.key(0), codes, jnp.zeros(1, jnp.int32))["params"])

    def table(values):
        return {"embedding": jnp.repeat(jnp.asarray(values, jnp.float32)[:, None], 8, axis=1)}

    params["class_embedding"] = table([0, 0])
    params["token_embedding"] = table(np.arange(TOKENS) + 1)
    params["special_embedding"] = table(-np.arange(1, GROUP))
    return config, params


def sequence() -> list[str]:
    """What the generator reads at each position in training: names of embeddings."""
    config, params = tagged_generator()
    codes, labels = jnp.arange(TOKENS)[None], jnp.zeros(1, jnp.int32)
    with listening(nn.Dropout, "__call__", "dropout") as calls:
        Generator(config).apply({"params": params}, codes, labels)
    return [_name(tag) for tag in np.asarray(calls[0][0][0])[0, :, 0]]


def _name(tag: float) -> str:
    tag = round(float(tag))
    return "class" if tag == 0 else f"$z_{{{tag}}}$" if tag > 0 else f"$s_{{{-tag}}}$"


def sampling_steps() -> list[tuple[int, int]]:
    """(first position, positions) of every step of the cached sampler."""
    config, params = tagged_generator()
    with jax.disable_jit(), listening(Generator, "step") as calls:
        df.Generator(config, params).sample([0], cfg_scale=1.0)
    return [(int(start), x.shape[1]) for (x, _, start), _ in calls]


def encoder_mask(num_patches: int) -> np.ndarray:
    """Who sees whom in the encoder, bool [patches + queries, patches + queries]."""
    vit = ViTConfig(width=8, depth=1, num_heads=1, mlp_dim=8, patch_size=4, table_side=2)
    side = 4 * round(num_patches**0.5)
    config = TokenizerConfig(
        image_size=side,
        num_tokens=TOKENS,
        group_size=GROUP,
        codebook_size=8,
        encoder=vit,
        decoder=vit,
        scan=False,
    )
    with listening(VisionTransformer, "run", "trunk") as calls:
        jax.eval_shape(Tokenizer(config).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    queries = next(k["mask"] for _, k in calls if k.get("mask") is not None)[0, 0]
    among_patches = np.arange(num_patches + TOKENS) < num_patches
    return np.concatenate([np.tile(among_patches, (num_patches, 1)), queries])


def photograph(size: int) -> np.ndarray:
    """A square photograph in [0, 1], float32 [size, size, 3]."""
    from sklearn.datasets import load_sample_image

    image = load_sample_image("china.jpg")[20:404, 60:444] / np.float32(255)
    matrix = interpolation.area_matrix(len(image), size)
    return np.asarray(interpolation.apply_matrices(image, matrix, matrix))


# ------------------------------------------------------------------------------------------ drawing


def cells(ax, names, colours, row: float, *, first: int = 0, height: float = 0.8) -> None:
    """A row of boxes with text, one unit wide each."""
    for i, (name, colour) in enumerate(zip(names, colours, strict=True), start=first):
        ax.add_patch(plt.Rectangle((i + 0.04, row), 0.92, height, color=colour, lw=0))
        dark = colour != EMPTY
        ax.text(
            i + 0.5,
            row + height / 2 - 0.02,
            name,
            ha="center",
            va="center",
            color="white" if dark else GREY,
            fontsize=6.4 if name == "class" else 8,
        )


def colour_of(name: str) -> str:
    """The colour of an embedding of the generator's sequence."""
    return GREY if name == "class" else ORANGE if "s" in name else BLUE


def legend(ax, entries: dict[str, str], **place) -> None:
    """A row of coloured squares with names."""
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, lw=0) for colour in entries.values()]
    ax.legend(
        handles,
        entries,
        ncols=len(entries),
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
        **place,
    )


def draw_sequence():
    """The generator's sequence, and how sampling walks over it."""
    read, steps = sequence(), sampling_steps()
    fig, (top, ax) = plt.subplots(
        2, 1, figsize=(WIDTH, 3.3), height_ratios=[2.1, len(steps) + 0.6], layout="constrained"
    )
    cells(top, read, [colour_of(name) for name in read], 1.1)
    cells(top, [f"$z_{{{i + 1}}}$" for i in range(TOKENS)], [GREEN] * TOKENS, 0.0)
    top.set(
        xlim=(0, TOKENS), ylim=(-0.05, 2.0), yticks=[0.4, 1.5], yticklabels=["predicts", "reads"]
    )
    top.set_title("Training: one pass", loc="left")
    for i, (start, count) in enumerate(steps):
        row = len(steps) - 1 - i
        before = read[:start]
        cells(ax, [""] * len(before), [EMPTY] * len(before), row)
        cells(
            ax,
            read[start : start + count],
            map(colour_of, read[start : start + count]),
            row,
            first=start,
        )
        got = f"$z_{{{start + 1}}}$"
        got += f"…$z_{{{start + count}}}$" if count > 1 else ""
        ax.text(start + count + 0.15, row + 0.38, f"→ {got}", va="center", color=GREEN)
    ax.set(xlim=(0, TOKENS), ylim=(-0.1, len(steps)), yticks=np.arange(len(steps)) + 0.4)
    ax.set_yticklabels([f"step {len(steps) - i}" for i in range(len(steps))])
    ax.set_title("Sampling: pale positions are in the key/value cache", loc="left")
    for axis in (top, ax):
        axis.spines[:].set_visible(False)
        axis.set_xticks([])
        axis.tick_params(length=0)
    ax.set_xlim(0, TOKENS + 2.2)
    top.set_xlim(0, TOKENS + 2.2)
    return fig


def draw_mask(mask: np.ndarray, names: list[str], colours: list[str], title: str):
    """A mask, rows are queries and columns keys; the lines bound groups of equal colour."""
    size = len(mask)
    fig, ax = plt.subplots(figsize=(WIDTH, WIDTH * 0.92), layout="constrained")
    for i, j in np.ndindex(size, size):
        colour = colours[i] if mask[i, j] else EMPTY
        ax.add_patch(plt.Rectangle((j + 0.06, i + 0.06), 0.88, 0.88, color=colour, lw=0))
    ticks = np.arange(size) + 0.5
    ax.set(xlim=(0, size), ylim=(size, 0), xticks=ticks, yticks=ticks, aspect="equal")
    small = 8 if size < 18 else 6.5
    ax.set_xticklabels(names, fontsize=small)
    ax.set_yticklabels(names, fontsize=small)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, pad=2)
    ax.spines[:].set_visible(False)
    ax.set(xlabel=title, ylabel="row: who looks")
    return fig


def draw_generator_mask():
    """The mask over sequence positions."""
    read = ["c" if name == "class" else name for name in sequence()]
    mask = masks.group_mask(TOKENS, GROUP, GROUP)
    colours = [GREY if name == "c" else colour_of(name) for name in read]
    return draw_mask(mask, read, colours, "column: what may be seen (c: the class)")


def draw_encoder_mask():
    """The mask of the encoder."""
    names = [f"$p_{{{i + 1}}}$" for i in range(4)] + [f"$q_{{{i + 1}}}$" for i in range(TOKENS)]
    colours = [GREEN] * 4 + [BLUE] * TOKENS
    return draw_mask(encoder_mask(4), names, colours, "column: what may be seen")


def published_map(num_tokens: int) -> resolution.ResolutionMap:
    """The resolution map of a published tokenizer."""
    return resolution.ResolutionMap(256, num_tokens, 8, 8, 16)


def draw_resolution():
    """R(n) and the decoded size over the share of tokens."""
    fig, ax = plt.subplots(figsize=(WIDTH, 2.7), layout="constrained")
    table = published_map(128)
    counts = table.token_counts
    ax.step(
        counts,
        [table.decoded_size(n) for n in counts],
        where="mid",
        color=ORANGE,
        lw=1.2,
        label="decoded size, a multiple of 16 px",
    )
    ax.plot(
        counts, [table.resolution(n) for n in counts], "o-", color=BLUE, ms=3, lw=1, label="R(n)"
    )
    ax.set(xlabel="tokens n of N = 128", ylabel="pixels", xlim=(0, 130), ylim=(0, 268))
    ax.set_xticks([1, 8, *range(32, 129, 32)])
    ax.set_yticks(range(0, 257, 64))
    ax.grid(color=EMPTY)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    return fig


def draw_targets():
    """What is reconstructed from n tokens: the photograph, degraded to R(n)."""
    table, image = published_map(128), photograph(256)
    counts = (1, 8, 16, 32, 64, 128)
    fig, axes = plt.subplots(2, 3, figsize=(WIDTH, 3.25), layout="constrained")
    for ax, n in zip(axes.flat, counts, strict=True):
        low, decoded = table.resolution(n), table.decoded_size(n)
        matrix = interpolation.degradation_matrix(256, low, decoded)
        target = interpolation.apply_matrices(image, matrix, matrix)
        ax.imshow(np.clip(np.asarray(target), 0, 1), interpolation="nearest")
        ax.set_title(f"n = {n}: R = {low}, {decoded} px", fontsize=7.5)
        ax.set_axis_off()
    return fig


def draw_correction():
    """The index triplet of self-correction for noise in the causal part and in a later group."""
    fig, axes = plt.subplots(2, 1, figsize=(WIDTH, 2.75), layout="constrained")
    kinds = {"clean": BLUE, "noisy": RED, "corrected": GREEN}
    clean, noisy, corrected = (np.full((1, TOKENS), i) for i in range(3))
    titles = {
        2: "Noise in the causal group: one token",
        6: "Noise in a later group: the whole group",
    }
    for ax, (position, title) in zip(axes, titles.items(), strict=True):
        span = correction.span_of(jnp.array([position]), GROUP, GROUP)
        rows = {
            "clean": clean,
            "input": correction.splice(span, clean, noisy, corrected),
            "label": correction.splice(span, clean, clean, corrected),
        }
        for i, row in enumerate(rows.values()):
            signs = (r"$z_{%d}$", r"$\tilde{z}_{%d}$", r"$z'_{%d}$")
            names = [signs[kind] % (p + 1) for p, kind in enumerate(np.asarray(row)[0])]
            cells(ax, names, [list(kinds.values())[k] for k in np.asarray(row)[0]], 2 - i)
        ax.set(xlim=(0, TOKENS), ylim=(-0.1, 3), yticks=[2.4, 1.4, 0.4], yticklabels=list(rows))
        ax.set_title(title, loc="left")
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    legend(axes[1], kinds, loc="upper center", bbox_to_anchor=(0.5, 0.02))
    return fig


def draw_scales():
    """A latent at every scale, and what the transformer reads to predict each."""
    sides = (1, 2, 4, 8, 16)
    latent = photograph(16)[None]
    targets, inputs = scales.pyramid(jnp.asarray(latent), sides)
    edges = scales.offsets(sides)
    fig, axes = plt.subplots(2, len(sides), figsize=(WIDTH, 2.1), layout="constrained")
    for k, side in enumerate(sides):
        start, stop = edges[k : k + 2]
        target = np.asarray(targets[0, start:stop]).reshape(side, side, 3)
        axes[0, k].imshow(np.clip(target, 0, 1), interpolation="nearest")
        axes[0, k].set_title(f"{side} × {side}")
        if k:
            read = np.asarray(inputs[0, start - edges[1] : stop - edges[1]])
            axes[1, k].imshow(np.clip(read.reshape(side, side, 3), 0, 1), interpolation="nearest")
        else:
            axes[1, k].imshow(np.full((1, 1, 3), matplotlib.colors.to_rgb(EMPTY)))
            axes[1, k].text(0, 0, "class", ha="center", va="center")
    axes[0, 0].set_ylabel("target")
    axes[1, 0].set_ylabel("reads")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return fig


def draw_scale_mask():
    """FlowAR's mask for the first three scales."""
    sides = (1, 2, 4)
    names = [f"{side}" for side in sides for _ in range(side * side)]
    index = scales.scale_index(sides)
    return draw_mask(
        scales.scale_mask(sides),
        names,
        [(GREY, ORANGE, BLUE)[k] for k in index],
        "column: what may be seen (numbers: side of the scale)",
    )


def draw_adaln():
    """One channel of the scale vector that a block of the head uses, plain against spatial."""
    side = 16
    semantics = np.tile(photograph(side).mean(-1).reshape(1, side * side, 1), (1, 1, 8)) - 0.5
    panels, scales_by_name = {"the condition": semantics[0, :, 0]}, {}
    for injection, title in (
        ("adaln", "adaLN: 1 + scale"),
        ("spatial", "Spatial-adaLN: 1 + scale"),
    ):
        head = FlowHead(
            FlowHeadConfig(width=64, depth=1, channels=3, injection=injection, scan=False)
        )
        arguments = (jnp.zeros((1, side * side, 3)), jnp.ones(1), jnp.asarray(semantics))
        params = head.init(jax.random.key(0), *arguments)["params"]
        _, state = head.apply(
            {"params": params},
            *arguments,
            capture_intermediates=lambda module, _: module.name == "modulation",
        )
        _, _, scale, *_ = jax.tree.leaves(state["intermediates"])  # In the order of `Block`.
        scale = np.asarray(scale)[0]
        scales_by_name[title] = 1.0 + np.broadcast_to(scale, (side * side, scale.shape[-1]))
    # The channel that varies most over the grid.
    channel = scales_by_name[title].std(axis=0).argmax()
    panels |= {name: values[:, channel] for name, values in scales_by_name.items()}
    both = np.stack(list(panels.values())[1:])
    limits = both.min(), both.max()
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 1.75), layout="constrained")
    for i, (ax, (name, values)) in enumerate(zip(axes, panels.items(), strict=True)):
        low, high = limits if i else (values.min(), values.max())
        ax.imshow(values.reshape(side, side), cmap="cividis", vmin=low, vmax=high)
        ax.set_title(name, fontsize=7.5)
        ax.set_axis_off()
    return fig


FIGURES: dict[str, Callable] = {
    "sequence.svg": draw_sequence,
    "generator_mask.svg": draw_generator_mask,
    "encoder_mask.svg": draw_encoder_mask,
    "resolution.svg": draw_resolution,
    "targets.png": draw_targets,
    "correction.svg": draw_correction,
    "scales.svg": draw_scales,
    "scale_mask.svg": draw_scale_mask,
    "adaln.svg": draw_adaln,
}


def make(folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws every figure into a folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            path = folder / name
            figure = draw()
            # No date in the file, so that a second run makes the same bytes.
            plain = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(path, dpi=160, metadata=plain)
            plt.close(figure)
            paths.append(path)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=pathlib.Path, default=pathlib.Path(__file__).parent
    )
    for made in make(parser.parse_args().folder):
        print(made)
