"""The registration of an op: one schema, one reference and the compiled forms become one torch custom op.

Everything between a public function and its kernels is derived from the schema: which arguments are tensors and which
of them are written, the order of the Triton launch's arguments, the names of the C++ form's. A kernel addresses dense
tensors by pointer, so what is not dense (or stored negated) is replaced by a dense copy and written back.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backends
from ._checks import Arguments, check_types, check_windows
from ._launches import Repeats

_ARGUMENT = re.compile(r"(Tensor|int|float|bool|str)(\(\w+!\))?(\??) (\w+)")
# What the C++ form takes in float64, and in float32 unless the states are float64; other tensors as they are stored.
_FLOAT64 = frozenset("state_coef model_coef sq_diff sq_norm sq_miss gram size ridges guess_error".split())  # noqa: SIM905
_WIDE = frozenset({"slope", "weight"})
_NEEDS_FLOAT64 = frozenset({"newton_scan", "inverse_scan"})  # their fits: on the CPU where the device has none


def _kind(name: str, kind: str) -> str:
    """How the C++ form takes an argument: by value, as a tensor as it is stored, or as one of a certain type."""
    if kind != "Tensor":
        return "value"
    return "float64" if name in _FLOAT64 else "wide" if name in _WIDE else "tensor"


class register:
    """Registers an op with torch as `deqdiff_fast::<name>`; its public function calls the result.

    Call it with the backend and the arguments in the order of the schema.

    Args:
        package: `__name__` of the op's folder; its `_triton.launch` takes the arguments of the schema in order.
        schema: "name(Tensor(a!) written, Tensor read, Tensor? optional, int number, ...) -> ()". No argument has a
            default: torch fails on defaults of mutable arguments under dispatch modes. A `workspace` comes last.
        reference: the op in plain torch; takes the arguments of the schema in order, without `workspace`.
        validate: checks {name: value} of all arguments, without reading a tensor's values; raises ValueError.
        cpp: what `_C.<name>` takes besides the schema's arguments (sizes, threads), from those: {name: value} ->
            {name: value}. None where there is no C++ form: on the CPU the reference serves then.
        storage: the tensors whose device and dtypes decide which backend serves.
        cpp_serves: whether the C++ form takes these arguments; else the reference does, even if "cpp" was asked for.
        check_values: checks values of CPU tensors, where reading them costs nothing; the C++ form does so itself.
        as_stored: the tensors that the C++ form takes as they are, whatever others of their name are converted to.
    """

    def __init__(
        self, package: str, schema: str, reference: Callable[..., None], *,
        validate: Callable[[Arguments], None], cpp: Callable[[Arguments], Arguments] | None = None,
        storage: tuple[str, ...] = ("states", "predictions", "drift"),
        cpp_serves: Callable[[Arguments], bool] | None = None,
        check_values: Callable[[Arguments], None] | None = None, as_stored: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.package, self.reference, self.cpp = package, reference, cpp
        self.validate, self.storage, self.cpp_serves = validate, storage, cpp_serves
        self.check_values, self.repeats = check_values, Repeats()
        self.name, _, arguments = schema.partition("(")
        found = _ARGUMENT.findall(arguments)
        self.names = tuple(name for *_, name in found)
        self.written = frozenset(name for _, mutable, _, name in found if mutable)
        self.kinds = [(n, "tensor" if n in as_stored else _kind(n, kind)) for kind, *_, n in found if n != "workspace"]
        self.types = [(name, kind + optional) for kind, _, optional, name in found]
        if cpp is not None:
            _backends.CPP_OPS.append(self.name)
        self.op = torch.library.custom_op(
            f"deqdiff_fast::{self.name}",
            lambda *args: self.run("auto", *args),  # which backend serves depends on what is installed
            mutates_args=[name for name in self.names if name in self.written],
            schema=f"({arguments}",
        )
        self.op.register_fake(lambda *args, **named: self.check(dict(zip(self.names, args), **named)))

    def __call__(self, backend: str, *args: Any) -> None:
        if backend == "auto" and _backends.dispatched(args[0]):
            self.op(*args)
        elif backend not in ("auto", "triton") or not self.repeats.run(args):
            self.run(backend, *args)

    def check(self, given: Arguments) -> None:
        """Raise ValueError unless the arguments are what the op takes; no tensor's values are read."""
        check_types(given, self.types)
        self.validate(given)

    def run(self, backend: str, *args: Any) -> None:
        """The op on one backend, past torch's dispatcher."""
        given = dict(zip(self.names, args, strict=True))
        self.check(given)
        name = self._choose(backend, given)
        if "predictions" in given:  # an op on a chain
            if args[0].device.type == "cpu":  # reading values costs nothing there
                check_windows(given)
            if not args[0].shape[1]:
                return
        if self.check_values is not None and name != "cpp" and args[0].device.type == "cpu":
            self.check_values(given)
        if self.name in _NEEDS_FLOAT64 and args[0].device.type == "mps":
            self._run_on_host(args)
        elif name == "cpp":
            self._run_cpp(given)
        elif name == "triton":
            self._run_triton(given)
        else:
            self.reference(*(args[:-1] if self.names[-1] == "workspace" else args))

    def _choose(self, backend: str, given: Arguments) -> str:
        storage = tuple(given[name] for name in self.storage if given[name] is not None)
        if self.cpp is None and (backend == "cpp" or (backend == "auto" and storage[0].device.type != "cuda")):
            return "reference"  # not worth a kernel on the CPU
        lags = given["state_coef"].shape[1] if "state_coef" in given else 1
        name = _backends.resolve(backend, storage, lags)
        if name == "cpp" and self.cpp_serves is not None and not self.cpp_serves(given):
            return "reference"
        return name

    def _run_on_host(self, args: Sequence[Any]) -> None:
        """For a device without float64."""
        here = [arg.cpu() if isinstance(arg, Tensor) else arg for arg in args]
        self.run("auto", *here)
        for own, arg, copy in zip(self.names, args, here):
            if own in self.written:
                arg.copy_(copy)

    def _run_cpp(self, given: Arguments) -> None:
        extension, _ = _backends.extension()
        assert extension is not None and self.cpp is not None  # noqa: PT018
        wide = torch.float64 if given[self.names[0]].dtype is torch.float64 else torch.float32
        call = self.cpp(given)
        copies, alive = [], []
        for name, kind in self.kinds:
            value = given[name]
            if kind == "value":
                call.setdefault(name, value)
            elif value is None:
                call[name] = 0
            else:
                dense = value
                if kind != "tensor":
                    dtype = torch.float64 if kind == "float64" else wide
                    dense = value if value.dtype is dtype else value.to(dtype)
                if not dense.is_contiguous() or dense.is_neg():
                    dense = dense.contiguous().resolve_neg()
                if dense is not value:
                    alive.append(dense)
                    if name in self.written:
                        copies.append((value, dense))
                call[name] = dense.data_ptr()
        getattr(extension, self.name)(**call)
        for original, dense in copies:
            original.copy_(dense)

    def _run_triton(self, given: Arguments) -> None:
        module = importlib.import_module("._triton", self.package)  # not before it is needed: it imports Triton
        dense = [value.contiguous().resolve_neg() if isinstance(value, Tensor) else value for value in given.values()]
        # Triton launches on the current device
        with torch.cuda.device_of(given[self.names[0]]), self.repeats.note(tuple(given.values())):
            module.launch(*dense)
        for (name, original), used in zip(given.items(), dense):
            if used is not original and name in self.written:
                original.copy_(used)


def chain_sizes(given: Arguments) -> Arguments:
    """What the C++ form of an op on a chain takes besides its arguments."""
    states = given["states"]
    rows, batch, size = states.shape
    found = {"dtype": _backends.CPP_DTYPES[states.dtype], "T": rows - 1, "B": batch, "D": size,
             "threads": torch.get_num_threads()}  # fmt: skip
    if "state_coef" in given:
        found["L"] = given["state_coef"].shape[1]
    for name in _WIDE & given.keys():
        found[f"{name}_per_element"] = given[name].shape[1] > 1
    if "z" in given:  # rings (H + 1, W, B, D), or none
        rings = (0, 0) if given["z"] is None else given["z"].shape
        found["ring"], found["W"] = rings[:2]
    return found
