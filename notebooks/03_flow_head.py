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
# # Fork the flow head
#
# FlowAR's flow head stands alone: it takes noisy data, a time and one condition per position, and
# gives a velocity. Here it learns a toy problem without the rest of FlowAR: the condition says
# where on a circle a point lies, and the flow has to bring noise there.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from detailflow_jax.models.flow_head import INJECTIONS, FlowHead, FlowHeadConfig
from detailflow_jax.ops import flow

for name, meaning in INJECTIONS.items():
    print(f"{name:14s} {meaning}")

# %% [markdown]
# ## The problem
#
# 16 positions, two channels. The condition of a position is the sine and cosine of its angle; its
# data is the point on the circle of radius 1, with a little noise.

# %%
POSITIONS = 16


def batch(key, size=32):
    """(data [B, T, 2], condition [B, T, 2])."""
    angle_key, noise_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, (size, POSITIONS, 1), maxval=2 * jnp.pi)
    condition = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return condition + 0.05 * jax.random.normal(noise_key, condition.shape), condition


config = FlowHeadConfig(width=64, depth=1, channels=2, head_dim=32, injection="spatial", scan=False)
head = FlowHead(config)
data, condition = batch(jax.random.key(0))
params = head.init(jax.random.key(1), data, jnp.ones(len(data)), condition)["params"]

# %% [markdown]
# ## The loss
#
# Flow matching: a point between data and noise, and the velocity between them as the target.

# %%
optimizer = optax.adam(3e-3)


def loss_fn(params, key):
    """Mean squared error of the velocity."""
    keys = jax.random.split(key, 3)
    data, condition = batch(keys[0])
    noise = jax.random.normal(keys[1], data.shape)
    time = jax.random.uniform(keys[2], data.shape[:1])
    x = flow.interpolate(data, noise, time[:, None, None])
    error = head.apply({"params": params}, x, time, condition) - flow.target_velocity(data, noise)
    return jnp.mean(error**2)


@jax.jit
def step(params, state, key):
    """One update."""
    loss, gradient = jax.value_and_grad(loss_fn)(params, key)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, loss


state, losses = optimizer.init(params), []
for key in jax.random.split(jax.random.key(2), 200):
    params, state, loss = step(params, state, key)
    losses.append(float(loss))
print(f"loss {losses[0]:.2f} -> {np.mean(losses[-20:]):.2f}")
assert np.mean(losses[-20:]) < losses[0]

# %% [markdown]
# ## Solve the flow
#
# Time runs from 1 (noise) to 0 (data). `flow.steps` turns a grid of times into steps to scan over.

# %%
_, condition = batch(jax.random.key(3), size=8)


def velocity(x, time):
    """The head at one time for all samples."""
    return head.apply({"params": params}, x, jnp.broadcast_to(time, len(x)), condition)


times = flow.uniform_times(20)
x = jax.random.normal(jax.random.key(4), condition.shape)
x, _ = jax.lax.scan(
    lambda x, step: (flow.euler_step(velocity, x, step), None), x, flow.steps(times, 0, 20)
)

plt.figure(figsize=(4, 4))
plt.scatter(*np.asarray(condition).reshape(-1, 2).T, s=30, facecolors="none", edgecolors="grey")
plt.scatter(*np.asarray(x).reshape(-1, 2).T, s=8)
plt.gca().set_aspect("equal")
plt.title("asked for (circles) and sampled (dots)")
plt.show()

# %% [markdown]
# ## Change it
#
# Another way for the condition to enter is another value of `injection`. Try `"adaln"`: it gives
# all positions one modulation, so it cannot place them. To write a new one, copy
# `detailflow_jax/models/flow_head.py` and change `_inject`.
