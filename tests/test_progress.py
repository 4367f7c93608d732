"""What long work shows, and that short work shows nothing."""

from __future__ import annotations

import io
import sys

import pytest

from flwr_fusion import progress
from flwr_fusion.progress import progress_to, tracked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return a terminal instead of standard error."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    lines: list[str] = []
    with progress_to(lines.append):
        assert list(tracked([1, 2, 3], "work")) == [1, 2, 3]
    assert list(tracked([1, 2, 3], "work")) == [1, 2, 3]
    assert not lines
    assert not terminal.getvalue()


def test_long_work_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(progress, "_SILENT", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    assert list(tracked([1, 2, 3], "work")) == [1, 2, 3]
    assert "work" in terminal.getvalue()


def test_long_work_of_a_server_goes_to_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(progress, "_SILENT", 0.0)
    lines: list[str] = []
    with progress_to(lines.append):
        assert list(tracked(range(5), "work")) == [0, 1, 2, 3, 4]
    assert lines == ["work: 1 of 5 after 0 s"]
    assert not terminal.getvalue()


def test_long_work_without_a_terminal_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SILENT", 0.0)
    assert list(tracked([1, 2], "work")) == [1, 2]
    assert capsys.readouterr().err == ""
