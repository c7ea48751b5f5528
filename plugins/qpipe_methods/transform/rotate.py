"""Rotate the residual stream, so that no channel of it stands out."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn

from qpipe import Recipe, RecipeError, Task, Transform, hookimpl
from qpipe.graph import Call, Invocation, Recording, Value
from qpipe.task import Batches
from qpipe_methods.transform._scaling import SAME, Finder, check_kept, held, recorded

log = logging.getLogger("qpipe")


class Rotate(Transform):
    """Multiply what the layers of a pre-norm model add up by a randomised Hadamard matrix.

    The function is kept. The scale of each norm moves into the layers that read it, the matrix into the
    embeddings, the layers that write to the stream and those that read its norms: nothing is left to compute.
    A head tied to the embedding gets a weight of its own: it alone takes up the last norm's scale.

    Args:
        seed: of the random signs.

    Raises:
        RecipeError: the model is no residual stream of norms that only scale (LayerNorm subtracts a mean).

    Source: Ashkboos et al., "QuaRot", 2024, arXiv 2404.00456, section 3; random signs: Chee et al.,
        "QuIP", 2023, arXiv 2307.13304.
    Equation: (X Q)(Q^T W) = X W with Q = diag(±1) H / sqrt(n)
    """

    name = "rotate"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def apply(self, model: nn.Module, batches: Batches, task: Task, recipe: Recipe) -> None:
        """Rotate the one stream that starts at the embeddings."""
        recording = recorded(model, batches, task)
        stream = _Stream(model, recording)
        rotation = randomised_hadamard(stream.width, self.seed)
        for path in stream.norms:
            _check_commutes(model.get_submodule(path), path, rotation)
        stream.rotate(rotation)
        check_kept(model, recording, batches, task, self.name)


class _Stream:
    """What writes to the residual stream and what reads it, found by following its values."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.model = model
        self.finder = Finder(model, recording)
        self.embeddings: dict[str, None] = {}
        self.writers: dict[str, None] = {}
        self.norms: dict[str, list[str]] = {}  # and the layers that read each
        self.values: set[Value] = set()
        entered: set[Invocation] = set()
        for call in recording.calls:
            norm = self._norm(call.invocation)
            if norm in entered:
                continue
            if norm is not None and any(value in self.values for value in call.inputs):
                entered.add(norm)
                self.norms[norm.path] = self._readers(norm)
            else:
                self._follow(call)
        if not self.norms:
            raise RecipeError(
                "rotate finds no residual stream that starts at an embedding and is normed; leave it out"
            )
        self.width = next(iter(self.values)).shape[-1]

    def _follow(self, call: Call) -> None:
        if call.op == "embedding":
            self.embeddings[call.invocation.path] = None
        elif not any(value in self.values for value in call.inputs):
            return
        elif call.op == "add" and all(value.activation for value in call.inputs):
            for value in call.inputs:
                if value not in self.values:
                    self.writers[self._writer(value)] = None
        elif call.op not in SAME:
            raise self._unfit(f"'{call.name}' reads it")
        self.values.add(call.outputs[0])
        if call.outputs[0].is_output:
            raise self._unfit("the model returns it")

    def _norm(self, invocation: Invocation) -> Invocation | None:
        """Return the invocation if it is one of a module whose only parameter is a scale."""
        parameters = (
            [*self.model.get_submodule(invocation.path).named_parameters()] if invocation.path else []
        )
        is_norm = len(parameters) == 1 and parameters[0][0] == "weight" and parameters[0][1].dim() == 1
        return invocation if is_norm else None

    def _writer(self, value: Value) -> str:
        call = self.finder.back(value, SAME).call
        if call is None or not self.finder.is_layer(call) or not self.finder.leads(call.outputs[0], value):
            raise self._unfit(
                f"'{call.name if call else value.kind}' adds to it, which is no linear layer alone"
            )
        return call.invocation.path

    def _readers(self, norm: Invocation) -> list[str]:
        readers: list[str] = []
        waiting = [value for _, value in norm.outputs]
        while waiting:
            for call in waiting.pop().consumers:
                if call.op == "linear" and isinstance(self.finder.modules[call.invocation.path], nn.Linear):
                    readers.append(call.invocation.path)
                elif call.op in (*SAME, "getitem"):
                    waiting.append(call.outputs[0])
                else:
                    raise self._unfit(f"'{call.name}' reads what '{norm.path}' gives")
        return [*dict.fromkeys(readers)]

    @staticmethod
    def _unfit(why: str) -> RecipeError:
        return RecipeError(f"rotate cannot turn this model's residual stream: {why}; leave it out")

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Fold the norms' scales and rotate embeddings, writers and readers."""
        for path in {path: None for readers in self.norms.values() for path in readers}:
            self._untie(path)
        for norm, readers in self.norms.items():
            scale = held(self.model, norm, "weight")
            for path in readers:
                weight = held(self.model, path, "weight")
                weight.copy_((weight.double() * scale.double()) @ rotation.to(weight.device))
            scale.fill_(1)
        for path in self.embeddings:
            weight = held(self.model, path, "weight")
            weight.copy_(weight.double() @ rotation.to(weight.device))
        for path in self.writers:
            for name, value in self.model.get_submodule(path).named_parameters():
                rows = held(self.model, path, name)
                rows.copy_(rotation.T.to(value.device) @ rows.double())

    def _untie(self, path: str) -> None:
        module = self.model.get_submodule(path)
        for embedding in self.embeddings:
            if module._parameters["weight"] is self.model.get_submodule(embedding)._parameters["weight"]:
                module.register_parameter("weight", nn.Parameter(held(self.model, path, "weight").clone()))
                log.warning("rotate: '%s' no longer shares the weight of '%s'", path, embedding)


def _check_commutes(norm: nn.Module, path: str, rotation: Tensor) -> None:
    """See that the norm, its scale left out, commutes with the rotation.

    Raises:
        RecipeError: it does not.
    """
    norm = copy.deepcopy(norm).cpu().double()
    held(norm, "", "weight").fill_(1)
    x = torch.randn(1, 3, len(rotation), dtype=torch.double, generator=torch.Generator().manual_seed(0)) + 1
    with torch.no_grad():
        if not torch.allclose(norm(x @ rotation), norm(x) @ rotation, rtol=1e-3, atol=1e-4):
            raise RecipeError(f"rotate needs norms that only scale, and '{path}' does not; leave it out")


def randomised_hadamard(size: int, seed: int = 0) -> Tensor:
    """Return diag(±1) H / sqrt(size) in float64: orthogonal, every entry of one magnitude."""
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    rotation: Tensor = signs * hadamard(size).double() / size**0.5
    return rotation


def hadamard(size: int) -> Tensor:
    """Return a matrix [size, size] of ±1 with orthogonal rows: Paley's constructions, doubled by Sylvester.

    Raises:
        RecipeError: neither construction gives that size.

    Source: Paley, "On Orthogonal Matrices", 1933.
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.long)
    if size % 4 == 0 and _is_prime(size - 1):
        return _border(size - 1, 1) + torch.eye(size, dtype=torch.long)
    half = size // 2
    if size % 4 == 0 and half % 2 == 0 and half % 4 == 2 and _is_prime(half - 1):
        symmetric, one = _border(half - 1, -1), torch.eye(half, dtype=torch.long)
        plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
        return torch.kron(symmetric, plus) + torch.kron(one, minus)
    if size % 2 == 0:
        return torch.kron(torch.tensor([[1, 1], [1, -1]]), hadamard(half))
    raise RecipeError(f"rotate knows no Hadamard matrix of a size with the factor {size}; leave it out")


def _border(prime: int, sign: int) -> Tensor:
    """Return the matrix of quadratic residues of a prime, bordered: skew for sign 1, symmetric for -1."""
    index = torch.arange(prime)
    character = torch.full((prime,), -1)
    character[(index * index) % prime] = 1
    character[0] = 0
    result = torch.zeros(prime + 1, prime + 1, dtype=torch.long)
    result[0, 1:], result[1:, 0] = 1, -sign
    result[1:, 1:] = character[(index[:, None] - index) % prime]
    return result


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))


@hookimpl
def qpipe_register_transform() -> list[type[Transform]]:
    """Offer the rotation."""
    return [Rotate]
