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
# # Encode and decode by token count
#
# A DetailFlow tokenizer turns an image into a short sequence of codes, ordered from global
# structure to fine detail. This notebook encodes handwritten digits and decodes them from ever
# more codes.
#
# It reads the tokenizer that `make demo` trains. Set `DEMO` to read another folder.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

import detailflow_jax as df
from detailflow_jax.evaluate import digits
from detailflow_jax.ops import images as pixels

demo = os.environ.get("DEMO", "../runs/demo")
tokenizer = df.load_tokenizer(f"{demo}/tokenizer")
print(tokenizer)

# %% [markdown]
# ## Codes
#
# `encode` takes uint8 images, or floats in [-1, 1], and gives one row of codes per image.

# %%
images, labels = digits.load("mnist:test", tokenizer.config.image_size)  # of MNIST, held out
images = images[:8]
codes = tokenizer.encode(images)
print(images.shape, images.dtype, "->", codes.shape, codes.dtype)
print(codes[0])

# %% [markdown]
# ## How many pixels n codes are worth
#
# The resolution map says which counts are valid, the resolution R(n) of the training target, and
# the size of the decoded image: R(n) rounded up to whole patches.

# %%
resolutions = tokenizer.config.resolutions
for count in resolutions.token_counts:
    print(
        f"{count:3d} codes: R(n) = {resolutions.resolution(count):2d} px, "
        f"decoded to {resolutions.decoded_size(count)} px"
    )

# %% [markdown]
# ## Decode from more and more codes
#
# `decode` takes the first n codes. Each row below has more of them; the last row shows the
# originals.

# %%
counts = resolutions.token_counts[:: max(1, len(resolutions.token_counts) // 5)]
counts = sorted({*counts, tokenizer.config.num_tokens})
rows = {f"{count}": df.to_uint8(tokenizer.decode(codes[:, :count])) for count in counts}
rows["original"] = images

figure, axes = plt.subplots(len(rows), len(images), figsize=(len(images), len(rows)))
for line, (name, row) in zip(axes, rows.items(), strict=True):
    for axis, image in zip(line, np.asarray(row), strict=True):
        axis.imshow(image)
        axis.set(xticks=[], yticks=[])
    line[0].set_ylabel(name)
plt.show()

# %% [markdown]
# ## Quality by count
#
# Images of fewer codes are smaller, so they are decoded at full size here before they are compared.

# %%
full = tokenizer.config.image_size
reference = pixels.to_float(images)
quality = [
    float(np.mean(pixels.psnr(tokenizer.decode(codes[:, :count], size=full), reference)))
    for count in counts
]
plt.figure(figsize=(5, 3))
plt.plot(counts, quality, "o-")
plt.xlabel("codes")
plt.ylabel("PSNR, dB")
plt.show()
