"""A journal holds whole pieces of the same work, and nothing else."""

from __future__ import annotations

import os

import pytest

from mim_framework.base.errors import DataError, MimError
from mim_framework.data.journal import Journal

ABOUT = {"work": 1}


def pieces(path, about=ABOUT):
    with Journal(path, about) as journal:
        return list(journal.lines())


def written(path, count=3):
    with Journal(path, ABOUT) as journal:
        for number in range(count):
            journal.append({"piece": number})
    return path


def test_pieces_are_found_again_in_their_order(tmp_path):
    path = written(tmp_path / "folder" / "journal.jsonl")
    assert pieces(path) == [{"piece": 0}, {"piece": 1}, {"piece": 2}]


def test_the_journal_is_whole_wherever_it_was_cut_off(tmp_path):
    content = written(tmp_path / "journal.jsonl").read_bytes()
    for length in range(len(content) + 1):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(content[:length])
        found = pieces(cut)
        assert found == [{"piece": number} for number in range(max(0, content[:length].count(b"\n") - 1))]
        with Journal(cut, ABOUT) as journal:
            journal.append({"piece": "next"})
        assert pieces(cut) == [*found, {"piece": "next"}]


def test_pieces_are_read_while_others_are_written(tmp_path):
    with Journal(tmp_path / "journal.jsonl", ABOUT) as journal:
        journal.append({"piece": 0})
        assert list(journal.lines()) == [{"piece": 0}]
        journal.append({"piece": 1})
        assert list(journal.lines()) == [{"piece": 0}, {"piece": 1}]


def test_damage_in_the_middle_ends_what_is_trusted(tmp_path):
    path = written(tmp_path / "journal.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\0\0\n", *lines[3:]]))
    assert pieces(path) == [{"piece": 0}]


def test_other_work_begins_anew_and_says_so(tmp_path, caplog):
    path = written(tmp_path / "journal.jsonl")
    assert pieces(path, {"work": 2}) == []
    assert "is of other images or options; the work begins anew" in caplog.text


def test_two_processes_do_not_work_at_one_journal(tmp_path):
    path = written(tmp_path / "journal.jsonl")
    with Journal(path, ABOUT):
        child = os.fork()
        if not child:
            try:
                pieces(path)
            except DataError as error:
                os._exit(0 if "another process works at" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_journal_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MimError, match="cannot be written: "):
        pieces(tmp_path / "file" / "journal.jsonl")
