"""Coroutine tests on both loops, and no descriptor left behind."""

from tests.helpers.descriptors import no_descriptor_is_left  # noqa: F401 - pytest finds them here
from tests.helpers.loops import complaints, loop, loop_class, pytest_pyfunc_call  # noqa: F401
