"""Components of a config: a ``type`` that the registry knows, and options checked against its constructor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from mmrl.errors import UserError, located, nearest
from mmrl.options import (
    Strict,
    absolute_if_found,
    find_paths,
    model_from_fields,
    options_model,
    plain,
    signature_fields,
    validate,
    values,
)
from mmrl.overrides import describe
from mmrl.registry import Kind, entries, find, load_object

if TYPE_CHECKING:
    from mmrl.algorithms.base import Algorithm
    from mmrl.policy import Policy
    from mmrl.scoring import Scorer


@dataclass
class Component:
    """A validated component, not yet built.

    Attributes:
        kind: "pipeline", "algorithm" or "reward".
        type: its name in the registry, or ``module:attribute``.
        options: plain values of all its options, defaults included.
        shared: of a reward, how it enters the sum: name, weight and so on (:class:`mmrl.scoring.Term`).
    """

    kind: Kind
    type: str
    options: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> Any:
        """The class or function that ``type`` names."""
        return load_object(find(self.kind, self.type).target)

    def dump(self) -> dict[str, Any]:
        """As it could stand in a config file."""
        return {"type": self.type, **self.shared, **self.options}

    def keywords(self) -> dict[str, Any]:
        """The options as the constructor takes them, nested dataclasses as objects."""
        return values(self.model().model_validate(self.options))

    def model(self) -> type[Strict]:
        """The options as a pydantic model."""
        return component_model(self.kind, self.type)


def component_model(kind: Kind, name: str) -> type[Strict]:
    """The options that a component takes; defaults are those of the registry entry where it has its own.

    A policy's are those of its ``load``, which builds the model, and of its constructor but for the first argument,
    which is that model. A name in both is one option and goes to both.
    """
    entry = find(kind, name)
    if kind == "reward":
        return load_object("rewards:reward_options")(name)
    target = load_object(entry.target)
    if not callable(target):
        raise UserError(f"{kind} '{name}' is {describe(target)}, not a class")
    fields, open_ended = signature_fields(target)
    if kind == "pipeline":
        fields.pop(next(iter(fields)))
        # Keywords that ``load`` only passes on cannot be checked, so they are not options.
        fields, open_ended = {**signature_fields(target.load)[0], **fields}, False
    for key, default in entry.defaults.items():
        kind = fields[key][0]
        # A registry stays light by giving nested options as plain values.
        fields[key] = (kind, TypeAdapter(kind).validate_python(default) if isinstance(default, dict) else default)
    return model_from_fields(target.__name__, fields, open_ended)


def term_model() -> type[Strict]:
    """The options every reward takes besides its own."""
    from mmrl.scoring import Term

    return options_model(Term, skip=("reward",))


def pipeline_component(data: Any, *, where: str, path: str, folders: Sequence[Path]) -> Component:
    """Check a ``pipeline`` section; a policy with a static ``validate(**options)`` looks at the values as well."""
    name, given = _split(data, "pipeline", where, path, folders)
    model = validate(component_model("pipeline", name), find_paths(given, folders), where=where, path=path)
    hook = getattr(load_object(find("pipeline", name).target), "validate", None)
    if hook is not None:
        with located(where):
            hook(**values(model))
    return Component("pipeline", name, plain(model))


def algorithm_component(data: Any, *, where: str, path: str, folders: Sequence[Path] = ()) -> Component:
    """Check an ``algorithm`` section by building the algorithm, which costs nothing."""
    name, given = _split(data, "algorithm", where, path, folders)
    model = validate(component_model("algorithm", name), given, where=where, path=path)
    component = Component("algorithm", name, plain(model))
    with located(where):
        build_algorithm(component)
    return component


def reward_component(data: Any, *, where: str, path: str, folders: Sequence[Path]) -> Component:
    """Check an item of ``rewards``. An option that the reward itself has goes to the reward, whatever its name."""
    name, given = _split(data, "reward", where, path, folders)
    own = component_model("reward", name)
    terms = term_model()
    shared_keys = {key for key in terms.model_fields if key not in own.model_fields}
    mine = {key: value for key, value in given.items() if key not in shared_keys}
    unknown = [key for key in mine if key not in own.model_fields and own.model_config["extra"] == "forbid"]
    if unknown:
        choices = sorted({*own.model_fields, *shared_keys})
        raise UserError(f"{where}: unknown key '{path}.{unknown[0]}'{nearest(unknown[0], choices)}")
    shared = plain(validate(terms, {k: v for k, v in given.items() if k in shared_keys}, where=where, path=path))
    shared = {key: value for key, value in shared.items() if key in shared_keys}
    shared["name"] = shared.get("name") or name.rpartition(":")[2]
    options = plain(validate(own, find_paths(mine, folders), where=where, path=path))
    return Component("reward", name, options, shared)


def build_algorithm(component: Component) -> Algorithm:
    """The algorithm, ready for the trainer."""
    return component.target(**component.keywords())


def build_policy(component: Component, **context: Any) -> Policy:
    """Load the model and wrap it.

    Args:
        context: keywords such as ``device`` that reach ``load`` and the constructor where these name them and the
            config leaves them at None.
    """
    target = component.target
    keywords = component.keywords()
    for key, value in context.items():
        if keywords.get(key) is None:
            keywords[key] = value
    loading, constructing = (signature_fields(part)[0] for part in (target.load, target))
    model = target.load(**{key: value for key, value in keywords.items() if key in loading})
    first = next(iter(constructing))
    return target(model, **{k: v for k, v in keywords.items() if k in constructing and k != first})


def build_scorer(rewards: Sequence[Component]) -> Scorer | None:
    """The weighted sum of rewards, loading their models; None where there are none."""
    from mmrl.scoring import Scorer, Term

    if not rewards:
        return None
    build = load_object("rewards:build_reward")
    terms = term_model()
    return Scorer(
        [Term(**{**values(terms.model_validate(r.shared)), "reward": build(r.target, r.keywords())}) for r in rewards]
    )


def _split(data: Any, kind: Kind, where: str, path: str, folders: Sequence[Path]) -> tuple[str, dict[str, Any]]:
    """The type and the options of a component's section."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: '{path}' is {describe(data)}, but should be a mapping with a 'type'")
    choices = ", ".join(entries(kind))
    if "type" not in data:
        raise UserError(f"{where}: '{path}.type' is missing (choices: {choices})")
    name = data["type"]
    if not isinstance(name, str):
        raise UserError(f"{where}: '{path}.type' is {describe(name)}, but should be a name (choices: {choices})")
    place, colon, attribute = name.rpartition(":")
    if colon and place.endswith(".py"):
        name = f"{absolute_if_found(place, folders)}:{attribute}"
    with located(f"{where}: '{path}.type'"):
        load_object(find(kind, name).target)
    return name, {key: value for key, value in data.items() if key != "type"}
