"""Ring attention: keys and values go round by hand, and all else is partitioned by annotations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import gspmd
from gspmd import P


def scores(q, k, s, t, length, causal):
    """The scores of queries at `s` and keys at `t`, of which each row has `length`."""
    visible = (t < length[:, None, None, None]) & ((t <= s[:, None]) | (not causal))
    q, least = q / q.shape[-1] ** 0.5, jnp.finfo(q.dtype).min
    return jnp.where(visible, jnp.einsum("bsnd,btnd->bnst", q, k), least)


def attention(q, k, v, length, causal=True):
    weight = jax.nn.softmax(scores(q, k, *[jnp.arange(q.shape[1])] * 2, length, causal))
    return jnp.einsum("bnst,btnd->bsnd", weight, v)


def ring_attention(q, k, v, length, causal=True):
    """The same. The tokens need not come out even: what pads them has no weight."""
    tokens, n = q.shape[1], jax.sharding.get_abstract_mesh().shape.get("seq", 1)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -tokens % n), (0, 0), (0, 0))) for x in (q, k, v))
    spec, fn = P(None, "seq"), functools.partial(one_device, causal, tokens)
    by_hand = jax.shard_map(fn, in_specs=(*[spec] * 3, P()), out_specs=spec, axis_names={"seq"})
    return by_hand(q, k, v, length)[:, :tokens] if n > 1 else attention(q, k, v, length, causal)


def one_device(causal, tokens, q, k, v, length):
    n, me, block = lax.axis_size("seq"), lax.axis_index("seq"), jnp.arange(q.shape[1])
    q = gspmd.annotate(q, P(None, None, "heads", None))

    @jax.checkpoint  # scores are computed again for the gradient
    def look(k, v, i):
        """The largest score, and the sums of weights and values, of the block from `i` back."""
        s, t = (at * len(block) + block for at in (me, (me - i) % n))
        score = scores(q, k, s, t, length, causal)
        weight = jnp.exp(score - jnp.max(score, axis=-1, keepdims=True)) * (t < tokens)
        return jnp.max(score, axis=-1), weight.sum(-1), jnp.einsum("bnst,btnd->bnsd", weight, v)

    def turn(carry, i):
        seen, kv = carry
        kv = lax.ppermute(kv, "seq", [(j, (j + 1) % n) for j in range(n)])
        top_2, *sums_2 = map(jnp.stack, zip(seen, look(*kv, i), strict=True))
        share_2 = jnp.exp(top_2 - top_2.max(0))
        sums = (jnp.einsum("2bns,2bns...->bns...", share_2, x) for x in sums_2)
        return ((top_2.max(0), *sums), kv), None

    (_, total, y), _ = lax.scan(turn, (look(k, v, 0), (k, v)), jnp.arange(1, n))[0]
    return jnp.einsum("bnsd,bns->bsnd", y, 1 / total)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    qkv = np.random.default_rng(0).normal(size=(3, 4, 1001, 8, 16)).astype(np.float32)
    loss = lambda fn, *qkv: jnp.sum(jnp.sin(fn(*qkv, np.array([1001, 3, 640, 998]))))  # noqa: E731
    grads = [jax.grad(functools.partial(loss, fn), (0, 1, 2)) for fn in (ring_attention, attention)]
    step = gspmd.partition(grads[0], "seq=4,model=2", rules={"heads": "model"})
    print(*step.plan(*qkv).collectives, sep="\n")
    for name, ours, plain in zip("qkv", step(*qkv), jax.jit(grads[1])(*qkv), strict=True):
        off = np.abs(ours - plain).max() / np.abs(plain).max()
        print(f"gradient of {name}: off by {off:.0e} of the largest entry")
