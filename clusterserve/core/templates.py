"""The template processes: each has made once what all workers need, and the workers of its generation are its forks.

`Templates` belongs to the roster and changes only by facts, as that does; `steps` says what follows, as a part of
`plan`.  A worker does not need its template once it is forked.  So that a worker of a generation can always be
replaced by one of the same code, a template stays as long as its generation is wanted, or is the one that serves (the
`stand_in`, from which who dies is replaced until the wanted one is ready); unless it has nothing of a generation's
(`Templates.lasting`), and serves them all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StartTemplate:
    """Start the template of a generation."""

    generation: int


@dataclass(frozen=True)
class DismissTemplate:
    """Let a template go: its generation is not wanted any more."""

    template: int


@dataclass(frozen=True)
class KillTemplate:
    """SIGKILL a template; `why` completes the log line "template N is killed: …"."""

    template: int
    why: str


Step = StartTemplate | DismissTemplate | KillTemplate


@dataclass
class Template:
    """One template process, from its start to its end.  Times as in the roster; None: not yet."""

    id: int
    generation: int
    started: float
    ready: float | None = None
    dismissed: float | None = None
    killed: bool = False
    #: It was started as workers are started no more.
    outdated: bool = False


@dataclass
class Templates:
    """Those that are not dead, by id, and what is remembered of the dead ones."""

    #: What they prepare does not age: one is for the workers of all generations, and what these share lasts as long.
    lasting: bool = False
    here: dict[int, Template] = field(default_factory=dict)
    #: Failures in a row; a template that was ready for a while was none.
    failures: int = 0
    not_before: float = 0.0
    #: The newest generation that a template was started for.
    tried: int = 0
    _ids: int = 0

    def started(self, generation: int, now: float) -> Template:
        """A process was started, or was to be; gives it its id."""
        self._ids += 1
        self.tried = max(self.tried, generation)
        template = self.here[self._ids] = Template(self._ids, generation, now)
        return template

    def prepared(self, id: int, now: float) -> None:
        """Workers can be forked from it."""
        self.here[id].ready = now

    def dismissed(self, id: int, now: float) -> None:
        """It was told to go."""
        self.here[id].dismissed = now

    def killed(self, id: int) -> None:
        """It was sent SIGKILL."""
        self.here[id].killed = True

    def gone(self, id: int, now: float, backoff: float, backoff_max: float, min_uptime: float) -> Template:
        """It has ended; unasked, the next one waits, longer each time."""
        template = self.here.pop(id)
        if template.dismissed is None:
            if template.ready is not None and now - template.ready >= min_uptime:
                self.failures, self.not_before = 0, now
            else:
                # As for the workers' slots: the exponent is capped, floats end at 2**1024.
                self.not_before = now + min(backoff * 2.0 ** min(self.failures, 60), backoff_max)
                self.failures += 1
        return template

    def forgiven(self, now: float) -> None:
        """Somebody has ordered a change: what failed before says nothing of what will be."""
        self.failures, self.not_before = 0, min(self.not_before, now)

    def of(self, generation: int) -> Template | None:
        """The one that workers of `generation` are forked from, or will be."""
        for each in self.here.values():
            if (each.generation == generation or self.lasting) and each.dismissed is None and not each.outdated:
                return each
        return None

    def outdate(self) -> None:
        """Workers to come are started otherwise: those that are here are not for them."""
        for template in self.here.values():
            template.outdated = True

    def ready(self, generation: int) -> Template | None:
        """The one that workers of `generation` can be forked from now."""
        template = self.of(generation)
        return None if template is None or template.ready is None or template.killed else template

    def stand_in(self, generation: int, proven: int) -> Template | None:
        """The one that workers come from until that of `generation` is ready: of older code, and better than nobody.

        That of the generation that serves, if it is ready, or else one that is, or else who began to load first:
        reloads that follow one another faster than a template loads must not leave everybody waiting for the last.
        """
        older = [
            each
            for each in self.here.values()
            if each.generation < generation and each.dismissed is None and not each.killed and not each.outdated
        ]
        ready = [each for each in older if each.ready is not None]
        ours = [each for each in older if each.generation == proven]
        return next(iter([each for each in ready if each in ours] or ready[-1:] or ours or older), None)


def steps(
    templates: Templates, generations: Collection[int], start: int, boot: float, leave: float
) -> Iterator[tuple[float, Step]]:
    """What to do, and when: have a template of generation `start` (0: of none), and keep those of `generations`.

    One that is not ready within `boot` seconds (0: however long it takes), or has not ended within `leave` seconds of
    being dismissed, is killed.
    """
    if start and templates.of(start) is None:
        yield templates.not_before, StartTemplate(start)
    for template in templates.here.values():
        if template.dismissed is not None:
            if not template.killed:
                yield template.dismissed + leave, KillTemplate(template.id, f"it did not end within {leave:g} s")
        elif template.outdated or not generations or (template.generation not in generations and not templates.lasting):
            yield 0.0, DismissTemplate(template.id)
        elif template.ready is None and boot and not template.killed:
            yield template.started + boot, KillTemplate(template.id, f"it was not ready within {boot:g} s")
