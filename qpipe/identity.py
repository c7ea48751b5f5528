"""What a result depends on, as digests: code, model, data."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.cache import digest
from qpipe.record import cpu_name
from qpipe.registry import installed_packages

if TYPE_CHECKING:
    from torch import nn

DISTRIBUTION = "qpipe-quant"
_Config = Mapping[str, Any]


@cache
def code_version() -> str:
    """Name the code: every file of qpipe and its plugins, and the versions of what they require.

    Files, not versions alone: a clone is edited without its version changing.
    """
    folders = [Path(__file__).parent, *(package.folder for package in installed_packages()[0])]
    files = {
        f"{folder.name}/{file.relative_to(folder)}": file for folder in folders for file in _code(folder)
    }
    return digest({name: _file_digest(file) for name, file in files.items()}, _versions())


def machine() -> dict[str, Any]:
    """Return what the last bits of a result depend on beside the code: processor, threads, GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu_name(), "threads": torch.get_num_threads(), "gpus": gpus}


def source_digest(*values: object) -> str:
    """Name the code of these objects' classes: their files, those of torch and ours left out."""
    files = {_source(cls) for value in values for cls in type(value).__mro__}
    return digest(sorted(_file_digest(Path(file)) for file in files if file))


def model_digest(model: nn.Module) -> str:
    """Name a model: its structure, its code, and every bit of its parameters and buffers."""
    hashed = hashlib.sha256(repr(model).encode())
    hashed.update(source_digest(*{type(module): module for module in model.modules()}.values()).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            for piece in _bytes(tensor):
                hashed.update(piece)
    return hashed.hexdigest()


def data_digest(config: _Config, data: object) -> str | None:
    """Name a data module: by its own fingerprint(), or by the files its configuration names.

    Returns:
        None where there is neither, so that nothing read from it outlives this process.
    """
    own = getattr(data, "fingerprint", None)
    if callable(own):
        return digest(config, str(own()), source_digest(data))
    paths = [path for text in _texts(config) if (path := Path(text).expanduser()).exists()]
    files = [entry for path in paths for entry in _listing(path)]
    return digest(config, files, source_digest(data)) if files else None


def _code(folder: Path) -> Iterator[Path]:
    yield from (file for file in folder.rglob("*.py") if "tests" not in file.parts)


@cache
def _file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    names = [
        DISTRIBUTION,
        *(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requires(DISTRIBUTION) or ()),
    ]
    return {name: found for name in names if (found := _version(name))}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _source(cls: type[Any]) -> str | None:
    """Return the file a class is written in, if it is neither torch's, nor Python's, nor ours."""
    if cls.__module__.partition(".")[0] in {"torch", "qpipe", "pytorch_lightning", *sys.stdlib_module_names}:
        return None
    try:
        return inspect.getsourcefile(cls)
    except (OSError, TypeError):
        return None


def _bytes(tensor: Any) -> Iterator[memoryview]:  # noqa: ANN401  # Tensor
    """Yield a tensor's bytes; copied piece by piece, since asking for them all ends the sharing of memory."""
    import torch

    for piece in torch.split(tensor.detach().reshape(-1), 1 << 22):
        yield piece.cpu().clone().view(torch.uint8).numpy().data


def _texts(value: Any) -> Iterator[str]:  # noqa: ANN401  # plain data
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key != "_target_":
                yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str) and value:
        yield value


def _listing(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, bytes, nanoseconds of the last change) of a file, or of every file under a folder."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            status = file.stat()
            yield str(file.absolute()), status.st_size, status.st_mtime_ns
