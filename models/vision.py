"""What the image models are built of: dense layers, convolution, norm, attention, MLP, losses.

All have biases, as in ViT. A name's suffix spells its dims:

    B batch    S sequence (T where it is attended to)    M model dim    H hidden dim of the MLP
    N heads    D head dim    Y X rows and columns of an image, or of its plane of patches
    C classes, or channels of an image
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.sharding import PartitionSpec as P

from gspmd.annotate import annotate
from gspmd.errors import GspmdError


class ImageError(GspmdError, ValueError):
    """Images or the sizes of an image model do not fit together."""


class Dense(nnx.Module):
    """x @ kernel + bias, in the dtype of `x`; the kernel's dims are annotated with `names`.

    The last `contract` dims of `x` are those that the kernel begins with.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: Sequence[int],
        names: Sequence[str | None],
        init: Initializer,
        contract: int = 1,
        bias: float = 0.0,
    ):
        ins, outs = math.prod(shape[:contract]), math.prod(shape[contract:])
        self.kernel = nnx.Param(init(rngs.params(), (ins, outs), jnp.float32).reshape(shape))
        self.bias = nnx.Param(jnp.full(shape[contract:], bias))
        self.names, self.contract = tuple(names), contract

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = annotate(self.kernel[...], P(*self.names)).astype(x.dtype)
        return jnp.tensordot(x, kernel, self.contract) + self.bias[...].astype(x.dtype)


class Convolution(nnx.Module):
    """Each position as a linear function of itself and its eight neighbors, zeros beyond the edge.

    On a plane that is split by rows or columns, devices fetch those of their neighbors.
    """

    def __init__(self, rngs: nnx.Rngs, ins: int, outs: int, init: Initializer):
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, ins, outs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outs))

    def __call__(self, x_BYXM: jax.Array) -> jax.Array:
        kernel = annotate(self.kernel[...], P(None, None, "embed", None)).astype(x_BYXM.dtype)
        dims = ("NHWC", "HWIO", "NHWC")
        x_BYXM = jax.lax.conv_general_dilated(
            x_BYXM, kernel, (1, 1), "SAME", dimension_numbers=dims
        )
        return x_BYXM + self.bias[...].astype(x_BYXM.dtype)


class LayerNorm(nnx.Module):
    """Mean 0 and variance 1 over M, then a learned scale and bias per entry of M."""

    def __init__(self, model_dim: int):
        self.scale = nnx.Param(jnp.ones(model_dim))
        self.bias = nnx.Param(jnp.zeros(model_dim))

    def __call__(self, x_BSM: jax.Array) -> jax.Array:
        x32_BSM = x_BSM.astype(jnp.float32)
        centered_BSM = x32_BSM - jnp.mean(x32_BSM, axis=-1, keepdims=True)
        variance_BS1 = jnp.mean(jnp.square(centered_BSM), axis=-1, keepdims=True)
        normal_BSM = centered_BSM * jax.lax.rsqrt(variance_BS1 + 1e-6)
        return (normal_BSM * self.scale[...] + self.bias[...]).astype(x_BSM.dtype)


class Attention(nnx.Module):
    """Every position attends to all; with `multi_query`, all heads share keys and values."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        model_dim: int,
        heads: int,
        init: Initializer,
        multi_query: bool = False,
    ):
        M, N, D = model_dim, heads, model_dim // heads
        self.multi_query = multi_query
        self.q = Dense(rngs, (M, N, D), ("embed", "heads", None), init)
        shape, names = ((M, D), ("embed", None)) if multi_query else ((M, N, D), self.q.names)
        self.k, self.v = Dense(rngs, shape, names, init), Dense(rngs, shape, names, init)
        self.out = Dense(rngs, (N, D, M), ("heads", None, "embed"), init, contract=2)

    def __call__(self, x_BSM: jax.Array) -> jax.Array:
        BTND = "BTD" if self.multi_query else "BTND"
        q_BSND, k_BTND, v_BTND = self.q(x_BSM), self.k(x_BSM), self.v(x_BSM)
        score_BNST = jnp.einsum(f"BSND,{BTND}->BNST", q_BSND * q_BSND.shape[-1] ** -0.5, k_BTND)
        weight_BNST = jax.nn.softmax(score_BNST.astype(jnp.float32), axis=-1)
        y_BSND = jnp.einsum(f"BNST,{BTND}->BSND", weight_BNST.astype(x_BSM.dtype), v_BTND)
        return self.out(y_BSND)


class MLP(nnx.Module):
    """Two dense layers with a GELU between them; the roles of its dims begin with `prefix`."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        model_dim: int,
        hidden_dim: int,
        init: Initializer,
        prefix: str = "",
    ):
        M, H, embed, mlp = model_dim, hidden_dim, prefix + "embed", prefix + "mlp"
        self.wi = Dense(rngs, (M, H), (embed, mlp), init)
        self.wo = Dense(rngs, (H, M), (mlp, embed), init)

    def __call__(self, x_BSM: jax.Array) -> jax.Array:
        return self.wo(jax.nn.gelu(self.wi(x_BSM)))


class Patches(nnx.Module):
    """The plane of an image: each patch of `patch` x `patch` pixels becomes a vector of M."""

    def __init__(
        self, rngs: nnx.Rngs, patch: int, channels: int, model_dim: int, init: Initializer
    ):
        self.patch = patch
        self.dense = Dense(rngs, (patch * patch * channels, model_dim), (None, "embed"), init)

    def __call__(self, image_BYXC: jax.Array) -> jax.Array:
        # Patches do not overlap, so that their convolution is a matrix product.
        B, Y, X, C = image_BYXC.shape
        p = self.patch
        pixel_BYpXpC = image_BYXC.reshape(B, Y // p, p, X // p, p, C)
        pixel_BYXppC = jnp.swapaxes(pixel_BYpXpC, 2, 3)
        return self.dense(pixel_BYXppC.reshape(B, Y // p, X // p, p * p * C))


def image_batch(batch_size: int, shape: tuple[int, int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of images of `shape` and their labels, as shapes."""
    return {
        "inputs": jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32),
        "targets": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


def check_images(images_BYXC: jax.Array, shape: tuple[int, int, int]) -> None:
    """Raises ImageError unless these are images of `shape`: rows, columns, channels."""
    if images_BYXC.ndim != 4 or images_BYXC.shape[1:] != shape:
        rows, columns, channels = shape
        raise ImageError(
            f"images of shape {images_BYXC.shape}: this configuration reads [batch, {rows}, "
            f"{columns}, {channels}]; resize them, or replace `image` in the configuration."
        )


def cross_entropy(logits_BC: jax.Array, labels_B: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Mean over the batch of -log softmax at the label, in nats.

    With `smoothing`, that share of the target is spread over all classes.
    """
    C = logits_BC.shape[-1]
    # A product with a one-hot, not an index: it splits along C like any other sum.
    target_BC = jax.nn.one_hot(labels_B, C) * (1 - smoothing) + smoothing / C
    score_B = jnp.sum(logits_BC * target_BC, axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits_BC, axis=-1) - score_B)


def sigmoid_cross_entropy(logits_BC: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Mean over the batch of the sum over classes of each one's binary cross entropy, in nats."""
    target_BC = jax.nn.one_hot(labels_B, logits_BC.shape[-1])
    loss_BC = jax.nn.softplus(logits_BC) - logits_BC * target_BC
    return jnp.mean(jnp.sum(loss_BC, axis=-1))
