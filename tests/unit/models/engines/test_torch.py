from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SCALE, SUM, write, write_export, write_torchscript

from models.contract import bind
from models.engines import EngineOptions, get_engine, torch_archive
from models.engines.torch import TorchEngine, TorchSession
from models.errors import ContractBreach, EngineFailure
from models.tensor import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
X = TensorSpec("x", "FP32", (-1, 4))
Y = TensorSpec("y", "FP32", (-1, 4))


def load(path: Path, inputs: tuple[TensorSpec, ...] = (), outputs: tuple[TensorSpec, ...] = ()) -> TorchSession:
    return TorchEngine().load(path, EngineOptions(inputs=inputs, outputs=outputs))


def scripted(folder: Path, source: str) -> Path:
    """A TorchScript file whose `forward` is `source`."""
    module = type("Scripted", (torch.jit.ScriptModule,), {})()  # PyTorch compiles one program for each class
    module.define(f"{source}\n")
    module.save(str(folder / "model.pt"))
    return folder / "model.pt"


def exported(folder: Path, function: Callable[..., Any], *arguments: Any, **options: Any) -> Path:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forward = function

    torch.export.save(torch.export.export(Module(), arguments, **options), folder / "model.pt2")
    return folder / "model.pt2"


def test_a_file_without_a_suffix_is_known_by_what_is_inside(tmp_path: Path) -> None:
    for form in ("torchscript", "export"):
        engine, path, options = write(form, SCALE, tmp_path / form)
        blob = path.rename(tmp_path / form / "0123abcd")
        assert get_engine(engine).load(blob, options).run(SCALE.example(), ())[0].shape == (3, 4)


def test_torchscript_without_a_manifest_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ContractBreach, match=r"states neither datatypes nor shapes: put a manifest\.json"):
        load(write_torchscript(SCALE, tmp_path))


def test_torchscript_takes_inputs_by_name_where_names_agree_and_else_in_order(tmp_path: Path) -> None:
    path = write_torchscript(SUM, tmp_path)
    a, b = np.full((1, 4), 5, np.float32), np.full((1, 4), 3, np.float32)
    by_name = load(path, tuple(reversed(SUM.inputs)), SUM.outputs)
    assert [spec.name for spec in by_name.inputs] == ["a", "b"]
    assert by_name.run({"a": a, "b": b}, ["difference"])[0][0, 0] == 2
    in_order = load(path, (TensorSpec("left", "FP32", (-1, 4)), TensorSpec("right", "FP32", (-1, 4))), SUM.outputs)
    assert in_order.run({"left": a, "right": b}, ["difference"])[0][0, 0] == 2


@pytest.mark.parametrize(
    ("source", "inputs", "reason"),
    [
        ("def forward(self, x: Tensor, y: Tensor): return x + y", (X,), "takes x, y; promised are 1 inputs"),
        ("def forward(self, x: List[int]): return torch.ones(x)", (X,), r"'x' is a List\[int\], only tensors"),
        ("def forward(self, x: Tensor): return x", (TensorSpec("x", "BYTES", (-1,)),), "BYTES, which PyTorch does not"),
    ],
)
def test_torchscript_that_does_not_take_what_is_promised_is_a_breach(
    tmp_path: Path, source: str, inputs: tuple[TensorSpec, ...], reason: str
) -> None:
    with pytest.raises(ContractBreach, match=reason):
        load(scripted(tmp_path, source), inputs, (Y,))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def forward(self, x: Tensor): return x, x", "answers 2 values, promised are the tensors y"),
        ("def forward(self, x: Tensor): return [1, 2]", "answers 2 values"),
        ("def forward(self, x: Tensor): return x.to(torch.int64)", "output 'y' is INT64, promised is FP32"),
        ("def forward(self, x: Tensor): return x.to(torch.bfloat16)", "output 'y' is torch.bfloat16, promised is FP32"),
        ("def forward(self, x: Tensor):\n    assert x.sum() > 1e9, 'too small'\n    return x", "too small"),
    ],
)
def test_an_answer_that_is_not_the_one_promised_is_an_engine_failure(tmp_path: Path, source: str, reason: str) -> None:
    session = load(scripted(tmp_path, source), (X,), (Y,))
    with pytest.raises(EngineFailure, match=reason) as caught:
        session.run(SCALE.example(), ())
    assert "\n" not in str(caught.value)


def test_a_program_that_writes_to_its_input_does_not_write_to_the_callers(tmp_path: Path) -> None:
    session = load(scripted(tmp_path, "def forward(self, x: Tensor): return x.mul_(2.0)"), (X,), (Y,))
    x = np.ones((1, 4), np.float32)
    (y,) = session.run({"x": x}, ())
    assert (x.tolist(), y.tolist()) == ([[1.0] * 4], [[2.0] * 4])


def test_a_program_that_answers_with_its_weights_does_not_give_them_away(tmp_path: Path) -> None:
    weights = torch.ones(1, 4)
    session = load(exported(tmp_path, lambda x: weights + x * 0, torch.ones(1, 4)))
    session.run({"x": np.ones((1, 4), np.float32)}, ())[0][:] = 7
    assert session.run({"x": np.ones((1, 4), np.float32)}, ())[0].tolist() == [[1.0] * 4]


def test_an_exported_program_states_its_own_names_and_sizes(tmp_path: Path) -> None:
    free = {0: torch.export.Dim("rows")}
    pair = load(exported(tmp_path, lambda x: (x + 1, x.sum(0)), torch.ones(2, 4), dynamic_shapes=(free,)))
    assert pair.inputs == (X,)
    assert pair.outputs == (TensorSpec("output_0", "FP32", (-1, 4)), TensorSpec("output_1", "FP32", (4,)))
    one = load(exported(tmp_path, lambda x: x + 1, torch.ones(2, 4)))
    assert one.outputs == (TensorSpec("output", "FP32", (2, 4)),)


def test_an_exported_program_answers_to_the_manifests_names(tmp_path: Path) -> None:
    path = exported(tmp_path, lambda x: (x + 1, x - 1), torch.ones(1, 4))
    outputs = tuple(TensorSpec(name, "FP32", (1, 4)) for name in ("more", "less"))
    session = bind(
        load(path, (TensorSpec("image", "FP32", (1, 4)),), outputs), [TensorSpec("image", "FP32", (1, 4))], outputs
    )
    less, more = session.run({"image": np.zeros((1, 4), np.float32)}, ["less", "more"])
    assert (less[0, 0], more[0, 0]) == (-1, 1)


def test_keyword_and_nested_inputs_of_an_export_are_tensors_by_name(tmp_path: Path) -> None:
    path = exported(
        tmp_path, lambda pair, *, scale: pair["a"] * scale, {"a": torch.ones(2)}, kwargs={"scale": torch.ones(2)}
    )
    session = load(path)
    assert [spec.name for spec in session.inputs] == ["pair_a", "scale"]
    two, three = np.full(2, 2, np.float32), np.full(2, 3, np.float32)
    assert session.run({"pair_a": two, "scale": three}, ())[0].tolist() == [6, 6]


@pytest.mark.parametrize(
    ("function", "argument", "reason"),
    [
        (lambda x: (x + 1, 3), torch.ones(2), "not a tensor"),
        (
            lambda x: x + 1,
            torch.ones(2, dtype=torch.bfloat16),
            "torch.bfloat16, which the Open Inference Protocol cannot",
        ),
    ],
)
def test_an_export_that_the_protocol_cannot_express_is_a_breach(
    tmp_path: Path, function: Any, argument: Any, reason: str
) -> None:
    with pytest.raises(ContractBreach, match=reason):
        load(exported(tmp_path, function, argument))


def test_symbolic_arithmetic_control_flow_and_guards_pass_the_screen(tmp_path: Path) -> None:
    def function(x: Any, y: Any) -> Any:
        rows = torch.cat([x, y]).reshape(-1, 2)[: (x.shape[0] + y.shape[0]) // 2]
        return torch.cond(x.sum() > 0, lambda z: z + 1, lambda z: z - 1, (rows,)), torch.zeros(max(x.shape[0], 3))

    rows = torch.export.Dim("n", min=4, max=1000), torch.export.Dim("m", min=2)
    shapes = ({0: rows[0]}, {0: rows[1]})
    session = load(exported(tmp_path, function, torch.ones(8, 4), torch.ones(6, 4), dynamic_shapes=shapes))
    picked, zeros = session.run({"x": np.ones((5, 4), np.float32), "y": np.ones((5, 4), np.float32)}, ())
    assert (picked.shape, picked[0, 0], zeros.shape) == ((5, 2), 2, (5,))


# --- what is inside an archive -------------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The archive at `path` with `change(entry, data)` applied to each entry, stored as PyTorch stores it."""
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return path


def graph_with(edit: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        tree = json.loads(data)
        edit(tree)
        return json.dumps(tree).encode()

    return change


def node(tree: Any) -> Any:
    return tree["graph_module"]["graph"]["nodes"][0]


def size(tree: Any) -> Any:
    return tree["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def pickled(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


HOSTILE = {
    "a function of the operating system": (
        lambda tree: node(tree).update(target="torch.os.system"),
        "'torch.os.system', which is no operator",
    ),
    "an operator that opens a file": (
        lambda tree: node(tree).update(target="torch.ops.aten.from_file.default"),
        "from_file.default', which is no operator",
    ),
    "Python's own callables": (
        lambda tree: node(tree).update(target="_operator.methodcaller"),
        "'_operator.methodcaller', which is no operator",
    ),
    "code in a size": (
        lambda tree: size(tree).update(expr_str="__import__('os').system('true')"),
        "which is not arithmetic",
    ),
    "code in a symbol": (
        lambda tree: size(tree).update(expr_str="Symbol('s0', positive=open('x'))"),
        "which is not arithmetic",
    ),
    "code in a guard": (
        lambda tree: tree.update(guards_code=["L['x'].size()[0] > exit(3)"]),
        "which is not arithmetic",
    ),
    "a guard that is no list": (lambda tree: tree.update(guards_code={"a": "b"}), "which is not arithmetic"),
    "code in a name": (lambda tree: node(tree).update(name="x): pass\nimport os"), "which is no name"),
    "a custom object": (
        lambda tree: tree["graph_module"]["graph"].update(custom_obj_values={"a": {}}),
        "custom object",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_export_that_does_more_than_compute_is_refused_before_torch_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    edit, reason = HOSTILE[kind]
    path = rewritten(write_export(SCALE, tmp_path), graph_with(edit))
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch has seen it"))
    with pytest.raises(ContractBreach, match=reason):
        load(path)


@pytest.mark.parametrize("place", ["data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt"])
def test_nothing_in_an_export_is_unpickled_beyond_plain_tensors(tmp_path: Path, place: str) -> None:
    mark = tmp_path / "unpickled"
    path = write_export(SCALE, tmp_path / "m")
    folder = root(path)
    data = pickled(Payload(mark))
    rewritten(path, lambda name, old: data if name == f"{folder}/{place}" else old)
    if f"{folder}/{place}" not in zipfile.ZipFile(path).namelist():
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{folder}/{place}", data)
    with pytest.raises(ContractBreach, match="plain tensors"):
        load(path)
    assert not mark.exists()


def test_a_weight_that_asks_for_the_unpickler_is_refused(tmp_path: Path) -> None:
    def ask(name: str, data: bytes) -> bytes:
        return b'{"config": {"w": {"use_pickle": true}}}' if name.endswith("model_weights_config.json") else data

    with pytest.raises(ContractBreach, match="names a pickled tensor"):
        load(rewritten(write_export(SCALE, tmp_path), ask))


def test_a_graph_that_is_too_large_to_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_archive, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(ContractBreach, match="at most 1000 are accepted"):
        load(write_export(SCALE, tmp_path))


def test_an_archive_cannot_claim_more_than_the_file_has(tmp_path: Path) -> None:
    path = write_export(SCALE, tmp_path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{root(path)}/extra/bomb", b"0" * (1 << 20))
    with pytest.raises(ContractBreach, match="unpacks to more bytes than it has"):
        load(path)


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    path = write_export(SCALE, tmp_path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{root(path)}/extra/notes", b"0" * 100)
    with pytest.raises(ContractBreach, match="'extra/notes' is compressed"):
        load(path)


# --- what one reader of zip files sees and another does not --------------------------------------------------------------


def root(path: Path) -> str:
    return zipfile.ZipFile(path).namelist()[0].partition("/")[0]


def renamed(path: Path, rename: Callable[[str], str], more: dict[str, bytes] | None = None) -> Path:
    """The archive at `path` with other names, and more entries."""
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name given twice
        for name in source.namelist():
            target.writestr(rename(name), source.read(name))
        for name, data in (more or {}).items():
            target.writestr(name, data)
    return path


@pytest.mark.parametrize("suffix", [".JSON", ".Json", ".jsoN"])
def test_a_graph_in_other_letters_is_not_passed_by(tmp_path: Path, suffix: str) -> None:
    mark = tmp_path / "ran"
    code = f"__import__('pathlib').Path('{mark}').touch() or Symbol('s77')"
    path = rewritten(write_export(SCALE, tmp_path / "m"), graph_with(lambda tree: size(tree).update(expr_str=code)))
    renamed(path, lambda name: name.replace("models/model.json", f"models/model{suffix}"))
    with pytest.raises(ContractBreach, match="does not belong into"):
        load(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("{root}/data/Sample_Inputs/model.pt", "is pickled"),
        ("{root}/data/sample_inputs/MODEL.PT", "is pickled"),
        ("{root}/data/sample_inputs/model.pt", "twice"),
        ("{root}/models/model.json", "twice"),
        ("{root}/models/Model.json", "does not belong"),
        ("{root}/models/other.json", "does not belong"),
        ("{root}/models/model.txt", "does not belong"),
        ("{root}/models/", "does not belong"),
        ("{root}\\models\\model.json", "does not belong"),
        ("{root}/../models/model.json", "does not belong"),
        ("{root}/models/./model.json", "does not belong"),
        ("other/models/model.json", "does not belong"),
        ("models/model.json", "does not belong"),
        ("/models/model.json", "does not belong"),
        ("version", "does not belong"),
        ("{root}/data/aotinductor/model/model.so", "does not belong"),
        ("{root}/data/constants/opaque_obj_0", "does not belong"),
        ("{root}/data/constants/custom_obj_0", "does not belong"),
        ("{root}/data/weights/weight_\u0660", "does not belong"),
    ],
)
def test_a_record_that_export_does_not_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, reason: str
) -> None:
    path = write_export(SCALE, tmp_path)
    renamed(path, lambda name: name, {more.format(root=root(path)): b"{}"})
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch has seen it"))
    with pytest.raises(ContractBreach, match=reason):
        load(path)


def test_an_entry_whose_two_headers_differ_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_export(SCALE, tmp_path)
    data = path.read_bytes()
    at = data.index(b"models/model.json")  # the first is that of the entry itself
    path.write_bytes(data[:at] + b"models/MODEL.json" + data[at + 17 :])
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch has seen it"))
    with pytest.raises(ContractBreach):
        load(path)


def test_what_is_no_plain_tensor_is_not_unpickled_as_a_constant(tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    path = write_export(SCALE, tmp_path / "m")
    meta = {
        "dtype": 1, "sizes": [{"as_int": 1}], "requires_grad": False, "device": {"type": "cpu", "index": None},
        "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}, "layout": 7,
    }  # fmt: skip
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": meta}
    config = json.dumps({"config": {"c": entry}}).encode()
    rewritten(path, lambda name, data: config if name.endswith("model_constants_config.json") else data)
    with pytest.raises(ContractBreach, match="names 'opaque_obj_0', which is no plain tensor"):
        load(path)
    renamed(path, lambda name: name, {f"{root(path)}/data/constants/opaque_obj_0": pickle.dumps(Payload(mark))})
    with pytest.raises(ContractBreach, match="does not belong into"):
        load(path)
    assert not mark.exists()


def test_the_older_format_is_not_fallen_back_to(tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    path = write_export(SCALE, tmp_path / "m")
    older = {
        "version": b"8.9",
        "serialized_exported_program.json": b"{}",
        "serialized_state_dict.pt": pickled(Payload(mark)),
        "serialized_constants.pt": pickled(Payload(mark)),
        "serialized_example_inputs.pt": pickled(Payload(mark)),
    }
    renamed(path, lambda name: name.replace("archive_version", "no_version"), older)
    with pytest.raises(ContractBreach):
        load(path)
    assert not mark.exists()


def test_a_file_that_changes_after_the_screen_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_export(SCALE, tmp_path)
    load_program = torch.export.load

    def load_late(archive: Any) -> Any:
        path.write_bytes(b"something else")
        return load_program(archive)

    monkeypatch.setattr(torch.export, "load", load_late)
    assert load(path).run(SCALE.example(), ())[0].shape == (3, 4)


def test_weights_and_constants_survive_the_screen_bit_by_bit(tmp_path: Path) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)
            self.offset = torch.arange(3.0)

        def forward(self, x: Any) -> Any:
            return self.linear(x) + self.offset

    module, x = Module(), torch.ones(1, 4)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "model.pt2")
    got = load(tmp_path / "model.pt2").run({"x": x.numpy()}, ())[0]
    np.testing.assert_array_equal(got, module(x).detach().numpy())


@pytest.mark.parametrize("damage", [b"garbage", b"", b"PK\x03\x04 and no more"])
def test_a_damaged_file_is_a_breach_without_machine_paths(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(damage)
    with pytest.raises(ContractBreach, match="not a PyTorch archive") as caught:
        load(path)
    assert str(tmp_path) not in str(caught.value)


def test_an_archive_cut_short_inside_is_a_breach(tmp_path: Path) -> None:
    for path in (write_export(SCALE, tmp_path / "e"), write_torchscript(SCALE, tmp_path / "s")):
        rewritten(path, lambda name, data: data[: len(data) // 2])
        with pytest.raises(ContractBreach):
            load(path, SCALE.inputs, SCALE.outputs)


def test_weights_alone_are_no_program(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(3)}, path)
    with pytest.raises(ContractBreach, match="no program, only data"):
        load(path)


def test_threads_are_those_asked_for(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        TorchEngine().load(write_export(SCALE, tmp_path), EngineOptions(threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
