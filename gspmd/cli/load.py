"""What the command line is given, as values: a `FILE.py:FUNCTION`, rule tables, sizes in bytes."""

import dataclasses
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from gspmd.cli.terminal import InputError
from gspmd.errors import GspmdError, nearest
from gspmd.partitioned import Partitioned
from gspmd.plan import Plan
from gspmd.planner import plan
from gspmd.specs import read_mesh

Rules = dict[str, str | tuple[str, ...] | None]

EXPECTED = (
    "it must return (fn, args) or (fn, args, options), or be decorated with gspmd.partition and "
    "take no arguments"
)
_UNITS = {
    prefix + suffix: base**power
    for base, suffix in ((1000, "B"), (1024, "iB"))
    for power, prefix in enumerate(("", "k", "M", "G", "T", "P"))
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is planned: a function, its arguments, and options of `gspmd.plan`."""

    fn: Callable[..., Any]
    args: Sequence[Any] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


def read_subject(
    target: str,
    mesh: str | None = None,
    strategy: str | None = None,
    batch: int | None = None,
    optimizer: str | None = None,
    microbatches: int | None = None,
) -> Subject:
    """What `FILE.py:FUNCTION`, or `models.NAME:CONFIG`, stands for.

    What comes after `mesh` is for the reference models, whose training step depends on it:
    `batch` examples, by default one for each device of `mesh`, in so many `microbatches` where the
    mesh has an axis "stage".

    Raises:
      InputError: no such file or function, it fails, or it gives something else; an option that is
        for the reference models alone.
      GspmdError: no such model, configuration or strategy.
    """
    file, _, name = target.rpartition(":")
    given = strategy, batch, optimizer, microbatches
    if file.startswith("models.") and not file.endswith(".py"):
        return _reference(file.removeprefix("models."), name, mesh, *given)
    options = ("strategy", "batch", "optimizer", "microbatches")
    for option, value in zip(options, given, strict=True):
        if value is not None:
            raise InputError(
                f"--{option} is for models.NAME:CONFIG, but {target} makes its own step; leave it "
                "out."
            )
    if not file or not name.isidentifier():
        raise InputError(
            f"{target!r} is neither FILE.py:FUNCTION nor models.NAME:CONFIG; write "
            "train.py:step, for instance, or models.transformer:137b."
        )
    path = Path(file)
    module = _import(path)
    found = vars(module).get(name)
    if found is None:
        functions = [n for n, x in vars(module).items() if callable(x) and not n.startswith("_")]
        raise InputError(f"{path} has no function {name!r}{nearest(name, functions)}")
    if isinstance(found, Partitioned):
        return Subject(found)
    if not callable(found):
        raise InputError(f"{target} is of type {type(found).__name__}, not a function: {EXPECTED}.")
    _takes_nothing(found, target)
    return _subject(_call(found, path, f"{target} failed"), target)


def _reference(
    name: str,
    size: str,
    mesh: str | None,
    strategy: str | None,
    batch: int | None,
    optimizer: str | None,
    microbatches: int | None,
) -> Subject:
    from gspmd.models import catalog  # with flax and optax, which other targets do without

    if mesh is None:
        raise InputError(f"models.{name}:{size} has no mesh of its own: add --mesh data=2,model=4.")
    logical, _ = read_mesh(mesh)
    made = catalog.step(
        name,
        size,
        dict(logical.axes),
        batch_size=logical.devices if batch is None else batch,
        strategy="2d" if strategy is None else strategy,
        optimizer="adafactor" if optimizer is None else optimizer,
        microbatches=microbatches,
    )
    return Subject(made.fn, made.args, made.options)


def _takes_nothing(fn: Callable[..., Any], target: str) -> None:
    parameters = inspect.signature(fn).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (2, 4)]
    if needed:
        raise InputError(
            f"{target} takes {', '.join(needed)}, but the command line has nothing to pass: "
            f"{EXPECTED}."
        )


def _subject(result: object, target: str) -> Subject:
    parts = cast("tuple[Any, ...]", result) if isinstance(result, tuple) else ()
    match parts:
        case (fn, (tuple() | list()) as args) if callable(fn):
            return Subject(fn, args)
        case (fn, (tuple() | list()) as args, dict() as options) if callable(fn):
            if not all(isinstance(name, str) for name in options):
                raise InputError(f"{target} returned options {options!r}: their names are strings.")
            return Subject(fn, args, options)
        case _:
            shape = ", ".join(type(part).__name__ for part in parts)
            kind = (
                f"a tuple of ({shape})" if parts else f"something of type {type(result).__name__}"
            )
            raise InputError(f"{target} returned {kind}: {EXPECTED}.")


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py") if p.is_file()]
        raise InputError(f"there is no file {str(path)!r}{nearest(str(path), siblings)}")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise InputError(f"{str(path)!r} is not a Python file; FILE.py:FUNCTION needs one.")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # as dataclasses and pickle want it
    sys.path.insert(0, str(path.resolve().parent))  # as for `python FILE.py`
    loader = spec.loader
    _call(lambda: loader.exec_module(module), path, f"{path} cannot be imported")
    return module


def _call(fn: Callable[[], Any], path: Path, failed: str) -> Any:
    """`fn()`; an exception of the user's code becomes one sentence with the line in their file."""
    try:
        return fn()
    except GspmdError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{failed}: {describe(error, path)}") from error


def describe(error: BaseException, path: Path | None = None) -> str:
    """`ValueError: no such layer (model.py:12)`: the first line, and where in the file `path`."""
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, SyntaxError):
        own = path is not None and error.filename == str(path.resolve())
        file = path if own else error.filename
        return f"{type(error).__name__}: {error.msg} ({file}:{error.lineno})."
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if path and Path(f.filename) == path.resolve()]
    where = f" ({path}:{lines[-1]})" if lines else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}."


def make_plan(
    subject: Subject, mesh: str | None, rules: Rules, strict: bool = False, effort: int = 1
) -> Plan:
    """The plan of `subject`; the command line's mesh and rules go before the file's own.

    Raises:
      InputError: there is no mesh.
      GspmdError: the program cannot be planned.
    """
    fn = subject.fn
    options: dict[str, Any] = dict(subject.options)
    if isinstance(fn, Partitioned):
        options = dict(fn.keywords) | {"mesh": fn.mesh} | options
        fn = inspect.unwrap(fn)
    if mesh is not None:
        options["mesh"] = mesh
    if options.get("mesh") is None:
        raise InputError("no mesh: add --mesh data=2,model=4, for instance.")
    if rules:
        options["rules"] = {**(options.get("rules") or {}), **rules}
    if strict:
        options["strict"] = True
    options.setdefault("effort", effort)
    return plan(fn, *subject.args, **options)


def read_rules(texts: Iterable[str]) -> Rules:
    """The rule table of `batch=data,embed=data+model,heads=`: several axes by `+`, none for whole.

    Raises:
      InputError: an entry is malformed, or a name has two.
    """
    rules: Rules = {}
    for entry in (e.strip() for text in texts for e in text.split(",") if e.strip()):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not name:
            raise InputError(f"--rules: {entry!r} is not NAME=AXIS; write batch=data,mlp=model.")
        if name in rules:
            raise InputError(f"--rules: {name!r} is given twice; write {name}=data+model.")
        axes = tuple(axis.strip() for axis in value.split("+") if axis.strip())
        rules[name] = axes if len(axes) > 1 else axes[0] if axes else None
    return rules


def read_bytes(text: str) -> float:
    """The number of bytes in `10GB`, `1.5 GiB` or `4096`.

    Raises:
      InputError: it is no such number.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if found is None or (found[2] or "B").lower() not in units or found[1].count(".") > 1:
        raise InputError(f"{text!r} is not a size in bytes; write 10GB, 1.5GiB or 4096.")
    return float(found[1]) * units[(found[2] or "B").lower()]


def chip_and_topology(chip: str | None, topology: str | None) -> tuple[str, str | None]:
    """The chip's name and the topology's; a topology's name begins with its chip's.

    Raises:
      InputError: neither is given.
    """
    if chip is None and topology is None:
        raise InputError("no hardware: add --topology tpu-v3:16x32, or --chip h100, for instance.")
    return chip or str(topology).partition(":")[0].strip(), topology
