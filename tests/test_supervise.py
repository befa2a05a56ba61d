"""The process that only waits: what it forwards, and what it ends with."""

import os
import signal

import pytest

from sae_jax.cli import supervise


class Child:
    """A child, in whose first moment the parent gets SIGTERM."""

    code = 75
    instances: list["Child"] = []

    def __init__(self, command, env, pass_fds, process_group):
        self.signals = []
        self.instances.append(self)
        os.kill(os.getpid(), signal.SIGTERM)

    def send_signal(self, number):
        self.signals.append(number)

    def wait(self):
        os.kill(os.getpid(), signal.SIGINT)
        return self.code


@pytest.fixture
def child(monkeypatch):
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(supervise.subprocess, "Popen", Child)
    yield Child
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_signals_reach_the_child_whenever_they_come(child):
    assert supervise.run(5) == 75
    assert child.instances[-1].signals == [signal.SIGTERM, signal.SIGINT]


def test_an_abort_before_all_met_is_told(child, monkeypatch, capfd):
    monkeypatch.setattr(child, "code", -signal.SIGABRT)
    assert supervise.run(5) == 76
    assert "not all processes met within 5 s" in capfd.readouterr().err
