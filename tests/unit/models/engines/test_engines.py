from __future__ import annotations

import sys

import pytest

from models import engines
from models.engines import ENGINES, available_engines, get_engine, model_files
from models.errors import NoUsableVariant


def test_every_engine_of_the_table_is_tested_here() -> None:
    assert available_engines() == ("onnx", "litert", "torch")


def test_no_two_engines_load_files_of_one_suffix() -> None:
    files = [file for _, file in model_files()]
    assert len(files) == len(set(files))
    assert ("torch", "model.pt2") in model_files()


def test_finding_out_what_is_installed_imports_nothing() -> None:
    before = set(sys.modules)
    available_engines()
    assert not {module for framework in ENGINES.values() for module in framework.modules} & (set(sys.modules) - before)


def test_an_unknown_engine_is_refused_with_those_known() -> None:
    with pytest.raises(NoUsableVariant, match="'tpu' is none of onnx, litert, torch"):
        get_engine("tpu")


@pytest.mark.parametrize("name", ENGINES)
def test_a_missing_framework_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(target: str) -> None:
        raise ImportError(target)

    monkeypatch.setattr(engines, "import_module", refuse)
    with pytest.raises(NoUsableVariant, match=rf"'{name}' needs .*pip install 'tierline\[{ENGINES[name].extra}\]'"):
        get_engine(name)
