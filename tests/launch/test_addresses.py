"""How machines find each other: the master's name, and the address that a machine announces."""

from __future__ import annotations

import socket
import time

import pytest

from ernie_train.core.errors import ConfigError, ErnieTrainError
from ernie_train.launch import addresses


def test_a_name_becomes_an_address_once_it_is_known(monkeypatch):
    """Paddle's launcher compares texts; a pod's name is known some time after the pod has begun."""
    answers = iter([OSError("unknown"), OSError("unknown"), "10.0.0.7"])

    def look_up(name: str) -> str:
        assert name == "ernie-0.ernie"
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    told: list[str] = []
    assert addresses.resolve_master("ernie-0.ernie:6379", told.append) == "10.0.0.7:6379"
    assert told == ["--master: there is no machine ernie-0.ernie (unknown); waiting for it"]


def test_an_unknown_name_is_refused(monkeypatch):
    def look_up(name: str) -> str:
        raise OSError("not known")

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    with pytest.raises(ErnieTrainError, match="there is no machine nowhere") as refused:
        addresses.resolve_master("nowhere:6379", print, limit_s=0)
    assert refused.value.exit_status == 1, "it may be known when a scheduler tries again"


@pytest.mark.parametrize("name", ["node-1", "127.0.1.1"])
def test_a_name_that_leads_to_this_machine_alone_is_refused(monkeypatch, name):
    """Debian gives a machine's own name the address 127.0.1.1, in /etc/hosts."""
    monkeypatch.setattr(socket, "gethostbyname", lambda asked: "127.0.1.1")
    with pytest.raises(ConfigError, match="where no other one reaches it"):
        addresses.resolve_master(f"{name}:6379", print)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_one_machine_may_stand_for_several(name):
    assert addresses.resolve_master(f"{name}:6379", print) == "127.0.0.1:6379"


def test_a_machine_announces_the_address_by_which_it_reaches_the_master():
    assert addresses.own_address("127.0.0.1:6379") == "127.0.0.1"
    with pytest.raises(ConfigError, match="no way leads to"):
        addresses.own_address("127.0.0.1:99999")
