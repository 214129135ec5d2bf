"""ONNX files through onnxruntime's CPU provider. The only importer of onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from models.engines import EngineOptions
from models.errors import ContractBreach, EngineFailure, InvalidRequest
from models.tensor import Array, TensorSpec

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_LOG_FATAL = 4
"""onnxruntime's own log level: what goes wrong arrives as an exception, printing it again only fills the log."""
_MAX_REASON = 500
"""Characters of an engine's message that are kept: it may quote whole tensors."""


class OnnxEngine:
    """`Engine` for `.onnx` files."""

    def load(self, path: Path, options: EngineOptions) -> OnnxSession:
        """Load from a path, never from bytes: a large file then does not stall other threads. Raises ContractBreach."""
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = _LOG_FATAL
        # A spinning worker burns a core of the gateway between requests.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:
            # onnxruntime's exceptions share no base of their own.
            raise ContractBreach(f"onnxruntime refuses the file: {_reason(error, path)}") from error
        return OnnxSession(session)


class OnnxSession:
    """`Session` on onnxruntime, whose `run` is safe to call from several threads.

    `inputs`, `outputs`: symbolic dimensions are -1; onnxruntime tells an unknown rank as no dimensions at all. Output arrays
    belong to the caller.
    """

    serial = False

    def __init__(self, session: Any) -> None:
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self._names = [spec.name for spec in self.outputs]
        self._count = len(self.inputs)
        self._text_inputs = tuple(spec.name for spec in self.inputs if spec.datatype == "BYTES")
        self._plain = not self._text_inputs and all(spec.datatype != "BYTES" for spec in self.outputs)
        # The session beneath the public one: a fifth of a tiny model's run is the wrapper's work. Private, hence the fallback.
        self._run: Any = getattr(getattr(session, "_sess", None), "run", session.run)
        # Of all runs until one is stopped: onnxruntime makes its own, which costs more, when it is given none.
        self._flags = onnxruntime.RunOptions()

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Outputs in the order asked for, () = all.

        Raises EngineFailure; InvalidRequest, naming the input, for a text element that is not one or not UTF-8.
        """
        # Beneath the wrapper nobody else counts: a kernel would read an input that is not there.
        if len(inputs) != self._count:
            raise EngineFailure(f"onnxruntime: {len(inputs)} inputs given, the model takes {self._count}")
        if not self._plain:
            inputs = self._decoded(inputs)
        flags = self._flags
        try:
            answers: list[Array] = self._run(outputs or self._names, inputs, flags)
        except Exception as error:
            if flags.terminate:
                raise EngineFailure("onnxruntime: the run was stopped") from error
            first_line = str(error).strip().partition("\n")[0]
            raise EngineFailure(f"onnxruntime: {first_line[:_MAX_REASON]}") from error
        return answers if self._plain else [_encoded(answer) for answer in answers]

    def stop(self) -> bool:
        """Every run under way ends before its next node (also inside a loop's body); one node alone is never cut short."""
        flags, self._flags = self._flags, onnxruntime.RunOptions()
        flags.terminate = True
        return True

    def close(self) -> None:
        """Drop the native session; its memory goes with the last reference."""
        self._run = _closed

    def _decoded(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Text inputs as the `str` objects that onnxruntime takes."""
        decoded = dict(inputs)
        for name in self._text_inputs:
            array = inputs[name]
            text = [_text(name, index, item) for index, item in enumerate(array.flat)]
            decoded[name] = np.array(text, dtype=np.object_).reshape(array.shape)
        return decoded


def _closed(*_: object) -> list[Array]:
    raise RuntimeError("the session is closed")


def _text(name: str, index: int, item: object) -> str:
    """One element of a text input. `bytes` of any other type would be its buffer, or as many zeros as an int says."""
    try:
        if isinstance(item, str):
            item.encode()  # a lone surrogate has no UTF-8
            return item
        if isinstance(item, (bytes, bytearray, memoryview)):
            return bytes(item).decode()
    except UnicodeError as error:
        raise InvalidRequest(f"input '{name}': this model takes text, element {index} is not UTF-8") from error
    raise InvalidRequest(f"input '{name}': element {index} is a {type(item).__name__}, expected bytes or text")


def _encoded(answer: Array) -> Array:
    """A text output as the `bytes` objects that BYTES tensors are made of; any other output as it is."""
    if answer.dtype != np.object_:
        return answer
    return np.array([item.encode() for item in answer.flat], dtype=np.object_).reshape(answer.shape)


def _spec(node: Any) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise ContractBreach(f"'{node.name}' is a {node.type}, which the Open Inference Protocol cannot carry")
    return TensorSpec(
        node.name, datatype, tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
    )


def _reason(error: Exception, path: Path | None = None) -> str:
    """The engine's message on one line, without the machine's paths: it travels to the publisher."""
    text = " ".join(str(error).split())
    return (text.replace(str(path), path.name) if path else text)[:_MAX_REASON]
