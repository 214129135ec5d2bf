"""ONNX's own backend test cases through a running server: `python tests/proofs/backend.py` prints the share that passes.

Every case of the installed `onnx` package is put into the server's repository, loaded through tritonclient, asked with the
stored inputs, compared with the stored outputs within the case's own tolerances, and unloaded. The share is of those cases that
onnxruntime passes in this process and the protocol can express: tensors of its datatypes, no sequences or optional values.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx
import onnxruntime
import tritonclient.grpc
import tritonclient.http
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner
from onnx_writer import identity_model
from proofs.server import serving
from tritonclient.utils import np_to_triton_dtype

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")
LIGHT = "onnx/backend/test/data/light/"
CARRIED = {
    f"tensor({name})"
    for name in [
        "bool",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "int8",
        "int16",
        "int32",
        "int64",
        "float16",
        "float",
        "double",
        "string",
    ]
}
"""onnxruntime's types that the protocol has a datatype for."""
GRPC_SHARE = 0.3
PROBED_SHARE = 0.05
"""Loaded by a server that tries files in a child first, which takes most of a second each."""
TARGET = 0.99

Arrays = list[np.ndarray[Any, Any]]


@dataclass
class Case:
    """One model and its data: pairs of inputs and outputs in the order of the model's."""

    kind: str
    name: str
    model: onnx.ModelProto
    data: list[tuple[Arrays, Arrays]]
    rtol: float
    atol: float
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


class Unsupported(Exception):
    """The case has something that is no tensor."""


def cases() -> Iterator[Case | tuple[str, str, str]]:
    """Every case of the package; instead of one that cannot be read: kind, name, why."""
    for kind in KINDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some cases are about dividing by zero
            tests = load_model_tests(kind="real" if kind == "light" else kind)
        for test in sorted(tests, key=lambda each: each.name):
            if kind == "light" and not (test.url or "").startswith(LIGHT):
                continue  # its weights would have to be downloaded
            try:
                model, data = _read(test, kind)
            except Unsupported as error:
                yield kind, test.name, str(error)
                continue
            yield Case(kind, test.name, model, data, test.rtol, test.atol)


def _read(test: Any, kind: str) -> tuple[onnx.ModelProto, list[tuple[Arrays, Arrays]]]:
    if kind == "light":
        path = Path(onnx.__file__).parent.parent / test.url
        model = onnx.load(path)
        weights = {each.name for each in model.graph.initializer}
        given = [Runner.generate_dummy_data(each) for each in model.graph.input if each.name not in weights]
        wanted = [
            _tensor(path.with_name(f"{path.stem}_output_{index}.pb"), each)
            for index, each in enumerate(model.graph.output)
        ]
        return model, [(given, wanted)]
    if test.model_dir is None:
        return test.model, [
            ([_array(x) for x in given], [_array(y) for y in wanted]) for given, wanted in test.data_sets
        ]
    folder = Path(test.model_dir)
    model = onnx.load(folder / "model.onnx")
    data = []
    for place in sorted(folder.glob("test_data_set*")):
        sides: list[Arrays] = []
        for side, values in (("input", model.graph.input), ("output", model.graph.output)):
            count = len(list(place.glob(f"{side}_*.pb")))
            sides.append([_tensor(place / f"{side}_{index}.pb", values[index]) for index in range(count)])
        data.append((sides[0], sides[1]))
    return model, data


def _tensor(path: Path, value: onnx.ValueInfoProto) -> np.ndarray[Any, Any]:
    if not value.type.HasField("tensor_type"):
        raise Unsupported(f"'{value.name}' is no tensor")
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def _array(value: object) -> np.ndarray[Any, Any]:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    raise Unsupported(f"a value is a {type(value).__name__}")


def why_not(case: Case) -> str | None:
    """Why a case does not count; None = onnxruntime passes it here and the protocol can express it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(
            case.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no base
        return f"onnxruntime does not load it: {type(error).__name__}"
    case.inputs = [node.name for node in session.get_inputs()]
    case.outputs = [node.name for node in session.get_outputs()]
    for node in (*session.get_inputs(), *session.get_outputs()):
        if node.type not in CARRIED:
            return f"the protocol has no {node.type}"
    for given, wanted in case.data:
        try:
            found = session.run(None, dict(zip(case.inputs, given, strict=True)))
        except Exception as error:  # noqa: BLE001
            return f"onnxruntime does not run it: {type(error).__name__}"
        problem = difference(case, wanted, found)
        if problem is not None:
            return "onnxruntime gives other outputs"
    return None


def difference(case: Case, wanted: Sequence[np.ndarray[Any, Any]], found: Sequence[Any]) -> str | None:
    """What the backend test itself would object to."""
    try:
        Runner.assert_similar_outputs(wanted, found, case.rtol, case.atol)
    except (AssertionError, TypeError) as error:
        return " ".join(str(error).split())[:300]
    return None


def ask(module: Any, client: Any, case: Case, given: Arrays) -> Arrays:
    """`module`: tritonclient.http or tritonclient.grpc."""
    inputs = []
    for name, array in zip(case.inputs, given, strict=True):
        tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    answer = client.infer(case.name, inputs)
    return [_received(answer, name) for name in case.outputs]


def _received(answer: Any, name: str) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = answer.as_numpy(name)
    told = answer.get_output(name)
    datatype = told["datatype"] if isinstance(told, dict) else told.datatype
    if datatype == "BYTES":
        texts = [each.decode() if isinstance(each, bytes) else each for each in array.flat]
        made = np.empty(len(texts), np.object_)
        made[:] = texts
        return made.reshape(array.shape)
    if array.size == 0:  # the client makes these of its own default type: what the server said is compared
        return np.empty(array.shape, onnx_dtype(datatype))
    return array


def onnx_dtype(datatype: str) -> Any:
    from models.tensor import DTYPES

    return DTYPES[datatype]


class Clients:
    """Both of tritonclient's clients of one server."""

    def __init__(self, http: str, grpc: str) -> None:
        self.http = tritonclient.http.InferenceServerClient(http, connection_timeout=60, network_timeout=60)
        self.grpc = tritonclient.grpc.InferenceServerClient(grpc)

    def close(self) -> None:
        self.http.close()
        self.grpc.close()


def prove(case: Case, folder: Path, clients: Clients, *, grpc: bool) -> str | None:
    """Publish, load, infer, compare, unload. Returns what went wrong."""
    place = folder / case.name / "1"
    place.mkdir(parents=True)
    (place / "model.onnx").write_bytes(case.model.SerializeToString())
    module, client = (tritonclient.grpc, clients.grpc) if grpc else (tritonclient.http, clients.http)
    step = "load"
    try:
        client.load_model(case.name)
        for given, wanted in case.data:
            step = "infer"
            found = ask(module, client, case, given)
            step = "compare"
            problem = difference(case, wanted, found)
            if problem is not None:
                return f"compare: {problem}"
        step = "unload"
        client.unload_model(case.name)
    except Exception as error:  # noqa: BLE001 - counted and told
        return f"{step}: {' '.join(str(error).split())[:300]}"
    finally:
        shutil.rmtree(folder / case.name)
    return None


def run(seed: int, limit: int | None, seconds: float, only: str) -> dict[str, Any]:
    rng = random.Random(seed)
    start = time.monotonic()
    left_out: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    eligible: list[Case] = []
    for case in cases():
        if not isinstance(case, Case):
            left_out[f"{case[0]}: {case[2].partition(':')[0]}"] += 1
            continue
        if only not in case.name:
            continue
        reason = why_not(case)
        if reason is None:
            eligible.append(case)
        else:
            left_out[reason] += 1
    referred = time.monotonic() - start
    if limit is not None:
        eligible = rng.sample(eligible, min(limit, len(eligible)))
    asked: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / name for name in ("probed", "trusted")]
        for folder in folders:
            identity_model(folder / "identity" / "1" / "model.onnx")
        verdicts = ("--verdicts", str(Path(place) / "verdicts"))
        with serving(folders[0], *verdicts) as probed, serving(folders[1], "--no-probe") as trusted:
            clients = [Clients(each.addresses["http"], each.addresses["grpc"]) for each in (probed, trusted)]
            for case in eligible:
                which = 0 if rng.random() < PROBED_SHARE else 1
                grpc = rng.random() < GRPC_SHARE
                asked["gRPC" if grpc else "HTTP"] += 1
                asked["probed"] += which == 0
                if time.monotonic() - start > seconds:
                    problem: str | None = "not run: the time was over"
                else:
                    problem = prove(case, folders[which], clients[which], grpc=grpc)
                counted[case.kind] += 1
                if problem is not None:
                    over = "gRPC" if grpc else "HTTP"
                    failures.append({"kind": case.kind, "case": case.name, "over": over, "problem": problem})
            for each in clients:
                each.close()
            complaints = probed.complaints() + trusted.complaints()
            alive = probed.is_alive() and trusted.is_alive()
    passed = len(eligible) - len(failures)
    return {
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "reference_seconds": round(referred, 1),
        "load_average": os.getloadavg()[0],
        "left_out": dict(left_out.most_common()),
        "cases": dict(counted),
        "asked": dict(asked),
        "eligible": len(eligible),
        "passed": passed,
        "share": round(passed / max(len(eligible), 1), 5),
        "server_alive": alive,
        "complaints": complaints[:20],
        "failures": failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="of the cases that count, this many")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--seconds", type=float, default=600.0, help="give up on cases that come later")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    result = run(arguments.seed, arguments.limit, arguments.seconds, arguments.only)
    text = json.dumps(result, indent=1)
    if arguments.json is not None:
        arguments.json.write_text(text)
    print(text)
    print(f"{result['passed']} of {result['eligible']} cases pass: {result['share']:.2%} (target {TARGET:.0%})")
    return 0 if result["server_alive"] and result["share"] >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
