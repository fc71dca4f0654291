"""What users write about shardings is read as meant, or refused in one clear sentence."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gspmd.errors import MeshError, SpecError
from gspmd.sharding import Mesh
from gspmd.specs import check_rules, read_mesh, resolve, spec_tree, to_spec

MESH = Mesh((("data", 4), ("model", 2)))
RULES = {"batch": "data", "mlp": ("model",), "embed": None, "all": ("data", "model")}


@pytest.mark.parametrize(
    "given",
    [
        "data=4,model=2",
        " data = 4 , model=2 ",
        {"data": 4, "model": np.int64(2)},
        AbstractMesh((4, 2), ("data", "model")),
    ],
)
def test_a_mesh_without_devices(given: object) -> None:
    assert read_mesh(given) == (MESH, None)


def test_a_mesh_with_devices() -> None:
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "model"))
    assert read_mesh(mesh) == (Mesh((("data", 1), ("model", 1))), mesh)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data", "mesh 'data': 'data' is not NAME=SIZE; write \"data=256,model=8\"."),
        (
            "data=4 model=2",
            "mesh 'data=4 model=2': 'data=4 model=2' is not NAME=SIZE; write \"data=256,model=8\".",
        ),
        ("", "mesh '': '' is not NAME=SIZE; write \"data=256,model=8\"."),
        ("x=0", "mesh axis 'x' has size 0; a size is an int of at least 1."),
        ("x=-2", "mesh axis 'x' has size -2; a size is an int of at least 1."),
        ({"x": 2.0}, "mesh axis 'x' has size 2.0; a size is an int of at least 1."),
        ("x=2,x=2", "mesh axes must have distinct names, got ['x', 'x']."),
        (
            "a:b=2",
            "mesh axis 'a:b' is not a name: it must be a string without ':', which gspmd keeps "
            "for parts of an axis.",
        ),
        ({}, 'the mesh has no axes; write "data=256,model=8".'),
        (
            3,
            "mesh must be a jax.sharding.Mesh, an AbstractMesh, a dict or a string, got 3 of type "
            'int; write "data=256,model=8" or {"data": 256}.',
        ),
    ],
)
def test_a_bad_mesh(given: object, message: str) -> None:
    with pytest.raises(MeshError) as caught:
        read_mesh(given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("spec", "rank", "dims"),
    [
        (None, 2, None),
        (P(), 2, ((), ())),
        (P("model"), 2, (("model",), ())),
        (P("batch", "embed", "mlp"), 3, (("data",), (), ("model",))),
        (P("all"), 1, (("data", "model"),)),
        (P(("mlp", "batch")), 1, (("model", "data"),)),
        (P(P.UNCONSTRAINED, ("data", "model")), 3, (None, ("data", "model"), ())),
        (NamedSharding(AbstractMesh((4, 2), ("data", "model")), P("model")), 1, (("model",),)),
    ],
)
def test_resolve(spec: P | None, rank: int, dims: object) -> None:
    assert resolve(spec, rank, MESH, RULES, "x") == dims


def test_rules_come_before_axes() -> None:
    assert resolve(P("model"), 1, MESH, {"model": "data"}) == (("data",),)
    # but the names of a NamedSharding are axes already
    sharding = NamedSharding(AbstractMesh((4, 2), ("data", "model")), P("model"))
    assert resolve(sharding, 1, MESH, {"model": "data"}) == (("model",),)


@pytest.mark.parametrize(
    ("spec", "rank", "message"),
    [
        (
            P(None, "modle"),
            2,
            "params/w: dim 1 of P(None, 'modle') names 'modle', which is no mesh axis and no "
            "logical name: the mesh has data=4, model=2, the rules know batch, mlp, embed, all; "
            "did you mean 'model'?",
        ),
        (
            P("batch", "data"),
            2,
            "params/w: P('batch', 'data') splits dim 0 (as 'batch') and dim 1 over the same mesh "
            "axis 'data'; an axis can split one dim only, so drop it from one.",
        ),
        (
            P("batch", P.UNCONSTRAINED, "all"),
            3,
            "params/w: P('batch', P.UNCONSTRAINED, 'all') splits dim 0 (as 'batch') and dim 2 (as "
            "'all') over the same mesh axis 'data'; an axis can split one dim only, so drop it "
            "from one.",
        ),
        (
            P(("data", "batch")),
            1,
            "params/w: dim 0 of P(('data', 'batch')) names mesh axis 'data' twice; drop one.",
        ),
        (
            P("data", None, None),
            1,
            "params/w: P('data', None, None) has 3 entries, but the tensor has 1 dims; drop 2.",
        ),
        (
            NamedSharding(AbstractMesh((8,), ("data",)), P("data")),
            1,
            "params/w: the NamedSharding P('data') is on a mesh with data=8, but the program is "
            "planned for data=4, model=2; use one mesh, or a bare PartitionSpec.",
        ),
    ],
)
def test_a_bad_spec(spec: P, rank: int, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(spec, rank, MESH, RULES, "params/w")
    assert str(caught.value) == message


def test_an_unknown_name_without_rules() -> None:
    with pytest.raises(SpecError, match=r"the mesh has data=4, model=2, there are no rules\.$"):
        resolve(P("batch"), 1, MESH)


def test_check_rules() -> None:
    expected = {"batch": ("data",), "mlp": ("model",), "embed": (), "all": ("data", "model")}
    assert check_rules(RULES, MESH) == expected
    assert check_rules(None, MESH) == {}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"mlp": "modell"},
            "rules['mlp'] names mesh axis 'modell', but the mesh has data=4, model=2; did you "
            "mean 'model'?",
        ),
        (
            {"mlp": "tensor"},
            "rules['mlp'] names mesh axis 'tensor', but the mesh has data=4, model=2.",
        ),
        ({"mlp": ("data", "data")}, "rules['mlp'] names mesh axis 'data' twice; drop one."),
        (
            [("mlp", "data")],
            "rules must map logical names to mesh axes, got [('mlp', 'data')] of type list; "
            'write {"batch": "data", "embed": None}.',
        ),
    ],
)
def test_bad_rules(rules: object, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_rules(rules, MESH)
    assert str(caught.value) == message


ARGS = ({"w": {"a": 1, "b": 2}, "n": None}, (3, 4))
X, Y = P("data"), P("model")


@pytest.mark.parametrize(
    ("specs", "leaves"),
    [
        (None, [None, None, None, None]),
        (X, [X, X, X, X]),
        ((X, None), [X, X, None, None]),
        ([None, Y], [None, None, Y, Y]),
        (({"w": Y, "n": None}, [None, X]), [Y, Y, None, X]),
        (({"w": {"a": None, "b": X}, "n": X}, (X, Y)), [None, X, X, Y]),
    ],
)
def test_spec_tree(specs: object, leaves: list[P | None]) -> None:
    assert spec_tree(specs, ARGS) == leaves
    assert spec_tree(specs, jax.tree.structure(ARGS)) == leaves


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            (X,),
            "in_specs is a tuple of 1 specs, but there are 2 positional arguments (params, batch); "
            "give one spec tree each, as in jax.jit's in_shardings: (first, second).",
        ),
        (
            {"w": X},
            "in_specs is a dict of 1 specs, but there are 2 positional arguments (params, batch); "
            "give one spec tree each, as in jax.jit's in_shardings: (first, second).",
        ),
        (
            ({"w": {"a": X}, "n": None}, None),
            "in_specs for 'params/w': the dict of 1 specs lacks b; 2 are needed, or one "
            "PartitionSpec or None for all of them.",
        ),
        (
            ({"w": None, "n": None, "m": X}, None),
            "in_specs for 'params': the dict of 3 specs has m, which the arrays have not; 2 are "
            "needed, or one PartitionSpec or None for all of them.",
        ),
        (
            ({"w": "data", "n": None}, None),
            "in_specs for 'params/w': expected a PartitionSpec, a NamedSharding or None, got "
            "'data' of type str; write P('data').",
        ),
        (
            (X, ((X,), Y)),
            "in_specs for 'batch/0': got a tuple of 1 specs, but there is one array here; give one "
            "PartitionSpec.",
        ),
    ],
)
def test_a_bad_spec_tree(specs: object, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_tree(specs, ARGS, names=("params", "batch"))
    assert str(caught.value) == message


def test_to_spec() -> None:
    refined = MESH.refine("data", 2)
    assert to_spec((("data:0", "data:1", "model"), ()), refined) == P(("data", "model"), None)
    assert to_spec((("model",), ("data",)), MESH) == P("model", "data")
    for part in (("data:1",), ("data:0",), ("data:1", "data:0")):
        with pytest.raises(ValueError, match="is a part of mesh axis 'data' and has no spec"):
            to_spec((part,), refined)


def test_to_spec_inverts_resolve() -> None:
    for spec in (P("data", None), P(None, ("model", "data")), P(None, None)):
        dims = resolve(spec, 2, MESH)
        assert dims is not None
        assert to_spec([axes or () for axes in dims], MESH) == spec
