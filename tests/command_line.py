"""What a command of the command line did, and what a refusal looks like."""

from collections import namedtuple

Outcome = namedtuple("Outcome", "code out err")


def assert_refused(outcome: Outcome, *words: str, quiet: bool = True):
    """Exit status 2 and one line that says why; `quiet`: before anything else was said."""
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert lines[-1].startswith("headfuse: ")
    assert len(lines) == 1 or not quiet, outcome.err
    assert sum(line.startswith("headfuse: ") for line in lines) == 1
    assert outcome.out == ""
    for word in words:
        assert word in lines[-1]
