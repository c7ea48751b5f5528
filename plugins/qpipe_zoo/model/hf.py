"""Any model folder that transformers reads, offline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qpipe import RecipeError
from qpipe_zoo.optional import optional, quietly


def hf(path: str, trust_remote_code: bool = False) -> nn.Module:
    """Return the float model of a folder, in float32 and without a cache of keys and values.

    Args:
        path: a folder with config.json and safetensors, or a .gguf file (or a folder with one).
        trust_remote_code: run the model's own Python files, where its configuration names some.

    Raises:
        RecipeError: there is no such model, weights of it are missing or of another shape, or
            transformers does not know its architecture.
        PluginError: a package of the extra 'llm' is missing.
    """
    where = read_where(path, "model.path")
    transformers = optional("transformers", "model=hf", "llm")
    if "gguf_file" in where:
        for package in ("gguf", "accelerate"):
            optional(package, "a GGUF file", "llm")
        kind: Any = transformers.AutoModelForCausalLM
    else:
        kind = _class(transformers, Path(path).expanduser() / "config.json", trust_remote_code)
    try:
        with quietly(transformers):
            model, loading = kind.from_pretrained(
                **where,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                dtype="float32",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise RecipeError(f"model.path={path} cannot be read as a model: {_first_line(error)}") from None
    _check_loaded(path, type(model).__name__, loading)
    model.config.use_cache = False  # the outputs that are compared are logits, not a cache
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)  # of the file it was read from: it is a float model now
    for parameter in model.parameters():  # memory of its own: it may be a view of the file
        parameter.data = parameter.data.clone()
    result: nn.Module = model.eval()
    return result


def read_where(path: str, key: str) -> dict[str, str]:
    """Return what transformers' from_pretrained is told to read a folder or a .gguf file.

    Raises:
        RecipeError: there is neither; key names the setting.
    """
    found = Path(path).expanduser()
    if found.is_file() and found.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(found.parent), "gguf_file": found.name}
    if not found.is_dir():
        raise RecipeError(f"{key}={path}: there is no such folder; give one that transformers can read")
    if (found / "config.json").is_file():
        return {"pretrained_model_name_or_path": str(found)}
    files = sorted(found.glob("*.gguf"))
    if len(files) == 1:
        return {"pretrained_model_name_or_path": str(found), "gguf_file": files[0].name}
    if files:
        raise RecipeError(f"{key}={path} holds {len(files)} GGUF files; name one: {key}={files[0]}")
    raise RecipeError(f"{key}={path} holds neither a config.json nor a .gguf file; is it a model's folder?")


def _class(transformers: Any, file: Path, trusted: bool) -> Any:  # noqa: ANN401  # a class of transformers
    """Return the class config.json names."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} is no JSON: {error}; copy it again") from None
    names = (config.get("architectures") if isinstance(config, dict) else None) or ["AutoModel"]
    if isinstance(config, dict) and config.get("auto_map"):
        if not trusted:
            raise RecipeError(
                f"{file} names Python code of its own; read it, and if you trust it say "
                "model.trust_remote_code=true"
            )
        autos = [name for name in config["auto_map"] if name.startswith("AutoModel")]
        return getattr(
            transformers, "AutoModelForCausalLM" if "AutoModelForCausalLM" in autos else "AutoModel"
        )
    known = getattr(transformers, str(names[0]), None)
    if names[0] == "AutoModel" or (
        isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)
    ):
        return known
    raise RecipeError(
        f"transformers {transformers.__version__} has no architecture '{names[0]}', which {file} names; "
        "install a release that has it"
    )


def _check_loaded(path: str, architecture: str, loading: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers made weights up."""
    if absent := sorted(loading["missing_keys"]):
        raise RecipeError(
            f"model.path={path} lacks {len(absent)} of the weights of {architecture}, '{absent[0]}' first; "
            "copy its files again, or name the architecture that was saved in config.json"
        )
    for name, found, expected in sorted(loading["mismatched_keys"]):
        raise RecipeError(
            f"model.path={path}: '{name}' is {[*found]} in the files and {[*expected]} by config.json; "
            "give the config.json that was saved with them"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
