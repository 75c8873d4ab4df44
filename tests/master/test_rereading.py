"""Which settings a reload may bring."""

from __future__ import annotations

import dataclasses

from clusterserve.master.rereading import FIXED, compare
from clusterserve.settings import Settings


def settings(**values: object) -> Settings:
    return Settings.create(app="a:b", **{"workers": 1, "bind": ":1", **values})


def test_what_can_change_does_and_what_cannot_stays() -> None:
    before, after = settings(), settings(workers=2, bind=":2", policy="least", root_path="/x", workers_source="here")
    found = compare(before, after)
    assert found.changed == ("workers", "root_path")
    assert found.fixed == ("binds", "policy")
    assert found.settings == dataclasses.replace(after, binds=before.binds, policy="rr")


def test_nothing_new() -> None:
    assert compare(settings(), settings(workers_source="elsewhere"))[1:] == ((), ())


def test_every_fixed_setting_is_one() -> None:
    assert {field.name for field in dataclasses.fields(Settings)} >= FIXED
