"""The watch over other processes: whom it names, and when."""

import json
import os
import sys
import time

import jax
import pytest

from sae_jax import exits
from sae_jax.exits import FAILED, PEER_LOST
from sae_jax.watch import Watch


pytestmark = pytest.mark.filterwarnings(  # see `ends`
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)


class Store:
    """The part of jax's key-value store that a watch uses."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, name, value, allow_overwrite):
        assert allow_overwrite
        self.values[name] = value

    def key_value_dir_get(self, folder):
        return [(n, v) for n, v in self.values.items() if n.startswith(folder)]

    def say(self, process, **state):
        state = {"host": f"host{process}", "pid": 1, "where": "step 7", **state}
        self.values[f"sae_jax/processes/{process}"] = json.dumps(state)


@pytest.fixture
def ends(monkeypatch):
    """The exit codes that this process would have ended with."""
    codes = []

    def end(code):
        codes.append(code)
        raise SystemExit  # ends the thread alone

    monkeypatch.setattr(os, "_exit", end)
    return codes


def run(store, ends, peer=0.5, stall=60.0, secs=5.0, say=None):
    """Watches as process 1 until it ends, for some seconds at most."""
    own = Watch(store, 1, peer, stall)
    own.start()
    end = time.monotonic() + secs
    beat = 0
    while time.monotonic() < end and not ends:
        beat += 1
        if say:
            say(own, beat)
        time.sleep(0.02)
    own.stop()
    return own


def test_one_that_is_silent_is_named_with_where_it_was(ends, capfd):
    store = Store()
    store.say(0, n_done=7)
    began = time.monotonic()
    run(store, ends)
    assert 0.4 < time.monotonic() - began < 3
    assert ends == [PEER_LOST]
    error = capfd.readouterr().err
    assert "process 1: process 0 (host0, pid 1) has been silent for" in error
    assert "since step 7: it was killed, or its machine hangs; run the same" in error


@pytest.mark.parametrize("is_silent", [True, False])
def test_a_store_that_fails_for_a_while_is_no_ones_silence(
    is_silent, ends, monkeypatch
):
    """And the watch goes on."""
    store, began, get = Store(), time.monotonic(), Store.key_value_dir_get

    def fail(self, folder):
        if 0.3 < time.monotonic() - began < 1.3:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")
        return get(self, folder)

    def say(own, beat):
        is_failing = 0.2 < time.monotonic() - began < 1.4
        if beat == 1 or not is_silent and not is_failing:
            store.say(0, n_done=beat, beat=beat)

    monkeypatch.setattr(Store, "key_value_dir_get", fail)
    run(store, ends, peer=0.6, secs=3.0, say=say)
    assert ends == [PEER_LOST] * is_silent


def test_those_that_say_something_are_left_in_peace(ends):
    store = Store()
    run(store, ends, secs=1.5, say=lambda _, beat: store.say(0, n_done=beat, beat=beat))
    assert not ends


@pytest.mark.parametrize("code", [FAILED, PEER_LOST])
def test_an_error_of_one_ends_all(code, ends, capfd):
    store = Store()
    store.say(0, left=code, message="no such store")
    run(store, ends)
    assert ends == [code]
    assert "process 0 (host0, pid 1) stopped: no such store" in capfd.readouterr().err


def test_what_is_told_when_leaving_reaches_the_others(ends, capfd):
    store = Store()
    other = Watch(store, 2, 0.5, 60)
    other.start()
    other.leave(FAILED, "a bad config")
    run(store, ends)
    assert ends == [FAILED]
    assert "process 2" in (error := capfd.readouterr().err) and "a bad config" in error


def test_a_stall_names_who_is_behind(ends, capfd):
    store = Store()

    def say(own, beat):
        own.note("step 9", 9)
        store.say(0, n_done=9, beat=beat, where="step 9")
        store.say(2, n_done=8, beat=beat, where="rows of step 8")

    run(store, ends, stall=1.0, say=say)
    assert ends == [PEER_LOST]
    error = capfd.readouterr().err
    assert "process 2 (host2) is behind the others, at rows of step 8" in error


def test_a_stall_of_all_is_told(ends, capfd):
    store = Store()

    def say(own, beat):
        own.note("step 9", 9)
        store.say(0, n_done=9, beat=beat, where="step 9")

    run(store, ends, stall=1.0, say=say)
    assert ends == [PEER_LOST]
    assert "all 2 processes have been at step 9 for" in capfd.readouterr().err


def test_a_stall_of_a_save_names_who_is_behind_it(ends, capfd, monkeypatch):
    """By what a run notes: who saves a step has done it, who ends has saved."""
    store = Store()

    def say(own, beat):
        own.note("the end", sys.maxsize)
        store.say(0, n_done=9, beat=beat, where="saving step 9")
        store.say(2, n_done=8, beat=beat, where="step 9")

    run(store, ends, stall=1.0, say=say)
    assert "process 2 (host2) is behind the others, at step 9" in capfd.readouterr().err


def test_a_run_that_moves_does_not_stall(ends):
    store = Store()

    def say(own, beat):
        own.note("step 9", 9)
        store.say(0, n_done=beat, beat=beat, where=f"step {beat}")

    run(store, ends, stall=0.5, secs=1.5, say=say)
    assert not ends


def test_one_without_its_supervisor_ends(ends, monkeypatch):
    monkeypatch.setenv(exits.SUPERVISOR, str(os.getppid() + 1))
    run(Store(), ends)
    assert ends == [PEER_LOST]
