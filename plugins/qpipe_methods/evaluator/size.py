"""How many bytes the model takes."""

from __future__ import annotations

from collections.abc import Mapping

from qpipe import Evaluator, Subject, hookimpl
from qpipe.packing import payload_bytes


class SizeEvaluator(Evaluator):
    """Count the bytes of parameters and buffers, codes packed to their bits; of a file, its own size."""

    name = "size"
    measured = ("size_bytes",)

    def measure(self, subject: Subject) -> Mapping[str, float]:
        """Return size_bytes."""
        artifact = subject.artifact
        return {"size_bytes": float(artifact.num_bytes if artifact else payload_bytes(subject.model))}


@hookimpl
def qpipe_register_evaluator() -> list[type[Evaluator]]:
    """Offer the size."""
    return [SizeEvaluator]
