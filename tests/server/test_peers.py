"""Questions among frontends: everyone answers once, nobody is waited for in vain."""

import asyncio

import pytest

from minisgl_fast.server import peers as module
from minisgl_fast.server.peers import Peers


class FakeLink:
    """Delivers to the other end at once, or never."""

    def __init__(self, end):
        self.end = end  # the Peers that gets what is sent here
        self.back = None
        self.is_dead = False

    def send(self, kind, payload):
        if not self.is_dead:
            self.end.on_frame(self.back, kind, payload)


def star(num_extras):
    """(main, extras, links of main): every frontend answers with its number."""
    main, extras, links = Peers(), [Peers() for _ in range(num_extras)], []
    for extra in extras:
        forth, back = FakeLink(extra), FakeLink(main)
        forth.back, back.back = back, forth
        main.add(forth)
        extra.add(back)
        links.append(forth)
    for number, peers in enumerate([main, *extras]):
        peers.answers["number"] = lambda argument, number=number: number + argument
    return main, extras, links


def run(work):
    asyncio.run(work())


def test_alone_the_answer_is_there_at_once():
    found = []
    Peers().ask("number", 0, found.append)
    assert found == [[]]


def test_everyone_asks_everyone_else():
    async def work():
        main, extras, _ = star(3)
        for number, peers in enumerate([main, *extras]):
            found = []
            peers.ask("number", 10, found.append)
            assert [sorted(answers) for answers in found] == [
                [10 + other for other in range(4) if other != number]
            ]

    run(work)


def test_who_does_not_know_the_word_gives_no_answer():
    async def work():
        main, extras, _ = star(2)
        extras[0].answers.clear()
        found = []
        main.ask("number", 0, found.append)
        assert found == [[2]]

    run(work)


@pytest.mark.parametrize("asker", ["main", "extra"])
def test_who_is_silent_is_waited_for_and_then_left_out(monkeypatch, asker):
    monkeypatch.setattr(module, "TIMEOUT_S", 0.05)

    async def work():
        main, extras, links = star(3)
        links[2].is_dead = True
        found = []
        (main if asker == "main" else extras[0]).ask("number", 0, found.append)
        assert found == []
        await asyncio.sleep(0.15)
        assert len(found) == 1
        assert sorted(found[0]) == ([1, 2] if asker == "main" else [0, 2])

    run(work)


def test_who_goes_is_not_waited_for():
    async def work():
        main, _, links = star(2)
        links[1].is_dead = True
        found = []
        main.ask("number", 0, found.append)
        assert found == []
        main.remove(links[1])
        assert found == [[1]]
        main.remove(links[1])
        main.ask("number", 0, found.append)
        assert found == [[1], [1]]

    run(work)
