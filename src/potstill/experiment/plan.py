"""The stages that a run trains: their order, their teachers and their independent random seeds."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from potstill.config.method_settings import needs_teacher
from potstill.config.recipe import Recipe
from potstill.config.stage_names import repeat_index, stage_name, stage_role


def derive_seed(seed: int, purpose: str) -> int:
    """A seed in [0, 2**63) for one purpose.

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
)  # what can be asked for; assistants and generations belong to distilled

LayerPairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PlannedStage:
    """One stage to come."""

    name: str  # of its folder and of its entry in results.json
    teachers: tuple[str, ...] = ()  # stages that it learns from
    distils: bool = False  # trained by the recipe's method; else on labels alone
    feature_pairs: LayerPairs | None = None  # the recipe's pairs of layers, where they are meant for this stage

    @property
    def role(self) -> str:
        """teacher, baseline, assistant, generation or distilled."""
        return stage_role(self.name)

    @property
    def seed(self) -> str:
        """Whose random streams it draws: baseline and distilled start alike and see the same views."""
        return "student" if self.role in ("baseline", "distilled") else self.name

    @property
    def repeat(self) -> int:
        """By how much its seed is above the recipe's: 0 but for baseline and distilled of further seeds."""
        return repeat_index(self.name)


def plan_stages(recipe: Recipe, parts: Iterable[str] = STAGE_GROUPS) -> tuple[PlannedStage, ...]:
    """The stages in the order of training.

    Teachers, the baseline, the assistants (each learns from the one before), then the student's generations, the last
    of which is "distilled".  A method that learns from no teacher has none, whatever the recipe says.  The recipe's
    ``feature_pairs`` are those of the student and of whom it learns from; between two generations, which are the same
    network, the student's are joined to themselves; assistants are joined by depth.

    With several seeds, baseline and distilled follow once more for each further one; whoever teaches them is trained
    once.  So the first seed's stages are done first, and a run that goes on with more seeds only adds to them.

    Example:
        >>> from potstill.config.recipe import load_recipe
        >>> recipe = load_recipe("quickstart", ["born_again_generations=2"])
        >>> [(stage.name, stage.teachers) for stage in plan_stages(recipe)]
        [('teacher', ()), ('baseline', ()), ('generation-1', ('teacher',)), ('distilled', ('generation-1',))]
    """
    stages = _first_seed_stages(recipe, set(parts))
    again = [stage for stage in stages if stage.role in ("baseline", "distilled")]
    for each in range(2, recipe.seeds + 1):
        stages += [replace(stage, name=stage_name(stage.role, each)) for stage in again]
    return tuple(stages)


def stage_recipe(recipe: Recipe, stage: PlannedStage) -> Recipe:
    """The recipe with the seed that a stage is trained with: of a further one, as if the recipe had said so itself."""
    return recipe.model_copy(update={"seed": recipe.seed + stage.repeat})


def _first_seed_stages(recipe: Recipe, wanted: set[str]) -> list[PlannedStage]:
    """All stages of the first seed."""
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
