"""DrawnProgram: a JAX function as source text, with arguments and a way to partition it.

The text is the program: it is what runs, what is printed, and what the script of a failing example
holds.
"""

import dataclasses
import functools
import linecache
import types
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from gspmd.annotate import annotate
from gspmd.specs import show_spec
from gspmd.testing.equivalence import Target, assert_equivalent

_SCRIPT = '''\
"""A program whose plan does not compute what the program does: run this file to see how."""

import os

flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = flags + " --xla_force_host_platform_device_count={devices}"

import gspmd.testing
import jax
import jax.numpy as jnp
import numpy as np
from gspmd import P
from jax import lax

{program}

{arguments}

gspmd.testing.assert_equivalent(
    program, {names},
    mesh={mesh},
    in_specs={in_specs},
    out_specs={out_specs},
    grad={grad}, rtol={rtol}, atol={atol}, on={on!r},
)
'''


_NAMESPACE: Mapping[str, Any] = {
    "jax": jax, "jnp": jnp, "lax": lax, "np": np, "P": P,
    "gspmd": types.SimpleNamespace(annotate=annotate),  # the package, as far as a text uses it
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """Python statements that give the value `name` from values before it: `v2 = jnp.tanh(v0)`."""

    name: str
    code: str
    reads: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DrawnProgram:
    """A function `(*arrays) -> tuple of arrays`, drawn by `gspmd.testing.programs`.

    Calling it runs `source`. `args` are arguments for it; `mesh`, `in_specs` and `out_specs` say
    how to partition it, as `gspmd.plan` takes them. `str(program)` shows all of that.
    """

    arguments: tuple[Step, ...]
    steps: tuple[Step, ...]
    outs: tuple[str, ...]
    mesh: dict[str, int]
    in_specs: tuple[P | None, ...]
    out_specs: tuple[P | None, ...]

    @property
    def __name__(self) -> str:
        return "program"

    @functools.cached_property
    def args(self) -> tuple[np.ndarray, ...]:
        """The arguments that were drawn with the program."""
        return tuple(eval(step.code, dict(_NAMESPACE)) for step in self.arguments)

    @functools.cached_property
    def source(self) -> str:
        """The function as Python text, in terms of jax, jnp, lax, np, P and gspmd."""
        lines = [f"def program({', '.join(step.name for step in self.arguments)}):"]
        lines += [f"    {line}" for step in self.steps for line in step.code.splitlines()]
        return "\n".join([*lines, f"    return {_tuple(self.outs)}"])

    @functools.cached_property
    def _fn(self) -> Callable[..., tuple[Any, ...]]:
        return compile_text(self.source, "program", shown=True)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        return self._fn(*args)

    def check(
        self, grad: bool = False, rtol: float = 1e-4, atol: float = 2e-5, on: Target = "simulated"
    ) -> None:
        """Returns if the program partitioned computes what it computes whole.

        Entries are of the order of 1, for which `atol` is meant. `grad` is for programs that were
        drawn `smooth`.

        Raises:
          AssertionError: as in `assert_equivalent`.
        """
        assert_equivalent(
            self,
            *self.args,
            mesh=self.mesh,
            in_specs=self.in_specs,
            out_specs=self.out_specs,
            grad=grad,
            rtol=rtol,
            atol=atol,
            on=on,
        )

    def script(
        self, grad: bool = False, rtol: float = 1e-4, atol: float = 2e-5, on: Target = "simulated"
    ) -> str:
        """A Python file that does `check` with these arguments, and needs nothing else."""
        return _SCRIPT.format(
            devices=int(np.prod(list(self.mesh.values()))),
            program=self.source,
            arguments="\n".join(f"{step.name} = {step.code}" for step in self.arguments),
            names=", ".join(step.name for step in self.arguments),
            mesh=self.mesh,
            in_specs=_tuple([_spec(spec) for spec in self.in_specs]),
            out_specs=_tuple([_spec(spec) for spec in self.out_specs]),
            grad=grad,
            rtol=rtol,
            atol=atol,
            on=on,
        )

    def __str__(self) -> str:
        arguments = (
            f"{step.name} = {step.code}  # {_spec(spec)}"
            for step, spec in zip(self.arguments, self.in_specs, strict=True)
        )
        outs = ", ".join(map(_spec, self.out_specs))
        return "\n".join((f"# mesh {self.mesh}", *arguments, self.source + f"  # {outs}"))

    def __repr__(self) -> str:
        return f"\n{self}\n"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print the fields."""
        printer.text(repr(self))


def compile_text(text: str, name: str, shown: bool = False) -> Callable[..., Any]:
    """The function `name` that `text` defines; with `shown`, tracebacks show its lines."""
    file = f"drawn-{zlib.crc32(text.encode()):08x}.py"  # which counts as the user's
    if shown:
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace = dict(_NAMESPACE)
    exec(compile(text, file, "exec"), namespace)
    return namespace[name]


def _spec(spec: P | None) -> str:
    return "None" if spec is None else show_spec(spec)


def _tuple(items: Sequence[str]) -> str:
    """`(a, b)`, and `(a,)` for one."""
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
