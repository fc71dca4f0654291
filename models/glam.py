"""GLaM: decoders whose every other layer is a mixture of experts (arXiv 2112.06905).

A GLaM is a Transformer of `models/transformer.py` that has experts: this file holds its sizes and
strategies, and hands on the functions. Architecture (the paper; Lingvo's and Praxis' code): pairs
of layers, [attention, mixture, attention, gated MLP]; a mixture sends each token to two experts by
GShard's gating (`routing.Top2`); an expert is an MLP of two matrices with a ReLU between. RMSNorm,
relative positions, tied softmax and z-loss are Lingvo's; the extra logit of 0 that its attention
has is left out.

Parameter counts: the paper's table fits experts of two matrices and gated MLPs of three. To the
digits it prints, total and active counts come out for 1.7B_64E, 1.7B_128E, 8B, 8B_64E and 137B,
with a vocabulary of 32,000, and for 64B_64E with the 256,000 that the paper names. For 1.7B_32E the
active count does; its total of 20B does not fit its row, 13.96B does. For 0.1B_64E the total does.
1.7B_256E is 0.1 % off, 1.7B has 1.676B, and 0.1B has 138M where the paper has 130M; neither these
nor the active count of 0.1B_64E (152M, not 145M) can be matched.

A batch whose tokens do not split into groups raises ModelError, a router without places
RoutingError. Experts that an axis does not divide are padded, and route as on one device.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax.numpy as jnp

from gspmd.models import strategies, transformer
from gspmd.models.blocks import ROLES
from gspmd.models.strategies import Axis, Rules, table
from gspmd.models.transformer import (
    active_count,
    apply,
    batch_shapes,
    decode,
    evaluate,
    generate,
    init,
    loss,
    parameter_count,
    prefill,
)

__all__ = [
    "CONFIGS",
    "RULES",
    "Config",
    "active_count",
    "apply",
    "batch_shapes",
    "decode",
    "evaluate",
    "generate",
    "init",
    "loss",
    "parameter_count",
    "prefill",
    "rules_for",
]


@dataclasses.dataclass(frozen=True)
class Config(transformer.Config):
    """Sizes of one GLaM; without experts, of the dense model that the paper compares it to."""

    experts: int = 64
    z_loss: float = 1e-4


_TINY = Config(
    vocab=256, layers=2, model_dim=32, hidden_dim=64, heads=4, head_dim=8, seq=64, experts=16,
    group_size=256, dtype=jnp.float32, remat=False,
)  # fmt: skip
_01B = Config(layers=12, model_dim=768, hidden_dim=3072, heads=12, head_dim=64)
_1_7B = Config(layers=24, model_dim=2048, hidden_dim=8192, heads=16)
_8B = Config(layers=32, model_dim=4096, hidden_dim=16_384, heads=32)


def _experts(config: Config, experts: int) -> Config:
    return dataclasses.replace(config, experts=experts)


CONFIGS: Mapping[str, Config] = MappingProxyType(
    {
        # bytes as tokens; trained on a CPU in minutes, and so narrow that it soon lacks room for
        # what there is to learn, which is what experts have
        "tiny": _TINY,
        # without experts, and as much work for each token: 3 M H' twice, for 4 M H and 3 M H
        "tiny_dense": dataclasses.replace(_experts(_TINY, 0), hidden_dim=64 * 7 // 6),
        "small": dataclasses.replace(
            _TINY, layers=4, model_dim=128, hidden_dim=256, heads=8, head_dim=16, seq=128
        ),
        # the paper's Table 4, with the dense model of each size
        "0.1B": _experts(_01B, 0),
        "0.1B_64E": _01B,
        "1.7B": _experts(_1_7B, 0),
        "1.7B_32E": _experts(_1_7B, 32),
        "1.7B_64E": _1_7B,
        "1.7B_128E": _experts(_1_7B, 128),
        "1.7B_256E": _experts(_1_7B, 256),
        "8B": _experts(_8B, 0),
        "8B_64E": _8B,
        "137B": Config(experts=0),
        "64B_64E": Config(hidden_dim=32_768, vocab=256_000),
    }
)  # fmt: skip


# --------------------------------------------------------------------------------- sharding tables

RULES: Mapping[str, Rules] = MappingProxyType(
    {
        **{name: transformer.RULES[name] for name in ("data", "fsdp", "tensor", "2d", "expert")},
        # Experts split over the batch's axis; the other weights are split over it where they rest.
        "expert_fsdp": table(
            ROLES, batch="data", embed="data", embed_table="data", expert="expert"
        ),
        # Experts over the batch's axis, and each of them, as all else, over model: Megatron.
        "expert_tensor": table(
            ROLES, batch="data", heads="model", mlp="model", vocab="model", vocab_table="model",
            expert="expert",
        ),
        # The paper's: experts by E and H, the rest of the weights and the activations by both axes
        # (GSPMD's finalized 2D; Praxis' set_sharding_params_v1).
        "expert_2d": table(
            ROLES, batch="data", act_model="model", embed="data", heads="model", mlp="model",
            vocab="model", embed_table="model", expert="expert",
        ),
    }
)  # fmt: skip


def rules_for(strategy: str, mesh_axes: Sequence[str]) -> dict[str, Axis]:
    """The table `RULES[strategy]` for a mesh with these axes: see `strategies.rules_for`.

    An axis "expert" of the mesh splits the experts, and with all other axes but "model" the batch;
    without one "data" does both.
    """
    return strategies.rules_for(RULES, strategy, mesh_axes)
