"""TensorFlow Lite files through LiteRT (ai-edge-litert), or tflite-runtime where only that exists. Their only importer."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    from tflite_runtime.interpreter import Interpreter

from models.engines import EngineOptions
from models.errors import ContractBreach, EngineFailure, InvalidRequest, NoUsableVariant
from models.tensor import Array, TensorSpec, datatype_of

_MAX_REASON = 500
"""Characters of an engine's message that are kept."""


class LitertEngine:
    """`Engine` for `.tflite` files."""

    def load(self, path: Path, options: EngineOptions) -> LitertSession:
        """Raises ContractBreach; NoUsableVariant when tflite-runtime is paired with a numpy it was not built for."""
        try:
            interpreter = Interpreter(model_path=str(path), num_threads=options.threads)
            interpreter.allocate_tensors()
        except SystemError as error:
            # tflite-runtime 2.14 installs and imports beside numpy 2, then fails here.
            raise NoUsableVariant(
                f"this tflite-runtime does not work with numpy {np.__version__}: install ai-edge-litert, or numpy < 2"
            ) from error
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ContractBreach(f"LiteRT refuses the file: {_reason(error, path)}") from error
        return LitertSession(interpreter)


class LitertSession:
    """`Session` on one interpreter, which is not thread-safe: runs take turns.

    Names are those of the file's signature when it has exactly one, else the tensors' own without what converters add
    (`serving_default_x:0` is `x`). `inputs`, `outputs`: sizes that may be changed are -1. Output arrays are copies.
    `serial`: a run waits for the one before it.
    """

    serial = True

    def __init__(self, interpreter: Any) -> None:
        inputs, outputs = _tensors(interpreter)
        self.inputs = tuple(_spec(name, detail) for name, detail in inputs.items())
        self.outputs = tuple(_spec(name, detail) for name, detail in outputs.items())
        self._in = [(name, detail["index"]) for name, detail in inputs.items()]
        self._out = {name: detail["index"] for name, detail in outputs.items()}
        self._shapes: list[tuple[int, ...]] = []
        self._interpreter = interpreter
        self._turn = threading.Lock()

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Outputs in the order asked for, () = all. Raises EngineFailure."""
        with self._turn:
            try:
                self._fit([inputs[name].shape for name, _ in self._in])
                for name, index in self._in:
                    self._interpreter.set_tensor(index, inputs[name])
                self._interpreter.invoke()
                # Without dimensions it would be a numpy scalar.
                return [np.asarray(self._interpreter.get_tensor(self._out[name])) for name in outputs or self._out]
            except (ValueError, RuntimeError, KeyError, AttributeError) as error:
                # A refused size leaves the interpreter between two: the next run sizes it anew.
                self._shapes = []
                raise EngineFailure(f"LiteRT: {_reason(error)}") from error

    def stop(self) -> bool:
        """LiteRT's Python interface offers no way to end a run."""
        return False

    def close(self) -> None:
        """Drop the interpreter; its memory goes with the last reference."""
        with self._turn:
            self._interpreter = None

    def _fit(self, shapes: list[tuple[int, ...]]) -> None:
        """Resize the inputs when this batch has another size than the last one: it costs as much as a small run."""
        if shapes == self._shapes:
            return
        for (_, index), shape in zip(self._in, shapes, strict=True):
            self._interpreter.resize_tensor_input(index, shape)
        self._interpreter.allocate_tensors()
        self._shapes = shapes


def _tensors(interpreter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name -> details of the inputs and of the outputs."""
    signatures = list(interpreter.get_signature_list())
    if len(signatures) == 1:
        runner = interpreter.get_signature_runner(signatures[0])
        return runner.get_input_details(), runner.get_output_details()
    sides = interpreter.get_input_details(), interpreter.get_output_details()
    inputs, outputs = ({clean_name(detail["name"]): detail for detail in side} for side in sides)
    return inputs, outputs


def clean_name(name: str) -> str:
    """A tensor's name without what converters add: `serving_default_x:0` is `x`."""
    return name.removeprefix("serving_default_").partition(":")[0]


def _spec(name: str, detail: Mapping[str, Any]) -> TensorSpec:
    try:
        datatype = datatype_of(np.dtype(detail["dtype"]))
    except InvalidRequest as error:
        raise ContractBreach(f"tensor '{name}': {error}") from error
    if datatype == "BYTES":
        raise ContractBreach(f"tensor '{name}' is text, which is not supported in LiteRT files")
    return TensorSpec(name, datatype, tuple(int(dim) for dim in detail["shape_signature"]))


def _reason(error: Exception, path: Path | None = None) -> str:
    """The engine's message on one line, without the machine's paths: it travels to the publisher."""
    text = " ".join(str(error).split())
    return (text.replace(str(path), path.name) if path else text)[:_MAX_REASON]
