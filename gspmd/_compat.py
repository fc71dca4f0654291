"""What gspmd reads of JAX beyond its documented surface: tracebacks and name stacks of equations.

A release of JAX that moves them changes this file only.
"""

import dataclasses
import importlib
import os
import sys
import sysconfig
from collections.abc import Callable, Mapping
from types import CodeType, MappingProxyType, TracebackType
from typing import Any

import jax
import jaxlib
import jaxlib.version
from jax._src.core import trace_state_clean
from jax.core import Tracer

from gspmd.ir import PIPELINE, Source

# Frames of these distributions are never "the user's line".
LIBRARIES = frozenset({"jax", "jaxlib", "flax", "optax", "numpy", "chex", "einops", "orbax"})

# Compiler options for programs whose values have so many dims. XLA on CPU fuses products for
# kernels that take no more than seven, and ends the process at one of eight (jax-ml/jax#39257). An
# option that a release has not got is an error there: these have it.
MANY = 8
_FUSES = ("0.10.", "0.11.", "0.12.")
MANY_DIMS: Mapping[str, str] = MappingProxyType(
    {"xla_cpu_experimental_ynn_fusion_type": ""}
    if jaxlib.version.__version__.startswith(_FUSES)
    else {}
)

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_JAX = tuple(os.path.abspath(path) + os.sep for m in (jax, jaxlib) for path in m.__path__)
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_MODELS = tuple(
    os.path.join(root, folder) + os.sep
    for root in (_HERE, os.path.dirname(os.path.dirname(_HERE)))
    for folder in ("models", "meshes")
)


class Sources:
    """Finds the user's source line of equations; remembers what it found, for one trace."""

    def __init__(self) -> None:
        self._cwd = os.getcwd() + os.sep
        self._is_user: dict[str, bool] = {}
        self._sources: dict[tuple[CodeType, int, str, str], Source] = {}

    def of(self, eqn: Any, outer: Source | None = None) -> Source | None:
        """The innermost user frame of `eqn`, in the phase that its name stack tells.

        The equations of an inner jaxpr do not repeat what surrounds it: `outer` is the source of
        the op that holds it, which also stands in where all frames are a library's.
        """
        stack = str(eqn.source_info.name_stack)
        phase = _phase_of(stack, "forward" if outer is None else outer.phase)
        scope = PIPELINE if PIPELINE in stack else ""
        traceback = eqn.source_info.traceback
        if traceback is None:
            return outer
        codes, offsets = traceback.raw_frames()
        for i, code in enumerate(codes):
            if self._user(code.co_filename):
                return self._source(traceback, code, offsets[i], phase, scope)
        if outer is not None:
            same = (outer.phase, outer.scope) == (phase, scope)
            return outer if same else dataclasses.replace(outer, phase=phase, scope=scope)
        known = phase != "forward" or scope
        return Source("", 0, phase=phase, scope=scope) if known else None

    def _source(
        self, traceback: Any, code: CodeType, offset: int, phase: str, scope: str
    ) -> Source:
        key = (code, offset, phase, scope)
        if key not in self._sources:
            line = type(traceback).code_addr2location(code, offset)[0]
            file, name = self.relative(code.co_filename), _plain(code.co_qualname)
            self._sources[key] = Source(file, line, name, phase, scope)
        return self._sources[key]

    def of_traceback(self, traceback: TracebackType | None) -> Source | None:
        """The innermost user frame of a Python exception's traceback; None if it has none."""
        found = None
        while traceback is not None:
            code = traceback.tb_frame.f_code
            if self._user(code.co_filename):
                line = traceback.tb_lineno
                found = Source(self.relative(code.co_filename), line, _plain(code.co_qualname))
            traceback = traceback.tb_next
        return found

    def here(self) -> Source | None:
        """The line of the user's code that is now calling gspmd; None if there is none."""
        frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        while frame is not None:
            code = frame.f_code
            if self._user(code.co_filename):
                return Source(self.relative(code.co_filename), frame.f_lineno, code.co_qualname)
            frame = frame.f_back
        return None

    def relative(self, file: str) -> str:
        """`file` relative to the working directory where it lies below it."""
        return file[len(self._cwd) :] if file.startswith(self._cwd) else file

    def _user(self, file: str) -> bool:
        if file not in self._is_user:
            self._is_user[file] = is_user_file(file)
        return self._is_user[file]


def is_user_file(file: str) -> bool:
    """Whether code of `file` is the user's: not JAX's, a known library's, Python's or gspmd's own.

    The reference models count as user code.
    """
    if file.startswith("<"):  # `<string>` of generated code is nobody's; a prompt is the user's
        return file.startswith(("<stdin>", "<ipython"))
    if file.startswith(_MODELS):
        return True
    if file.startswith((_HERE, *_JAX)):
        return False
    for folder in ("site-packages", "dist-packages"):
        _, found, rest = file.partition(f"{os.sep}{folder}{os.sep}")
        if found:
            return rest.partition(os.sep)[0].removesuffix(".py") not in LIBRARIES
    return not file.startswith(_STDLIB)


def _phase_of(stack: str, outer: str) -> str:
    """The phase, forward, backward or rematerialized, by the marks that grad and remat leave."""
    if not stack:
        return outer
    if "rematted_computation" in stack:
        return "rematerialized"
    return "backward" if "transpose(" in stack else outer


def is_tracer(x: Any) -> bool:
    """Whether `x` stands for a value inside a transformation."""
    return isinstance(x, Tracer)


def is_tracing() -> bool:
    """Whether a transformation is under way, whose tracers a function may close over."""
    return not trace_state_clean()


def bind(primitive: Any) -> Callable[..., Any]:
    """The function `(*arrays, **params) -> results` that executes `primitive`."""

    def call(*args: Any, **params: Any) -> Any:
        return primitive.bind(*args, **primitive.get_bind_params(params))

    return call


def run_jaxpr(closed: Any, *args: Any) -> list[Any]:
    """The results of a closed jaxpr, such as a primitive holds of a user's function.

    On whatever mesh the caller runs: JAX's own interpreter insists on that of the tracing.
    """
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))

    def read(x: Any) -> Any:
        return x.val if hasattr(x, "val") else values[x]

    for eqn in jaxpr.eqns:
        operands = [read(x) for x in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit"):
            outs = run_jaxpr(eqn.params["jaxpr"], *operands)
        else:
            outs = bind(eqn.primitive)(*operands, **eqn.params)
        many = eqn.primitive.multiple_results
        values.update(zip(eqn.outvars, outs if many else [outs], strict=True))
    return [read(x) for x in jaxpr.outvars]


def generator_primitive(name: str) -> Any:
    """The primitive that hashes keys and counters for the generator `name`, `philox2x32` say.

    None where this JAX lacks it. Of these, JAX makes public that of `threefry2x32` only.
    """
    try:
        module = importlib.import_module(f"jax._src.random.{name}")
    except ImportError:
        return None
    return getattr(module, f"{name}_p", None)


def gamma_of_key() -> Any:
    """The function `(key, alpha, *, log_space)` that draws one gamma variate; None if it moved."""
    for name in ("jax._src.random.core", "jax._src.random"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "_gamma_one"):
            return module._gamma_one
    return None


def _plain(qualified: str) -> str:
    return qualified.replace("<locals>.", "")


def control_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The params of a control-flow primitive, with a scan's operands counted by kind.

    Up to 0.10, JAX gives `num_consts` and `num_carry`; later, trees of the operands (`ft_in`).
    """
    counted = dict(params)
    if "ft_in" in counted:
        consts, carry, _ = counted["ft_in"].unpack()
        counted |= {"num_consts": len(consts), "num_carry": len(carry)}
    return counted
