"""For tests: a partitioned program computes what it computes whole.

    from gspmd.testing import assert_equivalent

    def test_loss():
        assert_equivalent(loss, params, batch, mesh="data=2,model=4", in_specs=(None, P("data")))

* `assert_equivalent` compares values and gradients, on a simulated mesh or on devices, and names
  the first intermediate value that differs.
* `assert_equivalent_shrunk` does so for a plan of thousands of devices, on a mesh and on arguments
  that were shrunk, and returns the `Coverage`: which rules and collectives that exercised.
* `meshes`, `specs` and `programs` are hypothesis strategies; a `DrawnProgram` brings its arguments,
  mesh and specs along, and writes itself as a script. They need `pip install 'gspmd[test]'`.
* The pytest fixture `assert_partitioned` is `assert_equivalent`, and takes a drawn program alone:

    @hypothesis.given(program=gspmd.testing.programs())
    def test_my_rule(assert_partitioned, program):
        assert_partitioned(program)
"""

from gspmd.testing.coverage import CollectiveUse, Coverage, RuleUse
from gspmd.testing.equivalence import assert_equivalent
from gspmd.testing.program import DrawnProgram
from gspmd.testing.shrunk import assert_equivalent_shrunk
from gspmd.testing.strategies import meshes, programs, specs

__all__ = [
    "CollectiveUse",
    "Coverage",
    "DrawnProgram",
    "RuleUse",
    "assert_equivalent",
    "assert_equivalent_shrunk",
    "meshes",
    "programs",
    "specs",
]
