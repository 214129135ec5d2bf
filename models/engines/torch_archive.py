"""What is inside a PyTorch file, read without torch and before torch sees it.

Both kinds are zip files, told apart by their entries: the store names files by digest, without a suffix. A torch.export
program is a program in more ways than its graph: loading it may unpickle objects, look names up in the whole of `torch` and
evaluate the text of symbolic sizes. What `torch.export.save` writes for tensors and operators needs none of that, so anything
else is refused here. The ways known are those of PyTorch 2.13. TorchScript is refused
nothing: its code can read and write files through PyTorch's own operators.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import msgspec

from models.errors import ContractBreach

MAX_GRAPH_BYTES = 64 << 20
"""Largest JSON entry that is read (64 MiB): a zip of a few kilobytes can claim terabytes."""
MAX_ENTRIES = 100_000
"""Most entries of one archive; a large model has a few thousand, one for each weight."""

_ROOT = "model"
_SAMPLES = "data/sample_inputs/model.pt"
_NEEDED = frozenset(
    {
        "archive_format",
        "archive_version",
        ".data/version",
        "models/model.json",
        "data/weights/model_weights_config.json",
        "data/constants/model_constants_config.json",
        _SAMPLES,
    }
)
# Data of a program's own that PyTorch need not see, beside what it takes notes in.
_LEFT_OUT = re.compile(r"extra/.*|byteorder|\.data/(?!version\Z).*", re.DOTALL)
# A name beyond these may be compiled code, or an object to be unpickled.
_RECORD = re.compile(
    rf"{'|'.join(map(re.escape, sorted(_NEEDED)))}|{_LEFT_OUT.pattern}"
    r"|data/(weights/weight|constants/tensor)_[0-9]{1,9}",
    re.DOTALL,
)
_PAYLOAD = re.compile(r"(weight|tensor)_[0-9]{1,9}")

_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|quantized|quantized_decomposed)\.\w+\.[A-Za-z]\w*|torch\.sym_\w+|math\.[a-z]\w*"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|associative_scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast)"
)
# Operators that open a file by a name which the graph gives.
_FILES = re.compile(r"torch\.ops\.aten\.(from_file|save)\.\w+")
# Names become Python source, which torch executes: letters, digits, dots.
_NAME = re.compile(r"[\w.]{0,500}")
_NAMED = frozenset({"name", "parameter_name", "buffer_name", "tensor_constant_name", "fqn"})
_ARITHMETIC = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|getitem|lt|le|gt|ge|eq|ne|and_|or_|not_|is_|is_not)"
)
# sympy's own text of a size: numbers, symbols, arithmetic and PyTorch's integer functions. No dot, quote only around a symbol.
_SYMBOL = re.compile(r"Symbol\('\w{1,32}'((, (positive|integer|nonnegative)=True)*)\)")
# A guard, which is Python that torch executes, asks an input for its sizes: L['x'].size()[0].
_ASKED = re.compile(r"L(\['?\w{1,100}'?\]){1,9}(\.(size|stride)\(\)\[\d{1,2}\]|\.storage_offset\(\)|\.ndimension\(\))?")
_SIZE = re.compile(r"[\w ,()+\-*/<>=%&|~!]*")
_WORD = re.compile(r"[A-Za-z_]\w*")
_SIZE_WORD = re.compile(
    "Symbol|positive|integer|nonnegative|Integer|Rational|Float|Mul|Add|Pow|Max|Min|Mod|PythonMod|CleanDiv|FloorDiv|CeilDiv"
    "|ModularIndexing|Where|IntTrueDiv|FloatTrueDiv|ToFloat|TruncToInt|CeilToInt|FloorToInt|RoundToInt|FloatPow|PowByNatural"
    "|Identity|Piecewise|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|(Strict)?LessThan|(Strict)?GreaterThan|Equality|Unequality"
    r"|True|False|true|false|oo|int_oo|and|or|not|[suz]f?\d{1,9}|zuf\d{1,9}"
)


class Screened(NamedTuple):
    """What may be loaded. `archive`: written here, of screened records alone; `samples`: the pickled sample inputs in it."""

    archive: io.BytesIO
    samples: bytes


def is_exported(file: BinaryIO) -> bool:
    """True for a torch.export program, False for TorchScript. Raises ContractBreach for anything else."""
    with _opened(file) as archive:
        entries = {entry.partition("/")[2] for entry in archive.namelist()}
    if "archive_format" in entries:
        return True
    if "constants.pkl" in entries and any(entry.startswith("code/") for entry in entries):
        return False
    if any(entry.startswith("serialized_") for entry in entries):
        raise ContractBreach("the torch.export program is in the format of PyTorch before 2.8: export it again")
    raise ContractBreach("the file is neither TorchScript nor a torch.export program: it has no program, only data")


def screened(file: BinaryIO) -> Screened:
    """A torch.export program without anything that could run more than its operators.

    Raises ContractBreach, naming what. Two readers of one zip file need not see the same: PyTorch's finds entries in any
    case, and names, duplicates and headers can be made to tell each something else. So the program is copied into a new
    archive, of the records that export writes and none besides, and only that is shown to PyTorch. Costs the file's size
    in memory, until it is loaded; what happens to the file meanwhile does not matter.
    """
    copy = io.BytesIO()
    samples = b""
    with _opened(file) as archive, zipfile.ZipFile(copy, "w") as kept:
        infos = _records(archive, file.seek(0, io.SEEK_END))
        missing = sorted(_NEEDED - infos.keys())
        if missing:
            raise ContractBreach(f"the torch.export program has no '{missing[0]}'")
        for place, info in infos.items():
            if _LEFT_OUT.fullmatch(place):
                continue
            bounded = place.endswith((".json", ".pt"))
            if bounded and info.file_size > MAX_GRAPH_BYTES:
                raise ContractBreach(f"'{place}' has {info.file_size} bytes, at most {MAX_GRAPH_BYTES} are accepted")
            data = archive.read(info)
            if place.endswith(".json"):
                _screen_json(place, data)
            elif place == _SAMPLES:
                samples = data
            kept.writestr(f"{_ROOT}/{place}", data)
    copy.seek(0)
    return Screened(copy, samples)


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by their place below the one folder that holds them all, each one that export writes."""
    infos = archive.infolist()
    # Stored as they are, in all no more than the file: an entry can claim any size, or the bytes of others.
    if sum(info.file_size for info in infos) > size:
        raise ContractBreach("the archive unpacks to more bytes than it has")
    root = infos[0].filename.partition("/")[0] if infos else ""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        folder, _, place = info.filename.partition("/")
        shown = place[:100] or folder[:100]
        if folder != root or not _RECORD.fullmatch(place):
            if place.casefold().endswith((".pt", ".pkl")):
                raise ContractBreach(f"'{shown}' is pickled: only plain tensors are accepted")
            raise ContractBreach(f"'{shown}' does not belong into a torch.export program")
        if place in found:
            raise ContractBreach(f"the archive has '{shown}' twice")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ContractBreach(f"'{shown}' is compressed, which export does not do")
        found[place] = info
    return found


def _screen_json(place: str, data: bytes) -> None:
    try:
        tree = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ContractBreach(f"'{place}' does not decode: {error}") from error
    for key, value in _pairs(tree):
        if key == "use_pickle" and value:
            raise ContractBreach(f"'{place}' names a pickled tensor: only plain tensors are accepted")
        if key == "path_name" and not (isinstance(value, str) and _PAYLOAD.fullmatch(value)):
            raise ContractBreach(f"'{place}' names {str(value)[:100]!r}, which is no plain tensor")
        if key == "as_custom_obj" or (key == "custom_obj_values" and value):
            raise ContractBreach(f"'{place}' holds a custom object: only plain tensors are accepted")
        if key in _NAMED and isinstance(value, str) and not _NAME.fullmatch(value):
            raise ContractBreach(f"the graph calls something {value[:100]!r}, which is no name")
        if key == "target" and isinstance(value, str) and not _is_operator(value):
            raise ContractBreach(f"the graph calls {value[:100]!r}, which is no operator of PyTorch's own")
        sizes = {"expr_str": [value], "guards_code": value}.get(key, [])
        bad = [size for size in sizes if not _is_size(size)] if isinstance(sizes, list) else [sizes]
        if bad:
            raise ContractBreach(f"the graph states a size as {str(bad[0])[:100]!r}, which is not arithmetic")


def _is_operator(target: str) -> bool:
    return bool(_ARITHMETIC.fullmatch(target) or (_OPERATOR.fullmatch(target) and not _FILES.fullmatch(target)))


def _is_size(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    text = _ASKED.sub("s0", _SYMBOL.sub("s0", value))
    words = _WORD.findall(text)
    return bool(_SIZE.fullmatch(text)) and all(_SIZE_WORD.fullmatch(word) for word in words)


def _pairs(tree: Any) -> Iterator[tuple[str, Any]]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield from node.items()
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _opened(file: BinaryIO) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ContractBreach(f"the file is not a PyTorch archive: {error}") from error
    if len(archive.namelist()) > MAX_ENTRIES:
        archive.close()
        raise ContractBreach(f"the archive has more than {MAX_ENTRIES} entries")
    return archive
