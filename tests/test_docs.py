"""What README and docs say is what the committed files and the code say."""

import pytest

from bench import docs


def test_numbers_links_and_names_of_the_docs():
    assert docs.problems() == []


def test_a_changed_number_a_dead_link_and_a_gone_name_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setitem(docs.NUMBERS, "two", lambda: docs.table(["a", "b"], [["x", "2"]]))
    (tmp_path / "code.py").write_text("def here(): ...\n")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    good = "# A `b` c\n<!-- numbers two -->\n| a | b |\n|:--|---|\n| x | 2 |\n<!-- /numbers -->\n[t](#a-b-c) [u](https://x)\n"
    page.write_text(good + "`docs/../code.py: here`\n```\n[no](link)\n```\n")
    assert docs.check_numbers(page, False) + docs.check_links(page) + docs.check_names(page) == []
    page.write_text(good.replace("| x | 2", "| x | 3") + "[v](none.md) [w](page.md#other) `docs/../code.py: gone`\n")
    (wrong,) = docs.check_numbers(page, False)
    assert "two differs" in wrong and "-| x | 3 |" in wrong and "+| x | 2 |" in wrong
    assert [line.split(": ")[1] for line in docs.check_links(page)] == [
        "none.md is not there", "page.md#other has no such heading"]  # fmt: skip
    assert docs.check_names(page) == ["docs/page.md: docs/../code.py has no gone"]
    assert docs.check_numbers(page, True) == [] and "| x | 2 |" in page.read_text()


@pytest.mark.parametrize(("value", "digits", "text"), [(0.868, 3, ".868"), (-0.25, 2, "-.25"), (-10.2, 0, "-10")])
def test_short_numbers(value, digits, text):
    assert docs.short(value, digits) == text
