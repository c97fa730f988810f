"""What a recipe's names stand for: known without torch, imported when used, and no name twice."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from configs.registry import LOSSES, REGISTRIES, Registry


@dataclass
class Thing:
    """Something to register."""

    first: str
    second: int = 1

    def __post_init__(self) -> None:
        if self.second < 0:
            raise ValueError("second is below 0")


def test_every_built_in_is_there() -> None:
    for registry in REGISTRIES:
        assert all(registry[name] is registry.get(name) for name in registry)
        assert not any(registry.origin(name) for name in registry.names())


def test_names_are_known_without_torch() -> None:
    code = "import sys; from configs.registry import LOSSES; LOSSES.check('NCALoss'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_name_is_registered_once() -> None:
    registry: Registry[object] = Registry("thing", {"built": Thing})
    assert registry.register("mine")(Thing) is Thing
    assert registry.names() == ["built", "mine"]
    assert registry.origin("mine") == Thing.__module__
    for name, whose in (("mine", Thing.__module__), ("built", "built in")):
        with pytest.raises(ValueError, match=rf"thing '{name}' exists already \({whose}\); choose another name"):
            registry.register(name, Thing)
    registry.forget("mine")
    assert "mine" not in registry


def test_what_is_wrong_is_named() -> None:
    registry = Registry("thing", {"built": Thing}, key="section.name", more="see there")
    with pytest.raises(ValueError, match=r"^unknown section.name 'buil'; nearest: built \(see there\)$"):
        registry.check("buil")
    assert registry.build("built", {"second": 2}, "given") == Thing("given", 2)
    for arguments, message in (
        ({"secnd": 2}, r"^built takes no argument 'secnd'; nearest: second \(it takes second\)$"),
        ({"first": "a"}, r"^built takes no argument 'first'"),  # it is given already
        ({"second": -1}, r"^built: second is below 0$"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.build("built", arguments, "given")


def test_an_argument_of_any_name_is_passed_on() -> None:
    registry = Registry("thing", {"any": dict})
    registry.register("named", lambda **named: named)
    assert registry.build("named", {"a": 1}) == {"a": 1}
    assert LOSSES.build("NCALoss", {"softmax_scale": 2.0}).softmax_scale == 2
