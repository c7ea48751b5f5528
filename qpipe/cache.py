"""Results kept by what they depend on: whole or not there, shared by processes, bounded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qpipe.errors import RecipeError

log = logging.getLogger("qpipe")

PLACE, LIMIT = "QPIPE_CACHE", "QPIPE_CACHE_LIMIT"  # environment: the folder; GiB it may take
DEFAULT_LIMIT = 8.0
REMEMBERED_BYTES = 512 * 2**20  # of a sweep's results that stay in memory
_DATA, _TENSORS, _ASIDE = "data.json", "tensors.safetensors", ".aside-"
_STALE_S = 3600  # what a killed process left aside is cleared after this time
_STALE_LOCK_S = 7 * 24 * 3600  # nobody computes that long


@dataclass(frozen=True)
class Entry:
    """A result: tensors by name, and plain data."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    data: Any = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Listed:
    """What `qpipe cache` shows of an entry."""

    kind: str
    key: str
    num_bytes: int
    used: float  # seconds since 1970


def digest(*parts: Any) -> str:  # noqa: ANN401
    """Return a name for plain data, and objects made of it, that is the same in every process."""
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Write an object as its class and its attributes: what a method was constructed with."""
    if isinstance(value, Tensor):
        return hashlib.sha256(save({"": value.detach().cpu().contiguous()})).hexdigest()
    if isinstance(value, (Path, type)) or not hasattr(value, "__dict__"):
        return str(value)
    cls = type(value)
    return {"class": f"{cls.__module__}.{cls.__qualname__}", **vars(value)}


def default_folder() -> Path:
    """Return the folder of results: in QPIPE_CACHE, or ~/.cache/qpipe."""
    return Path(os.environ.get(PLACE) or Path.home() / ".cache" / "qpipe") / "results"


def default_limit() -> int:
    """Return how many bytes results may take: QPIPE_CACHE_LIMIT in GiB, or 8 GiB.

    Raises:
        RecipeError: the variable is no size.
    """
    text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT)
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if gib < 0:
        raise RecipeError(f"{LIMIT}={text} is no size; give GiB, {LIMIT}={DEFAULT_LIMIT:g}")
    return int(gib * 2**30)


class Store:
    """Entries by kind and key, each a folder that appears at once; the longest unused go first.

    No method raises because of the disk: a cache is never why a run fails.

    Args:
        folder: None keeps nothing beyond this process.
        limit_bytes: of all entries on disk.
        remember: keep entries in memory too, for the other jobs of a sweep.
    """

    def __init__(self, folder: Path | None, limit_bytes: int = 8 * 2**30, remember: bool = False) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.remember = remember
        self.remembered: OrderedDict[tuple[str, str], Entry] = OrderedDict()
        self.unpruned: int | None = None  # bytes written since the last look at the limit; None: never looked

    def get(self, kind: str, key: str) -> Entry | None:
        """Return an entry; None where there is none, or a damaged one."""
        found = self.remembered.get((kind, key))
        if found is not None:
            self.remembered.move_to_end((kind, key))
            return found
        found = self._read(kind, key)
        if found is not None:
            self._remember(kind, key, found)
        return found

    def put(self, kind: str, key: str, entry: Entry, lasting: bool = True) -> None:
        """Keep an entry; an equal key means an equal entry, so whoever comes first wins.

        Args:
            lasting: beyond this process.
        """
        self._remember(kind, key, entry)
        if self.folder is None or not lasting or entry.num_bytes > self.limit_bytes:
            return
        try:
            self._write(self.folder / kind / key, entry)
        except OSError as error:
            log.warning("%s cannot be written (%s); results are not kept", self.folder, error.strerror)
            self.folder = None
        except TypeError as error:  # a stranger's table that is no plain data
            log.debug("%s is not kept: %s", kind, error)

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Keep other processes that share the folder from doing the same at the same time."""
        from filelock import FileLock

        if self.folder is None:
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f".{key[:32]}.lock")
            lock.acquire()
        except OSError:  # a disk that refuses: what is done twice is only slower
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def listed(self) -> Iterator[Listed]:
        """Yield every entry on disk."""
        for place in [*self.folder.glob("[!.]*/*")] if self.folder else []:
            with suppress(OSError):  # another process removed it
                size = sum(file.stat().st_size for file in place.iterdir())
                yield Listed(place.parent.name, place.name, size, (place / _DATA).stat().st_mtime)

    def remove(self, kind: str, key: str) -> None:
        """Remove an entry."""
        self.remembered.pop((kind, key), None)
        if self.folder is not None:
            with suppress(OSError):
                aside = Path(mkdtemp(prefix=_ASIDE, dir=self.folder))
                (self.folder / kind / key).rename(aside / key)  # at once: nobody reads half of it
                shutil.rmtree(aside, ignore_errors=True)

    def prune(self) -> None:
        """Remove the longest unused entries beyond the limit, and what killed processes left."""
        from filelock import FileLock, Timeout

        if self.folder is None:
            return
        self.unpruned = 0
        with suppress(Timeout, OSError), FileLock(self.folder / ".lock", blocking=False):
            for aside in self.folder.glob(f"{_ASIDE}*"):
                if time.time() - aside.stat().st_mtime > _STALE_S:
                    shutil.rmtree(aside, ignore_errors=True)
            for lock in self.folder.glob(".*.lock"):
                if time.time() - lock.stat().st_mtime > _STALE_LOCK_S:
                    lock.unlink()
            entries = sorted(self.listed(), key=lambda entry: entry.used)
            excess = sum(entry.num_bytes for entry in entries) - self.limit_bytes
            for entry in entries:
                if excess <= 0:
                    break
                self.remove(entry.kind, entry.key)
                excess -= entry.num_bytes

    def _remember(self, kind: str, key: str, entry: Entry) -> None:
        if self.remember and entry.num_bytes <= REMEMBERED_BYTES:
            self.remembered[kind, key] = entry
            while sum(kept.num_bytes for kept in self.remembered.values()) > REMEMBERED_BYTES:
                self.remembered.popitem(last=False)

    def _read(self, kind: str, key: str) -> Entry | None:
        if self.folder is None:
            return None
        place = self.folder / kind / key
        try:
            stored = json.loads((place / _DATA).read_bytes())
            content = (place / _TENSORS).read_bytes()
            if stored["check"] != digest(stored["data"], hashlib.sha256(content).hexdigest()):
                raise ValueError("its checksum is another")
            os.utime(place / _DATA)
            return Entry(load(content), stored["data"])
        except FileNotFoundError:
            if not place.is_dir():
                return None
            why = "a file is missing"
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            why = str(error)
        log.warning("cache entry %s is damaged (%s) and ignored", place, why)
        self.remove(kind, key)
        return None

    def _write(self, place: Path, entry: Entry) -> None:
        assert self.folder is not None  # noqa: S101  # checked by put
        if place.is_dir():
            return
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()})
        data = json.loads(json.dumps(entry.data))  # as it will be read
        check = digest(data, hashlib.sha256(content).hexdigest())
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(mkdtemp(prefix=_ASIDE, dir=self.folder))
        try:
            (aside / _TENSORS).write_bytes(content)
            (aside / _DATA).write_text(json.dumps({"data": data, "check": check}))
            with suppress(OSError):  # another process was first
                aside.rename(place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        if self.unpruned is None or self.unpruned + len(content) > self.limit_bytes // 16:
            self.prune()
        self.unpruned = (self.unpruned or 0) + len(content)


@dataclass(frozen=True)
class Shelf:
    """The part of a store whose entries depend on the same things; without a store, a shelf that is empty.

    A strategy keeps what it would not like to compute again, by a name that is unique within its run:

        entry = recipe.shelf.get("block 3")
        if entry is None:
            entry = Entry({"weight": reconstructed()}, {"loss": 0.1})
            recipe.shelf.put("block 3", entry)
        weight = entry.tensors["weight"]

    Args:
        kind: what `qpipe cache` calls its entries.
        parts: plain data that its entries depend on.
        lasting: whether all of that is known, so that entries may outlive this process.
        taken: how many entries of each kind were found.
    """

    store: Store | None = None
    kind: str = "results"
    parts: tuple[Any, ...] = ()
    lasting: bool = True
    taken: Counter[str] = field(default_factory=Counter)

    def of(self, kind: str, *parts: Any) -> Shelf:  # noqa: ANN401
        """Return the shelf of another kind whose entries depend on more."""
        return replace(self, kind=kind, parts=(*self.parts, *parts))

    def get(self, name: Any) -> Entry | None:  # noqa: ANN401
        """Return the entry of a name, or None."""
        found = self.store.get(self.kind, self._key(name)) if self.store else None
        self.taken[self.kind] += found is not None
        return found

    def put(self, name: Any, entry: Entry, lasting: bool = True) -> None:  # noqa: ANN401
        """Keep an entry under a name."""
        if self.store:
            self.store.put(self.kind, self._key(name), entry, lasting and self.lasting)

    def drop(self, name: Any) -> None:  # noqa: ANN401
        """Remove the entry of a name, which was of no use after all."""
        self.taken[self.kind] -= 1
        if self.store:
            self.store.remove(self.kind, self._key(name))

    def alone(self) -> AbstractContextManager[None]:
        """Let one process at a time fill this shelf: look again once inside."""
        return self.store.alone(self._key(None)) if self.store and self.lasting else nullcontext()

    def _key(self, name: Any) -> str:  # noqa: ANN401
        return digest(self.kind, self.parts, name)
