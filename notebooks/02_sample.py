# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sample with both systems
#
# DetailFlow samples codes and decodes them with its tokenizer. FlowAR samples latents and decodes
# them with its autoencoder. Both draw sample i from the seed and i alone, so a set can be made in
# parts.
#
# The models come from `make demo` and `make demo-flowar`. Set `DEMO` and `DEMO_FLOWAR` to read
# other folders.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

import detailflow_jax as df

demo = os.environ.get("DEMO", "../runs/demo")
demo_flowar = os.environ.get("DEMO_FLOWAR", "../runs/demo-flowar")


def show(images, title):
    """A row of images in [-1, 1]."""
    figure, axes = plt.subplots(1, len(images), figsize=(len(images), 1.4))
    for axis, image in zip(axes, np.asarray(df.to_uint8(images)), strict=True):
        axis.imshow(image)
        axis.set_axis_off()
    figure.suptitle(title)
    plt.show()


# %% [markdown]
# ## DetailFlow

# %%
tokenizer = df.load_tokenizer(f"{demo}/tokenizer")
generator = df.load_generator(f"{demo}/generator")
df.check_pair(tokenizer, generator)  # raises an error if they do not fit together

labels = list(range(8))
codes = generator.sample(labels, seed=0, cfg_scale=1.5)
show(tokenizer.decode(codes), "guidance 1.5")

# %% [markdown]
# Guidance 1 uses the conditional logits alone. Top-k keeps the k most likely codes.

# %%
show(tokenizer.decode(generator.sample(labels, seed=0, cfg_scale=1.0)), "guidance 1")
show(tokenizer.decode(generator.sample(labels, seed=0, cfg_scale=1.5, top_k=16)), "top-k 16")

# %% [markdown]
# A sample can stop early. Fewer codes take fewer steps and decode to a smaller image.

# %%
group = tokenizer.config.group_size
coarse = generator.sample(labels, seed=0, cfg_scale=1.5, num_tokens=group)
assert np.array_equal(coarse, codes[:, :group])
show(tokenizer.decode(coarse), f"the first {group} codes")

# %% [markdown]
# ## FlowAR
#
# `num_steps` counts the flow steps per scale. One number per scale spends fewer steps on the later
# scales, which need fewer.

# %%
vae = df.load_vae(f"{demo_flowar}/vae")
flowar = df.load_flowar(f"{demo_flowar}/flowar")
df.check_pair(vae, flowar)

steps = np.linspace(8, 4, len(flowar.config.scales)).round().astype(int).tolist()
latents = flowar.sample(labels, seed=0, cfg_scale=2.4, num_steps=steps)
print("scales", flowar.config.scales, "latents", latents.shape)
show(vae.decode(latents), f"flow steps {steps}")
