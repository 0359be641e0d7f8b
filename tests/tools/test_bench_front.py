"""What the frontend's benchmarks print: figures beside targets, tables, and the page they go to."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "tools" / "front"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("front_figures", "front_loads", "front_servers"):
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
        "CPU", "0.50 us", "at most 0.80 us", "yes"
    ]  # fmt: skip
    assert at_least("rate", 1234.5, 200_000).cells()[1:] == ["1,234", "at least 200,000", "**no**"]


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
