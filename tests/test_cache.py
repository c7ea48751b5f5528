"""A store never gives back what was not put whole, and never grows past its limit."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qpipe import cli
from qpipe.cache import DEFAULT_LIMIT, Entry, Shelf, Store, default_folder, default_limit
from qpipe.errors import RecipeError

KIB = 2**10


def entry(size: int = 4, value: float = 1.0) -> Entry:
    return Entry({"x": torch.full((size,), value)}, {"loss": 0.5, "names": ["a"]})


def same(a: Entry | None, b: Entry) -> bool:
    return (
        a is not None and a.data == b.data and all(torch.equal(a.tensors[k], b.tensors[k]) for k in b.tensors)
    )


def test_what_is_put_is_got_by_another_process(tmp_path: Path) -> None:
    stored = Entry({"half": torch.ones(3, dtype=torch.bfloat16), "n": torch.arange(4)}, [1, "two", None])
    Store(tmp_path).put("statistics", "k", stored)
    assert same(Store(tmp_path).get("statistics", "k"), stored)
    assert Store(tmp_path).get("statistics", "other") is None
    assert Store(tmp_path).get("baseline", "k") is None
    assert Store(None).get("statistics", "k") is None


@pytest.mark.parametrize("file", ["tensors.safetensors", "data.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_entry_is_ignored_with_a_warning(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    store.put("statistics", "k", entry(100))
    path = tmp_path / "statistics/k" / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-3])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert store.get("statistics", "k") is None
    assert "is damaged" in caplog.text
    caplog.clear()
    store.put("statistics", "k", entry(100))
    assert same(store.get("statistics", "k"), entry(100))
    assert caplog.text == ""


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=20 * KIB)
    for name in "abcd":
        store.put("results", name, entry(KIB))  # 4 KiB each
        os.utime(tmp_path / "results" / name / "data.json", (ord(name), ord(name)))
    store.get("results", "a")  # just used
    store.put("results", "e", entry(KIB))
    store.prune()
    assert {listed.key for listed in store.listed()} == {"a", "c", "d", "e"}
    assert sum(listed.num_bytes for listed in store.listed()) <= 20 * KIB


def test_the_limit_holds_while_entries_come(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=64 * KIB)
    for i in range(40):
        store.put("results", str(i), entry(KIB))
        assert sum(listed.num_bytes for listed in store.listed()) <= 72 * KIB  # one sixteenth, and one entry
    store.put("results", "huge", entry(100 * KIB))
    assert store.get("results", "huge") is None


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, young = tmp_path / ".aside-old", tmp_path / ".aside-young"
    old.mkdir()
    young.mkdir()
    os.utime(old, (0, 0))
    store.put("results", "k", entry())
    assert not old.exists()
    assert young.exists()
    assert [listed.key for listed in store.listed()] == ["k"]


def test_kill_9_leaves_whole_entries_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = (
        "import sys, itertools, torch; from pathlib import Path; from qpipe.cache import Entry, Store\n"
        f"store = Store(Path({str(tmp_path)!r}))\n"
        "print('ready', flush=True)\n"
        "for i in itertools.count():\n"
        "    store.put('results', str(i), Entry({'x': torch.full((50_000,), float(i))}, i))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = Store(tmp_path)
    kept = [*store.listed()]
    assert kept
    with caplog.at_level(logging.WARNING, "qpipe"):
        for listed in kept:
            assert same(
                store.get("results", listed.key),
                Entry({"x": torch.full((50_000,), float(listed.key))}, int(listed.key)),
            )
    assert caplog.text == ""


def test_a_disk_that_refuses_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "cache")
    store.put("results", "k", entry())
    store.put("results", "l", entry())
    assert store.get("results", "k") is None
    assert caplog.text.count("results are not kept") == 1


def test_a_shelf_gives_what_depends_on_the_same(tmp_path: Path) -> None:
    shelf = Shelf(Store(tmp_path), parts=("weights A",)).of("reconstruction", {"steps": 100})
    shelf.put("block 3", entry())
    assert same(
        Shelf(Store(tmp_path), parts=("weights A",)).of("reconstruction", {"steps": 100}).get("block 3"),
        entry(),
    )
    assert shelf.get("block 4") is None
    assert (
        Shelf(Store(tmp_path), parts=("weights B",)).of("reconstruction", {"steps": 100}).get("block 3")
        is None
    )
    assert shelf.of("reconstruction", "more").get("block 3") is None
    assert shelf.get("block 3") is not None
    assert dict(shelf.taken) == {"reconstruction": 1}


def test_a_shelf_without_a_store_is_empty() -> None:
    shelf = Shelf()
    shelf.put("k", entry())
    assert shelf.get("k") is None


def test_what_may_not_last_stays_in_the_process(tmp_path: Path) -> None:
    store = Store(tmp_path, remember=True)
    shelf = Shelf(store, lasting=False)
    shelf.put("k", entry())
    assert same(shelf.get("k"), entry())
    assert [*store.listed()] == []


def test_the_command_lists_and_clears(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QPIPE_CACHE", str(tmp_path))
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out.startswith("0.0 MiB of at most 8,192 MiB in ")
    store = Store(default_folder())
    for name in "ab":
        store.put("statistics", name, entry(2**18))
    store.put("baseline", "c", entry())
    os.utime(default_folder() / "statistics/a/data.json", (time.time() - 7300, time.time() - 7300))
    assert cli.main(["cache", "list"]) == 0
    listing = capsys.readouterr().out
    assert "statistics  2        2.0  2 hours ago  0 s ago" in listing
    assert cli.main(["cache", "--json"]) == 0
    assert {row["key"] for row in json.loads(capsys.readouterr().out)} == {"a", "b", "c"}
    assert cli.main(["cache", "clear", "statistics"]) == 0
    assert capsys.readouterr().out == "removed 2 entries, 2.0 MiB\n"
    assert [listed.kind for listed in store.listed()] == ["baseline"]
    assert cli.main(["cache", "clear"]) == 0
    assert [*store.listed()] == []


def test_the_environment_moves_and_bounds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QPIPE_CACHE", str(tmp_path))
    monkeypatch.setenv("QPIPE_CACHE_LIMIT", "0.5")
    assert default_folder() == tmp_path / "results"
    assert default_limit() == 2**29
    monkeypatch.delenv("QPIPE_CACHE_LIMIT")
    assert default_limit() == DEFAULT_LIMIT * 2**30
    monkeypatch.setenv("QPIPE_CACHE_LIMIT", "much")
    with pytest.raises(RecipeError, match="QPIPE_CACHE_LIMIT=much is no size"):
        default_limit()
