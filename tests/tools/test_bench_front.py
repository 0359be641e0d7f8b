"""What the frontend's benchmarks do without a server: rounds, figures, tables, and their page."""

import sys
from pathlib import Path

import pytest

MODULES = ("front_figures", "front_loads", "front_main", "front_rounds", "front_servers")
FOLDER = Path(__file__).parents[2] / "tools" / "front"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def output(capsys):
    from front_figures import Output

    return Output()


def test_a_figure_is_judged_as_it_is_shown(output):
    from front_figures import at_least, at_most

    assert at_most("a", 1.004, 1.0, digits=2).is_met
    assert not at_most("a", 1.006, 1.0, digits=2).is_met
    assert at_least("a", 199_999.6, 200_000).is_met
    assert not at_least("a", 199_999.4, 200_000).is_met
    assert at_most("CPU", 0.5, 0.8, " us", 2).cells() == [
        "CPU", "0.50 us", "", "at most 0.80 us", "yes"
    ]  # fmt: skip
    missed = ["1,234", "", "at least 200,000", "**no**"]
    assert at_least("rate", 1234.5, 200_000).cells()[1:] == missed


@pytest.mark.parametrize(
    ("reached", "floor", "met"),
    [(2.0, 1.0, "yes"), (4.0, 2.0, "**no**"), (4.0, 3.5, "**no**, nor C"), (2.0, 5.0, "yes")],
)
def test_the_floor_says_what_the_machine_cannot_do(reached, floor, met):
    from front_figures import at_most

    cells = at_most("p99", reached, 2.8, " ms", 1, floor).cells()
    assert cells == ["p99", f"{reached} ms", f"{floor} ms", "at most 2.8 ms", met]


def test_the_summary_has_the_floor_only_if_a_figure_has(output, capsys):
    from front_figures import at_most

    output.add(at_most("a", 1, 2))
    output.summary()
    assert capsys.readouterr().out.startswith("| figure | reached |    target | met |")
    output.add(at_most("b", 1, 2, floor=3))
    output.summary()
    assert capsys.readouterr().out.startswith("| figure | reached | C floor |")


def test_tables_are_markdown_with_even_columns(output, capsys):
    output.table(["server", "a second"], [["ours", "1,000"], ["the floor", "2"]])
    assert capsys.readouterr().out.splitlines() == [
        "| server    | a second |",
        "|-----------|----------|",
        "| ours      |    1,000 |",
        "| the floor |        2 |",
        "",
    ]


def test_what_was_printed_goes_between_the_marks_of_a_page(output, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x.py writes from here -->\nold\n<!-- x.py ends here -->\nb\n")
    output.text("New.")
    for _ in range(2):
        output.write_into(page, "x.py")
        assert page.read_text() == (
            "a\n<!-- x.py writes from here -->\n\nNew.\n\n<!-- x.py ends here -->\nb\n"
        )
    with pytest.raises(ValueError, match="lacks the lines"):
        output.write_into(page, "y.py")


def test_the_documentation_has_marks_for_both_tools():
    page = (FOLDER.parents[1] / "docs" / "benchmarks.md").read_text()
    for program in ("bench_front.py", "bench_client.py"):
        assert page.count(f"<!-- {program} writes from here -->") == 1
        assert page.count(f"<!-- {program} ends here -->") == 1


def test_user_time_is_the_share_of_all_rounds_ticks(output):
    from front_loads import median

    rows = [
        {"num": 10.0, "cpu_s": 1e-5 * k, "user_ticks_s": u, "system_ticks_s": 0.03 - u}
        for k, u in ((1, 0.0), (2, 0.01), (9, 0.02))
    ]
    row = median(rows)
    assert row["cpu_us"] == pytest.approx(2.0)
    assert row["user_us"] == pytest.approx(2.0 / 3)
    assert row["system_us"] == pytest.approx(4.0 / 3)


class Machine:
    """/proc/stat of a machine whose host takes some of each second."""

    def __init__(self, path):
        self.path = path
        self.ticks = [[0] * 10, [0] * 10]
        self.pass_time()

    def pass_time(self, num_ticks=0, steal=0, cpu=1):
        self.ticks[cpu][0] += num_ticks - steal
        self.ticks[cpu][7] += steal
        lines = [f"cpu{i} {' '.join(map(str, ticks))}" for i, ticks in enumerate(self.ticks)]
        self.path.write_text("\n".join(["cpu 1 2 3", *lines, "intr 5 6", ""]))


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "stat")


def test_steal_is_that_of_the_worst_processor_of_ours(machine):
    from front_rounds import Steal

    steal, of_first = Steal({0, 1}, machine.path), Steal({0}, machine.path)
    assert steal.share() == 0 and steal.is_small()
    machine.pass_time(200, 3, cpu=0)
    machine.pass_time(200, 8, cpu=1)
    assert (steal.share(), steal.is_small()) == (0.04, False)
    assert (of_first.share(), of_first.is_small()) == (0.015, True)


def test_one_tick_of_a_short_run_is_small(machine):
    from front_rounds import Steal

    steal = Steal({1}, machine.path)
    machine.pass_time(10, 1)
    assert (steal.share(), steal.is_small()) == (0.1, True)
    machine.pass_time(10, 1)
    assert not steal.is_small()


@pytest.fixture
def take(machine):
    """Runs of two cases with the given steal each; the runs that were made and those taken."""
    from front_rounds import Rounds

    def run(steals, rounds=2, patience_s=60.0, waited=0.0):
        made = []

        def run_of(name):
            steal = steals[name][sum(other == name for other, _ in made)]
            machine.pass_time(100, steal)
            made.append((name, steal))
            return {"lost": waited}

        cases = {name: lambda name=name: run_of(name) for name in steals}
        rows = Rounds(rounds, patience_s, {0, 1}, stat=machine.path).take(cases)
        return made, {name: [row["lost"] for row in several] for name, several in rows.items()}

    return run


def test_quiet_rounds_are_made_once_and_in_turns(take):
    made, taken = take({"a": [1, 3], "b": [0, 2]})
    assert [name for name, _ in made] == ["a", "b", "a", "b"]
    assert taken == {"a": [0.01, 0.03], "b": [0.0, 0.02]}


def test_loud_runs_are_made_again_and_the_quietest_taken(take):
    made, taken = take({"a": [30, 1, 10, 2], "b": [0, 0]})
    assert [name for name, _ in made] == ["a", "b", "a", "b", "a", "a"]
    assert taken == {"a": [0.01, 0.02], "b": [0.0, 0.0]}


def test_a_loud_machine_is_given_up(take):
    steals = [20, 19, 18, 17, 16, 15, 14, 13]
    made, taken = take({"a": steals})
    assert len(made) == 2 + 5
    assert taken == {"a": [0.15, 0.14]}
    made, taken = take({"a": steals}, patience_s=0.0)
    assert len(made) == 2
    assert taken == {"a": [0.2, 0.19]}


def test_a_server_that_waited_for_its_core_counts_as_loud(take):
    made, taken = take({"a": [1, 2, 30, 4, 5, 6, 7]}, waited=0.05)
    assert len(made) == 2 + 5
    assert taken == {"a": [0.05, 0.05]}


def test_medians_say_the_most_that_was_lost():
    from front_loads import median

    assert median([{"x": 1, "lost": 0.01}, {"x": 3, "lost": 0.2}]) == {"x": 2, "lost": 0.2}


def test_the_time_that_a_process_waited_is_known():
    import os

    from front_servers import Cpu, cpu_of

    assert cpu_of(os.getpid()).total > 0
    assert Cpu(3.0, 1.0, 1.0, 0.5).since(Cpu(1.0, 0.0, 1.0, 0.25)) == Cpu(2.0, 2.0, 0.0, 0.25)


def test_both_programs_share_their_options(capsys):
    from front_main import make_parser

    parser = make_parser("Measures.\nMore.", ["one", "two"])
    help_text = " ".join(parser.format_help().split())
    assert "Measures. positional" in help_text and "of one, two" in help_text
    assert "they lost over 3% (default: 12.0)" in help_text
    assert parser.parse_args(["two", "--rounds", "5"]).sections == ["two"]
    with pytest.raises(SystemExit):
        parser.parse_args(["three"])
    assert "invalid choice: 'three'" in capsys.readouterr().err
