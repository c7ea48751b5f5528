"""Range and levels are two axes: every calibrator works with every quantizer that uses a range."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qpipe import Distribution, Histogram, Quantizer, QuantSpec, RecipeError, Role, Samples
from qpipe.choices import build_recipe, library_config
from qpipe.registry import PluginRegistry
from qpipe.testing import observe

REGISTRY = PluginRegistry.load_installed()
QUANTIZERS = [name for name in REGISTRY.names("quantizer") if REGISTRY.get("quantizer", name).uses_range]


def outliers() -> torch.Tensor:
    """Return blocks [3, 8192] of weights' size, each with an outlier of 12 deviations, one block positive."""
    x = torch.randn(3, 8192, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 12
    x[2].abs_()
    return 0.05 * x


def error(quantizer: Quantizer[Any], calibrator: Any, stats: Any, spec: QuantSpec) -> torch.Tensor:  # noqa: ANN401
    range_ = calibrator.range(stats, quantizer, spec)
    assert range_.low.shape == range_.high.shape == (3, 1)
    qparams = quantizer.fit(stats, range_, spec)
    return (quantizer.fake_quantize(outliers(), qparams, spec) - outliers()).square().mean(1)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("role", [*Role])
def test_every_calibrator_ranges_every_quantizer(name: str, role: Role) -> None:
    """What they fit is finite and nearer to the data than zero is; mse is never worse than minmax."""
    quantizer = REGISTRY.create("quantizer", name)
    if role not in quantizer.roles:
        pytest.skip(f"{name} does not serve {role}s")
    weight = role is Role.WEIGHT
    moving = name == "hqq"  # its zero does, which symmetric codes fix
    centred = weight and not moving
    spec = QuantSpec(num_bits=4, symmetric=centred, signed=centred, role=role)
    quantizer.check(spec)
    errors = {}
    for word in REGISTRY.names("calibrator"):
        calibrator = REGISTRY.create("calibrator", word)
        if role not in calibrator.roles:
            continue
        stats: Any = Samples(outliers())
        if not weight:
            needs = calibrator.needs
            stats = observe(Histogram if needs is Distribution else needs, outliers())
        errors[word] = error(quantizer, calibrator, stats, spec)
        assert torch.isfinite(errors[word]).all(), word
        assert (errors[word] < outliers().square().mean(1)).all(), word
    assert (errors["mse"] <= errors["minmax"] * 1.001).all()


@pytest.mark.parametrize("name", [n for n in REGISTRY.names("quantizer") if n not in QUANTIZERS])
@pytest.mark.parametrize("word", REGISTRY.names("calibrator"))
def test_a_range_for_levels_that_have_none_is_refused(name: str, word: str) -> None:
    """Whether it is named for one slot or for both; one that was not named is not held against them."""
    bits = {"binary": 1, "ternary": 2}.get(name, 4)
    slots: dict[str, Any] = {"weight": {"num_bits": bits}, "activation": None}
    build_recipe(library_config({"quantizer": name, **slots}, exporting=False), REGISTRY)
    says = f"'{name}' fits its levels to all values, so calibrator '{word}'.* leave out "
    shared = {"quantizer": name, "calibrator": word, **slots}
    with pytest.raises(RecipeError, match=f"{says}calibrator={word}"):
        build_recipe(library_config(shared, exporting=False), REGISTRY)
    if Role.WEIGHT in REGISTRY.get("calibrator", word).roles:
        slots["weight"]["calibrator"] = word
        with pytest.raises(RecipeError, match=f"{says}weight.calibrator={word}"):
            build_recipe(library_config({"quantizer": name, **slots}, exporting=False), REGISTRY)


@pytest.mark.parametrize("word", REGISTRY.names("calibrator"))
@pytest.mark.parametrize("role", [*Role])
def test_a_role_that_a_calibrator_does_not_serve_is_refused_where_it_is_named(word: str, role: Role) -> None:
    config = library_config({role.value: {"calibrator": word}}, exporting=False)
    cls = REGISTRY.get("calibrator", word)
    if role in cls.roles:
        build_recipe(config, REGISTRY)
        return
    with pytest.raises(RecipeError, match=f"cannot serve {role.value}s .*: {cls.why_not[role]}; use "):
        build_recipe(config, REGISTRY)


def test_squared_error_finds_the_best_clip_of_uneven_levels() -> None:
    """MSE × FP4: within 2 % of the best of 2,000 clips tried one by one on N(0, 1)."""
    quantizer, spec = (
        REGISTRY.create("quantizer", "float"),
        QuantSpec(num_bits=4, symmetric=True, role=Role.WEIGHT),
    )
    x = torch.special.ndtri((torch.arange(20_001) + 0.5).double() / 20_001).float().unsqueeze(0)
    range_ = REGISTRY.create("calibrator", "mse").range(Samples(x), quantizer, spec)
    found = (quantizer.fake_quantize(x, quantizer.fit(Samples(x), range_, spec), spec) - x).square().mean()
    scales = torch.linspace(0.05, 1, 2000).unsqueeze(1)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat([-levels.flip(0), levels[1:]])
    best = min(
        (x.unsqueeze(-1) - scale * levels).abs().amin(-1).square().mean().item() for scale in scales.split(1)
    )
    assert found.item() == pytest.approx(best, rel=0.02)
    assert found.item() >= best * (1 - 1e-4)
