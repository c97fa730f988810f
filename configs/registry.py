"""Names of a recipe and what they stand for: aggregators, backbones, losses, miners, benchmarks, sources.

A built-in is a line of a table here, `name: "module:attribute"` (or "module:TABLE.key"), and is imported when it is
used, so that help and the schema know every name without importing torch. A plug-in registers its own under a name
that is free:

    from configs.registry import AGGREGATORS

    @AGGREGATORS.register("mean")
    class Mean(nn.Module): ...
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, overload

from configs.backbones import SPECS, BackboneSpec
from configs.names import nearest

NOT_RUN: dict[str, str] = {}  # why a name may be unknown: plug-ins that a file records, by file

T = TypeVar("T")
Thing = TypeVar("Thing")


class Registry(Mapping[str, T], Generic[T]):
    """What a kind of thing is called, in the order of registration.

    `key` is where a recipe names one (`loss.name`), for messages; `more` is their last words.
    """

    def __init__(self, kind: str, built_in: Mapping[str, str | T], *, key: str = "", more: str = "") -> None:
        self.kind, self.key, self.more = kind, key or kind, f" ({more})" if more else ""
        self._known: dict[str, str | T] = dict(built_in)
        self._origin: dict[str, str] = {}  # module that registered a name which is not built in

    @overload
    def register(self, name: str) -> Callable[[Thing], Thing]: ...
    @overload
    def register(self, name: str, thing: Thing) -> Thing: ...
    def register(self, name: str, thing: Any = None) -> Any:
        """Makes `thing` known as `name` and returns it; without a thing, a decorator that does.

        Raises ValueError for a name that is taken.
        """
        origin = sys._getframe(1).f_globals.get("__name__", "")
        if thing is None:
            return lambda decorated: self._add(name, decorated, origin)
        return self._add(name, thing, origin)

    def _add(self, name: str, thing: Thing, origin: str) -> Thing:
        if name in self._known:
            raise ValueError(
                f"{self.kind} {name!r} exists already ({self.origin(name) or 'built in'}); choose another name"
            )
        self._known[name] = thing  # type: ignore[assignment]
        self._origin[name] = origin
        return thing

    def forget(self, name: str) -> None:
        """Frees a name; one that is not known is fine."""
        self._known.pop(name, None)
        self._origin.pop(name, None)

    def names(self) -> list[str]:
        """All names; nothing is imported."""
        return list(self._known)

    def origin(self, name: str) -> str:
        """The module that registered a name; empty for a built-in."""
        return self._origin.get(name, "")

    def check(self, name: str) -> str:
        """`name`, if it is known; nothing is imported. Raises ValueError naming the nearest."""
        if name not in self._known:
            raise ValueError(f"unknown {self.key} {name!r}; {self.nearest(name)}")
        return name

    def nearest(self, name: str) -> str:
        """The last words about a name that is not known: the nearest, and which plug-ins were not run."""
        return "; ".join([nearest(name, self._known) + self.more, *NOT_RUN.values()])

    def get(self, name: str) -> T:  # type: ignore[override]
        """What a name stands for. Raises ValueError naming the nearest."""
        return self[self.check(name)]

    def build(self, name: str, arguments: Mapping[str, Any], *given: Any) -> Any:
        """`get(name)(*given, **arguments)`. Raises ValueError that names what is wrong and what would be right."""
        factory: Any = self.get(name)
        parameters = list(inspect.signature(factory).parameters.values())[len(given) :]
        accepted = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        for argument in arguments if len(accepted) == len(parameters) else ():
            if argument not in accepted:
                raise ValueError(
                    f"{name} takes no argument {argument!r}; {nearest(argument, accepted)} (it takes "
                    f"{', '.join(accepted) or 'none'})"
                )
        try:
            return factory(*given, **arguments)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"{name}: {error}") from error

    def __getitem__(self, name: str) -> T:
        thing = self._known[name]
        if isinstance(thing, str):
            module, _, place = thing.partition(":")
            table, _, key = place.partition(".")
            thing = getattr(importlib.import_module(module), table)
            return thing[key] if key else thing
        return thing

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


AGGREGATORS: Registry[Any] = Registry(
    "aggregator",
    {
        "cls": "model.aggregators.cls:ClsAggregator",
        "gem": "model.aggregators.gem:GemAggregator",
        "salad": "model.aggregators.salad:Salad",
        "boq": "model.aggregators.boq:BagOfQueries",
        "tokens": "model.aggregators.tokens:LearnedTokens",
    },
    key="model.aggregator",
)
BACKBONES: Registry[BackboneSpec] = Registry("backbone", SPECS, key="model.backbone")
LOSSES: Registry[Any] = Registry(
    "loss",
    {
        name: f"memory.losses:{name}"
        for name in ("MultiSimilarityLoss", "TripletMarginLoss", "ContrastiveLoss", "NCALoss")
    },
    key="loss.name",
    more="docs/memory.md lists all",
)
MINERS: Registry[Any] = Registry(
    "miner",
    {
        "MultiSimilarityMiner": "memory.miners:MultiSimilarityMiner",
        "TripletMarginMiner": "memory.miners:TripletMarginMiner",
        "none": "memory.miners:AllPairs",
    },
    key="loss.miner",
    more="docs/memory.md lists all",
)
BENCHMARKS: Registry[Any] = Registry(
    "benchmark",
    {
        name: f"eval.benchmarks.catalogue:CATALOGUE.{name}"
        for name in (
            *("town", "msls_val", "msls_test", "tokyo247", "pitts30k", "pitts250k", "nordland", "st_lucia"),
            *("gardens_point", "svox", "amstertime", "17places", "corridor", "essex3in1", "eynsham", "sped"),
        )
    },
)
SOURCES: Registry[Any] = Registry(
    "source",
    {
        "gsv-cities": "launch.data_commands:ShardCommand",
        "utm": "launch.data_commands:ShardUtmCommand",
        "msls": "launch.data_commands:ShardMslsCommand",
        "manifest": "launch.bucket_commands:ShardManifestCommand",
        "photos": "launch.data_commands:ShardPhotosCommand",
        "bucket": "launch.bucket_commands:ShardBucketCommand",
        "tars": "launch.tars_command:ShardTarsCommand",
    },
    key="kind of data set",
)
REGISTRIES = (AGGREGATORS, BACKBONES, LOSSES, MINERS, BENCHMARKS, SOURCES)
