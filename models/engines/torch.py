"""PyTorch files, TorchScript (`.pt`) and torch.export programs (`.pt2`), on the CPU. The only importer of torch.

Both are programs, not data: load only what you trust as you trust code. What `torch_archive.screened` refuses keeps a
torch.export program to PyTorch's own operators; TorchScript is held by nothing but the process it runs in, so a file from
elsewhere belongs in one with limits (`models.serving.isolated`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from models.engines import EngineOptions
from models.engines.torch_archive import is_exported, screened
from models.errors import ContractBreach, EngineFailure
from models.tensor import Array, TensorSpec

_DATATYPES = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}
_MAX_REASON = 500
"""Characters of an engine's message that are kept."""


class Program(NamedTuple):
    """A loaded file. `call` takes the input tensors in the order of `inputs` and returns one tensor for each of `outputs`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    call: Callable[[Sequence[Any]], Sequence[Any]]


class TorchEngine:
    """`Engine` for `.pt` and `.pt2` files, told apart by what is inside."""

    def load(self, path: Path, options: EngineOptions) -> TorchSession:
        """Raises ContractBreach. `options.threads` holds for the whole process, as PyTorch has it: the last load decides."""
        if torch.get_num_threads() != options.threads:
            torch.set_num_threads(options.threads)
        try:
            program = _loaded(path, options)
        except ContractBreach:
            raise
        except Exception as error:
            # Damaged archives raise whatever the reader stumbled over: RuntimeError, KeyError, AssertionError, zlib's own.
            raise ContractBreach(f"PyTorch refuses the file: {_reason(error, path)}") from error
        return TorchSession(program)


def _loaded(path: Path, options: EngineOptions) -> Program:
    with path.open("rb") as file:
        return _exported(file, options) if is_exported(file) else _scripted(path, options)


class TorchSession:
    """`Session` on a PyTorch program, safe to call from several threads.

    Arrays are copied in and out: a program may write to its inputs, and may answer with its own weights.
    """

    serial = False

    def __init__(self, program: Program) -> None:
        self.inputs, self.outputs = program.inputs, program.outputs
        self._in = [spec.name for spec in program.inputs]
        self._out = {spec.name: index for index, spec in enumerate(program.outputs)}
        self._dtypes = [spec.datatype for spec in program.outputs]
        self._call: Callable[[Sequence[Any]], Sequence[Any]] = program.call

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Outputs in the order asked for, () = all. Raises EngineFailure."""
        try:
            with torch.inference_mode():
                answers = self._call([torch.from_numpy(inputs[name].copy()) for name in self._in])
            wanted = [self._out[name] for name in outputs] if outputs else range(len(self._out))
            return [self._array(index, answers[index]) for index in wanted]
        except EngineFailure:
            raise
        except Exception as error:
            raise EngineFailure(f"PyTorch: {_reason(error)}") from error

    def _array(self, index: int, answer: Any) -> Array:
        got = _DATATYPES.get(answer.dtype, str(answer.dtype))
        if got != self._dtypes[index]:
            name = self.outputs[index].name
            raise EngineFailure(f"PyTorch: output '{name}' is {got}, promised is {self._dtypes[index]}")
        return np.array(answer.numpy(), order="C")

    def stop(self) -> bool:
        """PyTorch offers no way to end a run."""
        return False

    def close(self) -> None:
        """Drop the program; its memory goes with the last reference."""
        self._call = _closed


def _closed(_: Sequence[Any]) -> Sequence[Any]:
    raise RuntimeError("the session is closed")


# --- torch.export --------------------------------------------------------------------------------------------------------


def _exported(file: BinaryIO, options: EngineOptions) -> Program:
    archive, samples = screened(file)
    try:
        torch.load(io.BytesIO(samples), weights_only=True)
    except Exception as error:
        # torch.export.load would go on to unpickle them without that bound.
        raise ContractBreach("the sample inputs hold more than plain tensors") from error
    program = torch.export.load(archive)
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = [_traced(name, nodes) for name in program.graph_signature.user_inputs]
    names = _output_names(program.call_spec.out_spec)
    outputs = [
        _traced(node, nodes, name) for name, node in zip(names, program.graph_signature.user_outputs, strict=True)
    ]
    module, tree = program.module(), program.call_spec.in_spec

    def call(tensors: Sequence[Any]) -> Sequence[Any]:
        args, kwargs = pytree.tree_unflatten(tensors, tree)
        leaves: list[Any] = pytree.tree_leaves(module(*args, **kwargs))
        return leaves

    return Program(_promised(inputs, options.inputs), _promised(outputs, options.outputs), call)


def _traced(node: object, nodes: Mapping[str, Any], name: str | None = None) -> TensorSpec:
    """What export recorded of a tensor: sizes that may vary are symbols there."""
    value = nodes[node].meta.get("val") if isinstance(node, str) and node in nodes else None
    if not isinstance(value, torch.Tensor):
        raise ContractBreach(f"'{name or node}' is not a tensor, which is all the Open Inference Protocol can carry")
    name = name or str(node)
    if value.dtype not in _DATATYPES:
        raise ContractBreach(f"'{name}' is {value.dtype}, which the Open Inference Protocol cannot carry")
    return TensorSpec(name, _DATATYPES[value.dtype], tuple(dim if isinstance(dim, int) else -1 for dim in value.shape))


def _output_names(spec: Any) -> list[str]:
    """The keys when the program returns one flat dictionary; else `output`, or `output_0` and so on in order."""
    if spec.type is dict and all(isinstance(key, str) for key in spec.context) and spec.num_leaves == len(spec.context):
        return list(spec.context)
    return ["output"] if spec.num_leaves == 1 else [f"output_{index}" for index in range(spec.num_leaves)]


def _promised(found: Sequence[TensorSpec], promised: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """`found` under the manifest's names: the same names, or the same number in the same order."""
    names = [spec.name for spec in promised]
    if len(names) != len(found) or set(names) == {spec.name for spec in found}:
        return tuple(found)
    return tuple(TensorSpec(name, spec.datatype, spec.shape) for name, spec in zip(names, found, strict=True))


# --- TorchScript ---------------------------------------------------------------------------------------------------------


def _scripted(path: Path, options: EngineOptions) -> Program:
    if not (options.inputs and options.outputs):
        raise ContractBreach(
            "a TorchScript file states neither datatypes nor shapes: put a manifest.json with its inputs and outputs beside it"
        )
    for spec in (*options.inputs, *options.outputs):
        if spec.datatype not in _DATATYPES.values():
            raise ContractBreach(f"'{spec.name}' is {spec.datatype}, which PyTorch does not have")
    # No pickle of Python's: TorchScript has an unpickler of its own, which knows only its types.
    module = torch.jit.load(str(path), map_location="cpu").eval()
    inputs = _arguments(module, options.inputs)
    names = [spec.name for spec in options.outputs]

    def call(tensors: Sequence[Any]) -> Sequence[Any]:
        return _flat(module(*tensors), names)

    return Program(inputs, options.outputs, call)


def _arguments(module: Any, specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """`specs` in the order of `forward`'s arguments: by name when all are named so, else as they come."""
    arguments = module.forward.schema.arguments[1:]
    names = [argument.name for argument in arguments]
    needed = sum(not argument.has_default_value() for argument in arguments)
    if not needed <= len(specs) <= len(names):
        raise ContractBreach(f"the program takes {', '.join(names) or 'nothing'}; promised are {len(specs)} inputs")
    for argument in arguments[: len(specs)]:
        if str(argument.type) not in ("Tensor", "Optional[Tensor]"):
            raise ContractBreach(f"input '{argument.name}' is a {argument.type}, only tensors can be sent")
    by_name = {spec.name: spec for spec in specs}
    if set(by_name) == set(names[: len(specs)]):
        return tuple(by_name[name] for name in names[: len(specs)])
    return tuple(specs)


def _flat(result: Any, names: Sequence[str]) -> Sequence[Any]:
    """A tensor, a tuple or list of them, or a dictionary by output name. Raises EngineFailure for any other."""
    if isinstance(result, dict):
        result = [result.get(name) for name in names] if set(result) == set(names) else list(result.values())
    answers = list(result) if isinstance(result, (list, tuple)) else [result]
    if len(answers) != len(names) or not all(isinstance(answer, torch.Tensor) for answer in answers):
        raise EngineFailure(
            f"PyTorch: the program answers {len(answers)} values, promised are the tensors {', '.join(names)}"
        )
    return answers


def _reason(error: Exception, path: Path | None = None) -> str:
    """The last line that says something, without the machine's paths: above it PyTorch prints a trace of the program."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[-1].removeprefix("RuntimeError: ")
    return (text.replace(str(path), path.name) if path else text)[:_MAX_REASON]
