"""Objectives of a config, and loading their parameters from an earlier run."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, Dict, NamedTuple, Sequence, Tuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skill_fairseq.checkpoints.plain_files import looks_like_safetensors
from skill_fairseq.checkpoints.safe_load import load_torch_file, plain
from skill_fairseq.objectives.objective import OBJECTIVES, Objective

logger = logging.getLogger(__name__)


class Term(NamedTuple):
    """One objective of the sum.

    Attributes:
        objective: the objective.
        weight: its factor; see :meth:`weight_in`.
        weight_epochs: the epoch in which the factor reaches 0; 0: it does not change.
        cfg: its config.
        path: its attribute of the criterion, the prefix of its parameters in checkpoints.
        field: path of its config, from the criterion's.
        prefix: prefix of the names that it logs.
    """

    objective: Objective
    weight: float
    cfg: Any
    path: str
    field: str
    prefix: str
    weight_epochs: int = 0

    def weight_in(self, epoch: int) -> float:
        """The factor in an epoch, counted from 1: weight (1 - epoch / weight_epochs), and at least 0."""
        return self.weight * max(1 - epoch / self.weight_epochs, 0.0) if self.weight_epochs else self.weight


def learns_from_labels(kind: str) -> bool:
    return bool(getattr(OBJECTIVES[kind][0], "supervised", False))


def read_objective(given: Any, field: str) -> Tuple[str, float, Dict[str, Any], Any]:
    """Name, weight, other common fields (``adapters``, ``weight_epochs``) that differ from their defaults, and typed
    config of an objective.

    Raises:
        ValueError: names the field.
    """
    fields = dict(plain(given)) if OmegaConf.is_dict(given) else {}
    kind, weight, adapters = fields.pop("_name", None), fields.pop("weight", 1.0), fields.pop("adapters", True)
    epochs = fields.pop("weight_epochs", 0)
    if kind not in OBJECTIVES:
        raise ValueError(f"{field}._name: {kind!r}; expected one of {', '.join(sorted(OBJECTIVES))}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise ValueError(f"{field}.weight: {weight!r}; expected a number of at least 0")
    if not isinstance(adapters, bool):
        raise ValueError(f"{field}.adapters: {adapters!r}; expected true or false")
    if type(epochs) is not int or epochs < 0:
        raise ValueError(f"{field}.weight_epochs: {epochs!r}; expected a whole number of epochs, 0 for none")
    common = {**({} if adapters else {"adapters": False}), **({"weight_epochs": epochs} if epochs else {})}
    try:
        return kind, float(weight), common, OmegaConf.merge(OmegaConf.structured(OBJECTIVES[kind][1]), fields)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(OBJECTIVES[kind][1]))
        raise ValueError(f"{field}: {str(error).splitlines()[0]}; {kind} has the fields {known}") from error


def init_objectives(terms: Sequence[Term], path: str) -> None:
    """Loads the objectives' parameters from a run that had the same settings.

    Raises:
        ValueError: its settings differ; names the field and both values.
    """
    checkpoint = _saved_run(Path(path))
    before, state = plain(checkpoint.get("cfg")) or {}, checkpoint.get("criterion") or {}
    for term in terms:
        own, prefix = term.objective.state_dict(), f"{term.path}."
        found = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        if not own:  # criterion.projection=identity
            continue
        if not found:
            logger.warning(
                f"criterion.init_from: {path} has no projections or heads for {term.field}: they start from scratch "
                "(projections as the identity); give stage 1's checkpoint, or null"
            )
            continue
        saved = before
        for part in term.field.split("."):
            saved = saved.get(part) or {}
        mine, theirs = (term.objective.settings(cfg) for cfg in (term.cfg, saved))
        shapes = [{k: list(v.shape) for k, v in side.items()} for side in (found, own)]
        compared = [(f"{term.field}.{name}", value, mine.get(name)) for name, value in theirs.items()]
        target = getattr(term.objective, "target", None)
        if target is not None:  # a class is an index in the head
            labels = ((before.get("task") or {}).get("targets") or {}).get(target.name) or {}
            compared.append((f"task.targets.{target.name}.classes", labels.get("classes"), list(target.classes)))
        for name, other, value in [*compared, ("shapes of projections", *shapes)]:
            if other != value:
                raise ValueError(
                    f"criterion.init_from: {path}: its projections were trained with {name} = {other}, here it is "
                    f"{value}; use the same in both runs, or start from the identity with criterion.init_from=null"
                )
        term.objective.load_state_dict(found)


def _saved_run(path: Path) -> Dict[str, Any]:
    """Loads a fairseq checkpoint; empty for exported files and folders, which have no criterion."""
    if not path.exists():
        raise FileNotFoundError(f"criterion.init_from: {path} does not exist; give stage 1's checkpoint, or null")
    if path.is_dir():
        return {}
    with open(path, "rb") as file:
        if looks_like_safetensors(file.read(64)):
            return {}
    return load_torch_file(path)
