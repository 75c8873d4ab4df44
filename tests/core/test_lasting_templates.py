"""Templates whose preparations do not age: one for the workers of all generations."""

from __future__ import annotations

import pytest

from clusterserve.core.templates import DismissTemplate, StartTemplate, Templates, steps


def now(templates: Templates, generations: tuple[int, ...], start: int) -> list[object]:
    return [step for when, step in steps(templates, generations, start, 60.0, 5.0) if when <= 10.0]


@pytest.fixture
def lasting() -> Templates:
    templates = Templates(lasting=True)
    templates.prepared(templates.started(1, 0.0).id, 1.0)
    return templates


def test_the_next_generation_has_the_same(lasting: Templates) -> None:
    assert now(lasting, (2, 1), 2) == []
    assert lasting.ready(2) is lasting.ready(1) is lasting.here[1]
    assert now(lasting, (3,), 3) == []


def test_another_is_another_generations() -> None:
    templates = Templates()
    templates.prepared(templates.started(1, 0.0).id, 1.0)
    assert now(templates, (2, 1), 2) == [StartTemplate(2)]
    assert templates.ready(2) is None
    assert now(templates, (2,), 0) == [DismissTemplate(1)]


def test_the_end(lasting: Templates) -> None:
    assert now(lasting, (), 0) == [DismissTemplate(1)]


def test_workers_that_are_started_otherwise_need_another(lasting: Templates) -> None:
    lasting.outdate()
    assert now(lasting, (1,), 1) == [StartTemplate(1), DismissTemplate(1)]
    lasting.started(1, 2.0)
    lasting.dismissed(1, 2.0)
    assert lasting.ready(1) is None
    lasting.prepared(2, 3.0)
    assert lasting.ready(1) is lasting.here[2]
