"""The stages that a run trains: their order, their teachers and their independent random seeds."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from potstill.config import repeat_index, stage_name, stage_role
from potstill.config.recipe import Recipe
from potstill.methods import needs_teacher


def derive_seed(seed: int, purpose: str) -> int:
    """Return a seed in [0, 2**63) for one purpose.

    Example:
        >>> (derive_seed(0, "student") == derive_seed(0, "student"),
        ... derive_seed(0, "student") == derive_seed(0, "teacher"))
        (True, False)
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little") >> 1


STAGE_GROUPS = (
    "teacher",
    "baseline",
    "distilled",
)  # assistants and generations belong to distilled

LayerPairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run."""

    name: str  # of its folder and its entry in results.json
    teachers: tuple[str, ...] = ()  # stages that it learns from
    distils: bool = False  # trained with the recipe's method; False: on labels alone
    feature_pairs: LayerPairs | None = None  # the recipe's, if they are for this stage

    @property
    def role(self) -> str:
        """teacher, baseline, assistant, generation or distilled."""
        return stage_role(self.name)

    @property
    def seed(self) -> str:
        """Name of its random streams: those of baseline and distilled are equal, and so are their views."""
        return "student" if self.role in ("baseline", "distilled") else self.name

    @property
    def repeat(self) -> int:
        """Offset of its seed from the recipe's; above 0 for baseline and distilled of further seeds."""
        return repeat_index(self.name)


def plan_stages(recipe: Recipe, parts: Iterable[str] = STAGE_GROUPS) -> tuple[PlannedStage, ...]:
    """Return the stages in the order of training.

    They are teachers, baseline, assistants (each learns from the one before), and the student's generations, of which
    the last is "distilled".  There are no teachers if the method needs none.  The recipe's ``feature_pairs`` are for
    the student and its teacher; between two generations the student's layers are paired with themselves; for
    assistants,
    pairs are found by depth.

    Without labels (``data.labeled``) there is no baseline.

    Further seeds add baseline and distilled; the other networks are trained once.  The stages of the first seed come
    first, so that a resumed run with more seeds only appends stages.

    Example:
        >>> from potstill.config.recipe import load_recipe
        >>> recipe = load_recipe("quickstart", ["born_again_generations=2"])
        >>> [(stage.name, stage.teachers) for stage in plan_stages(recipe)]
        [('teacher', ()), ('baseline', ()), ('generation-1', ('teacher',)), ('distilled', ('generation-1',))]
    """
    stages = _first_seed_stages(recipe, set(parts) - (set() if recipe.data.labeled else {"baseline"}))
    again = [stage for stage in stages if stage.role in ("baseline", "distilled")]
    for each in range(2, recipe.seeds + 1):
        stages += [replace(stage, name=stage_name(stage.role, each)) for stage in again]
    return tuple(stages)


def stage_recipe(recipe: Recipe, stage: PlannedStage) -> Recipe:
    """Return the recipe with the seed of a stage."""
    return recipe.model_copy(update={"seed": recipe.seed + stage.repeat})


def _first_seed_stages(recipe: Recipe, wanted: set[str]) -> list[PlannedStage]:
    """Return the stages of the first seed."""
    count = len(recipe.teacher_list) if needs_teacher(recipe.method) else 0
    before = tuple(stage_name("teacher", each) for each in range(1, count + 1))
    stages = [PlannedStage(name) for name in before] if "teacher" in wanted else []
    stages += [PlannedStage("baseline")] if "baseline" in wanted else []
    if "distilled" not in wanted:
        return stages
    for each in range(1, len(recipe.assistants) + 1):
        stages.append(PlannedStage(stage_name("assistant", each), before, distils=True))
        before = (stages[-1].name,)
    pairs = tuple(recipe.feature_pairs) if recipe.feature_pairs else None
    for each in range(1, recipe.born_again_generations + 1):
        name = "distilled" if each == recipe.born_again_generations else stage_name("generation", each)
        stages.append(PlannedStage(name, before, distils=True, feature_pairs=pairs))
        before = (name,)
        pairs = tuple((ours, ours) for ours, _ in pairs) if pairs else None
    return stages
