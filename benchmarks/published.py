"""Published training runs, to hold predictions against: what ran where, and how fast.

Each run stands beside its source. `counts` says what the published utilization divides by the peak:
"model" FLOPs, all that is executed ("hardware"), or all but what is rematerialized ("counted").
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from gspmd.models import glam, nest, transformer, vmoe

Counts = Literal["model", "hardware", "counted"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: `model` and `config` as `gspmd.models.catalog.step` takes them.

    `utilization` is a share of the peak, `seconds` those of a step; nan where not published.
    `chosen` says what of the run is our choice, for want of a published one.
    `group` names the runs whose parallel layouts are compared with one another.
    """

    name: str
    source: str
    topology: str
    model: str
    config: Any
    mesh: Mapping[str, int]
    batch: int
    strategy: str
    utilization: float = float("nan")
    counts: Counts = "model"
    seconds: float = float("nan")
    group: str = ""
    optimizer: str = "adafactor"
    chosen: str = ""


def runs() -> Iterator[Run]:
    """Every run whose configuration is published in full, and the four of the announcement."""
    yield from headline()
    yield from gspmd_dense()
    yield palm()
    yield from maxtext()


_BLOG = "Google AI blog on GSPMD, 8 December 2021"


def headline() -> Iterator[Run]:
    """The four models of GSPMD's announcement."""
    two = {"data": 32, "model": 64}
    yield Run(
        "LaMDA 137B", f"{_BLOG}; arXiv 2201.08239: 256K tokens a batch", "tpu-v3:32x32",
        "transformer", transformer.CONFIGS["137b"], two, 256, "2d", 0.565, "counted",
    )  # fmt: skip
    # Sequences of 512, batch and mesh of the MLPerf v1.1 submission; its 63 % counts what is
    # computed again.
    yield Run(
        "BERT 480B", f"{_BLOG}; MLPerf v1.1, bert-cloud-TF-tpu-v4-4096", "tpu-v4:8x16x16",
        "transformer", transformer.CONFIGS["bert_480b"], {"data": 256, "model": 8}, 4096, "2d",
        0.63, "hardware", 21.58,
    )  # fmt: skip
    # What is published of it is its size, 2048 experts on as many cores, and a batch of 8192; the
    # shape is that of GShard's MoE(2048E, 36L).
    yield Run(
        "GShard-M4 577B", f"{_BLOG}; arXiv 2006.16668", "tpu-v3:32x32", "transformer",
        dataclasses.replace(transformer.CONFIGS["gshard_600b"], dtype=jnp.bfloat16),
        {"data": 2048}, 8192, "expert", 0.468, "counted",
    )  # fmt: skip
    # The announcement has it on TPU v3, the paper of GLaM on v4. An expert for each row of X.
    yield Run(
        "GLaM 1.2T", f"{_BLOG}; arXiv 2112.06905: 1M tokens a batch", "tpu-v3:32x32", "glam",
        glam.CONFIGS["64B_64E"], {"data": 64, "model": 32}, 1024, "expert_2d", 0.538, "counted",
    )  # fmt: skip


def palm() -> Run:
    """PaLM on two pods; its attention and feed-forward layers are parallel, here they are not."""
    config = dataclasses.replace(
        transformer.CONFIGS["64b"],
        layers=118, model_dim=18_432, heads=48, head_dim=256, multi_query=True, hidden_dim=73_728,
        vocab=256_000, seq=2048, activation="silu",
    )  # fmt: skip
    mesh = {"data": 2, "fsdp": 256, "model": 12}
    return Run(
        "PaLM 540B", "arXiv 2204.02311, section 4", "tpu-v4:12x16x16 x2 slices", "transformer",
        config, mesh, 2048, "2d", 0.462, "model", 17.6,
    )  # fmt: skip


_GSPMD = "arXiv 2105.04663, wide dense Transformers with 2D sharding"
_DENSE = (
    # size, topology, mesh, batch of 1024 tokens, seconds a step, utilization
    ("64b", "tpu-v3:8x8", (8, 16), 64, 5.74, 0.627),
    ("64b", "tpu-v3:16x16", (16, 32), 256, 6.25, 0.571),
    ("64b", "tpu-v3:32x32", (32, 64), 1024, 6.30, 0.569),
    ("128b", "tpu-v3:32x32", (32, 64), 512, 6.31, 0.565),
    ("256b", "tpu-v3:32x32", (32, 64), 256, 6.71, 0.541),
    ("512b", "tpu-v3:32x32", (32, 64), 128, 7.64, 0.475),
    ("1t", "tpu-v3:32x32", (32, 64), 128, 12.66, 0.556),
)


def gspmd_dense() -> Iterator[Run]:
    """The GSPMD paper's table: gated decoders on 128 to 2048 TPU v3 cores."""
    for size, topology, (x, y), batch, seconds, share in _DENSE:
        yield Run(
            f"GSPMD {size} on {x * y}", _GSPMD, topology, "transformer",
            transformer.CONFIGS[size], {"data": x, "model": y}, batch, "2d", share, "counted",
            seconds, group="GSPMD 64b" if size == "64b" else "GSPMD 2048",
        )  # fmt: skip


_MAXTEXT = "AI-Hypercomputer/maxtext, configs/tpu/v5e/README.md"
_SLICES = (1, 2, 4, 8, 16, 32)
_MAXTEXT_ROWS = (
    # name, layers, M, heads, H, sequences a chip, MFU % on 1, 2, 4, 8, 16, 32 slices of 256 chips
    ("16B", 32, 5120, 32, 32_768, 6, (61.1, 59.37, 59.14, 58.27, 56.56, 54.65)),
    ("32B", 32, 10_240, 32, 32_768, 4, (66.86, 64.81, 64.1, 63.67, 62.26, 60.4)),
    ("64B", 64, 10_240, 32, 32_768, 2, (59.9, 56.66, 55.85, 54.96, 53.29, 50.18)),
    ("128B", 64, 10_240, 64, 65_536, 1, (56.06, 55.82, 54.93, 52.93, 50.86, 46.25)),
)


def maxtext() -> Iterator[Run]:
    """MaxText on TPU v5e: weights split over a slice, copies of them on several slices.

    The largest splits its weights two ways; what it keeps for the backward pass is on the host,
    here it is computed again.
    """
    for name, layers, width, heads, hidden, each, shares in _MAXTEXT_ROWS:
        config = dataclasses.replace(
            transformer.CONFIGS["64b"],
            layers=layers, model_dim=width, heads=heads, head_dim=256, hidden_dim=hidden,
            vocab=32_768, seq=2048, gated=False, dtype=jnp.bfloat16,
        )  # fmt: skip
        for slices, share in zip(_SLICES, shares, strict=True):
            topology = "tpu-v5e:16x16" + (f" x{slices} slices" if slices > 1 else "")
            inner = {"fsdp": 16, "model": 16} if name == "128B" else {"fsdp": 256}
            mesh = {"data": slices, **inner} if slices > 1 else inner
            yield Run(
                f"MaxText {name} on {slices} x 256", _MAXTEXT, topology, "transformer", config,
                mesh, 256 * each * slices, "2d" if name == "128B" else "fsdp", share / 100,
                "model", group=f"MaxText {name}", optimizer="adamw",
            )  # fmt: skip


# ------------------------------------------------------------------ sizes without a published speed


def sizes() -> Iterator[Run]:
    """Every other published configuration: on its published devices, or on some that it fits."""
    yield from lingvo()
    yield from glam_sizes()
    yield from vmoe_sizes()
    yield from nest_sizes()


_LINGVO = "tensorflow/lingvo, tasks/lm/params/synthetic_packed_input.py"


def lingvo() -> Iterator[Run]:
    """Lingvo's dense language models; their meshes are published, their batches are not."""
    for name, size, topology, (x, y), batch in (
        ("DenseLm128B8x8", "137b", "tpu-v3:8x8", (8, 16), 32),
        ("DenseLm1T16x16", "1t", "tpu-v3:16x16", (16, 32), 32),
        ("DenseLm175B32x32", "175b", "tpu-v3:32x32", (64, 32), 512),
    ):
        yield Run(
            name, _LINGVO, topology, "transformer", transformer.CONFIGS[size],
            {"data": x, "model": y}, batch, "2d", chosen="batch",
        )  # fmt: skip


_GLAM = "arXiv 2112.06905, Table 4; 1M tokens a batch"


def glam_sizes() -> Iterator[Run]:
    """The table of the paper; only the largest model's devices are published, 1024 TPU v4."""
    for size, topology, (x, y) in (
        ("0.1B", "tpu-v4:4x4x4", (64, 1)),
        ("0.1B_64E", "tpu-v4:4x4x4", (64, 1)),
        ("1.7B", "tpu-v4:4x4x8", (64, 2)),
        ("1.7B_32E", "tpu-v4:4x4x8", (32, 4)),
        ("1.7B_64E", "tpu-v4:4x4x8", (64, 2)),
        ("1.7B_128E", "tpu-v4:4x4x8", (128, 1)),
        ("1.7B_256E", "tpu-v4:4x8x8", (256, 1)),
        ("8B", "tpu-v4:4x8x8", (64, 4)),
        ("8B_64E", "tpu-v4:4x8x8", (64, 4)),
        ("137B", "tpu-v4:8x8x16", (64, 16)),
        ("64B_64E", "tpu-v4:8x8x16", (64, 16)),
    ):
        experts = glam.CONFIGS[size].experts > 0
        yield Run(
            f"GLaM {size}", _GLAM, topology, "glam", glam.CONFIGS[size], {"data": x, "model": y},
            1024, "expert_2d" if experts else "2d",
            chosen="mesh" if size == "64B_64E" else "devices, mesh",
        )  # fmt: skip


_VMOE = "arXiv 2106.05974; google-research/vmoe: at most an expert a core"


def vmoe_sizes() -> Iterator[Run]:
    """The V-MoEs of the paper, on cores of TPU v3, an expert on each of 32."""
    for size, config in vmoe.CONFIGS.items():
        if size == "digits":
            continue
        large = size.startswith(("h14", "15b"))
        sparse = config.sparse > 0
        few = {"data": 128 // config.experts, "expert": config.experts}
        many = {"data": 512 // config.experts, "expert": config.experts}
        yield Run(
            f"V-MoE {size}", _VMOE, "tpu-v3:16x16" if large else "tpu-v3:8x8", "vmoe",
            dataclasses.replace(config, remat=True), many if large else few, 4096,
            "expert_fsdp" if sparse and large else "expert" if sparse else "data",
            chosen="devices, batch",
        )  # fmt: skip


_NEST = "arXiv 2105.12723; google-research/nested-transformer: batches of 1024, data parallel"


def nest_sizes() -> Iterator[Run]:
    """The NesTs of the paper, on cores of TPU v3."""
    for size, config in nest.CONFIGS.items():
        if size != "digits":
            yield Run(
                f"NesT {size}", _NEST, "tpu-v3:4x4", "nest", config, {"data": 32}, 1024, "data",
                optimizer="adamw", chosen="devices, batch" if "cifar" in size else "devices",
            )  # fmt: skip
