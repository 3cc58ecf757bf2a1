from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """No test here can cut the power; thousands of real flushes take a minute."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
