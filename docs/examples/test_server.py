"""Tests that need a server: each gets one that is up, and leaves nothing behind.

pip install aioelastic pytest pytest-asyncio
pytest -o asyncio_mode=auto docs/examples/test_server.py
"""

import asyncio
import sys
import urllib.request
from collections.abc import AsyncIterator

import pytest

from aioelastic import Command, Group

pytest_plugins = ["aioelastic.testing.plugin"]  # better in the conftest.py of the root

SERVER = Command(sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1")


@pytest.fixture
async def url(no_leaks: None) -> AsyncIterator[str]:
    async with Group(SERVER) as group:
        yield (await group.line(r"http://\S+/", timeout=30))[0]


async def test_it_answers(url):
    with await asyncio.to_thread(urllib.request.urlopen, url) as answer:
        assert answer.status == 200
