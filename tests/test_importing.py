"""The collector pauses for imports, and is afterwards as it was."""

from __future__ import annotations

import gc

import pytest

from clusterserve.importing import nothing_collected


def test_it_pauses() -> None:
    assert gc.isenabled()
    with nothing_collected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_an_import_that_fails() -> None:
    with pytest.raises(ImportError), nothing_collected():
        import clusterserve.no_such_module  # noqa: F401
    assert gc.isenabled()


def test_who_has_switched_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with nothing_collected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
