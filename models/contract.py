"""Whether a file does what its manifest promises: its interface, and its answers to the golden inputs."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.engines import Session
from models.errors import ContractBreach, EngineFailure, InvalidRequest
from models.manifest import Manifest
from models.tensor import DTYPES, Array, TensorSpec, check_tensor, shape_allows

MAX_GOLDEN_BYTES = 256 << 20
"""Unpacked size of the golden arrays (256 MiB): a .npz is a zip, and a few kilobytes of zip can claim terabytes."""

_ROUNDING = 1e-3
"""How far a share may lie outside 0..1: half-precision softmax rounds by this much."""


@dataclass(frozen=True)
class Golden:
    """Inputs with the outputs that the publisher got for them; name -> array."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


def load_golden(path: Path, manifest: Manifest) -> Golden:
    """Read the golden arrays `in.<input>` and `out.<output>`. Raises ContractBreach naming the array."""
    try:
        found = _read_arrays(path)
    except ContractBreach:
        raise
    except Exception as error:
        # zipfile, zlib, lzma and numpy each raise their own kinds for a damaged file, and share no base.
        raise ContractBreach(f"golden file cannot be read: {error}") from error
    golden = Golden(_part(found, "in.", manifest.inputs), _part(found, "out.", manifest.outputs))
    for spec in manifest.inputs:
        try:
            check_tensor(spec, golden.inputs[spec.name])
        except InvalidRequest as error:
            raise ContractBreach(f"golden {error}") from error
    return golden


def _read_arrays(path: Path) -> dict[str, Array]:
    with zipfile.ZipFile(path) as archive:
        claimed = sum(member.file_size for member in archive.infolist())
    if claimed > MAX_GOLDEN_BYTES:
        raise ContractBreach(f"golden arrays unpack to {claimed} bytes, at most {MAX_GOLDEN_BYTES} are accepted")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: _as_tensor(arrays[name]) for name in arrays.files}


def _as_tensor(array: Array) -> Array:
    """A .npz without pickles keeps text in fixed width: back to the object array that a BYTES tensor is."""
    if array.dtype.kind not in "SU":
        return array
    items = [item.encode() if isinstance(item, str) else bytes(item) for item in array.flat]
    return np.array(items, dtype=np.object_).reshape(array.shape)


def _part(found: Mapping[str, Array], prefix: str, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    part = {name.removeprefix(prefix): array for name, array in found.items() if name.startswith(prefix)}
    if set(part) != {spec.name for spec in specs}:
        names = ", ".join(sorted(part)) or "none"
        raise ContractBreach(f"golden '{prefix}*' arrays are {names}; the manifest says {_names(specs)}")
    return part


def bind(session: Session, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Session:
    """`session` under the manifest's names. Raises ContractBreach when its interface is not the one promised.

    Tensors match by name. Converters mangle names, so when exactly one tensor of a side is left over in both the file and
    the manifest, these two are the same one. Input shapes must agree, save that a size may be promised where the file
    takes any; output shapes are left to the golden run, because files often do not state them.
    """
    to_engine = _match("input", session.inputs, inputs)
    from_engine = _match("output", session.outputs, outputs)
    for spec in inputs:
        theirs = to_engine[spec.name]
        fits = len(spec.shape) == len(theirs.shape) and shape_allows(theirs.shape, spec.shape)
        if not fits:
            raise ContractBreach(
                f"input '{spec.name}': the file takes {list(theirs.shape)}, promised is {list(spec.shape)}"
            )
    if all(name == theirs.name for name, theirs in (to_engine | from_engine).items()):
        return session
    return _Renamed(session, inputs, outputs, to_engine, from_engine)


def _match(side: str, theirs: Iterable[TensorSpec], ours: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    by_name = {spec.name: spec for spec in theirs}
    matched = {spec.name: by_name.pop(spec.name) for spec in ours if spec.name in by_name}
    missing = [spec.name for spec in ours if spec.name not in matched]
    if len(missing) == 1 and len(by_name) == 1:
        matched[missing[0]] = by_name.popitem()[1]
    elif missing or by_name:
        have = ", ".join([*matched, *by_name])
        raise ContractBreach(f"the file's {side}s are {have}; promised are {_names(ours)}")
    for spec in ours:
        if matched[spec.name].datatype != spec.datatype:
            actual = matched[spec.name].datatype
            raise ContractBreach(f"{side} '{spec.name}': the file has {actual}, promised is {spec.datatype}")
    return matched


class _Renamed:
    """A session whose tensors answer to the manifest's names."""

    def __init__(
        self,
        session: Session,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        to_engine: Mapping[str, TensorSpec],
        from_engine: Mapping[str, TensorSpec],
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.serial = session.serial
        self._session = session
        self._in = {name: spec.name for name, spec in to_engine.items()}
        self._out = {name: spec.name for name, spec in from_engine.items()}
        self._all = [self._out[spec.name] for spec in outputs]

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        renamed = {self._in[name]: array for name, array in inputs.items()}
        return self._session.run(renamed, [self._out[name] for name in outputs] or self._all)

    def stop(self) -> bool:
        return self._session.stop()

    def close(self) -> None:
        self._session.close()


def check_golden(session: Session, manifest: Manifest, golden: Golden, tolerance: float) -> None:
    """Run the golden inputs and compare. `tolerance`: largest absolute difference. Raises ContractBreach naming the output.

    The output that confidence is read from must hold what `Confidence` promises there: shares in 0..1.
    """
    names = [spec.name for spec in manifest.outputs]
    try:
        answers = session.run(golden.inputs, names)
    except (EngineFailure, InvalidRequest) as error:
        raise ContractBreach(f"the golden inputs fail: {error}") from error
    for spec, answer in zip(manifest.outputs, answers, strict=True):
        _compare(spec, answer, golden.outputs[spec.name], tolerance)
        if manifest.confidence is not None and manifest.confidence.output == spec.name:
            _check_shares(spec, answer, tolerance)


def _compare(spec: TensorSpec, answer: Array, expected: Array, tolerance: float) -> None:
    where = f"output '{spec.name}'"
    if answer.dtype != DTYPES[spec.datatype] or not shape_allows(spec.shape, answer.shape):
        raise ContractBreach(
            f"{where}: got {answer.dtype} {list(answer.shape)}, promised is {spec.datatype} {list(spec.shape)}"
        )
    if answer.shape != expected.shape:
        raise ContractBreach(f"{where}: got shape {list(answer.shape)}, golden is {list(expected.shape)}")
    if answer.dtype == np.object_:
        if not np.array_equal(answer, expected):
            raise ContractBreach(f"{where}: differs from the golden output")
        return
    if not is_finite(answer):
        raise ContractBreach(f"{where}: not finite on the golden inputs")
    # As FP64: a difference of unsigned integers would wrap.
    worst = float(np.abs(answer.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))
    if not worst <= tolerance:
        raise ContractBreach(f"{where}: differs from the golden output by {worst:.3g}, allowed is {tolerance:.3g}")


def _check_shares(spec: TensorSpec, answer: Array, tolerance: float) -> None:
    """Scores beyond 0..1 (logits, say) would be cut to full confidence: no answer would ever be asked for again above."""
    slack = tolerance + _ROUNDING
    low, high = float(answer.min(initial=0.0)), float(answer.max(initial=0.0))
    if low < -slack or high > 1 + slack:
        raise ContractBreach(
            f"output '{spec.name}': confidence is read from it, but it holds {low:.3g} to {high:.3g}, not 0 to 1"
        )


def is_finite(array: Array) -> bool:
    """Whether no element is NaN or infinite; true for every type that has no such values."""
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)
