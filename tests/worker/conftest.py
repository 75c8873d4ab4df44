"""Coroutine tests on both loops, no descriptor left behind, and a master for the receiver."""

from tests.helpers.descriptors import no_descriptor_is_left  # noqa: F401 - pytest finds them here
from tests.helpers.loops import complaints, loop, loop_class, pytest_pyfunc_call  # noqa: F401
from tests.worker.clustered import fake  # noqa: F401
from tests.worker.harness import master, recorders  # noqa: F401
