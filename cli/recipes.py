"""`radlads recipes ls | show | cp | validate | schema`: finding, copying and checking training recipes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from radlads.cli.options import arg, opt
from radlads.cli.render import Table

if TYPE_CHECKING:
    from radlads.recipe import Recipe

JSON_HELP = "Print one JSON document."


@dataclass(kw_only=True)
class ListOptions:
    """How to print the list."""

    json: bool = opt(False, JSON_HELP, "--json")


@dataclass(kw_only=True)
class ShowOptions:
    """Which recipe, and what to change in it."""

    recipe: str = arg("Name of a built-in recipe, or a YAML file.", metavar="RECIPE")
    set: list[str] = opt([], "Override a value, such as stages.0.lr=1e-3; may be given several times.", metavar="KEY=VALUE")
    json: bool = opt(False, JSON_HELP, "--json")


@dataclass(kw_only=True)
class CopyOptions:
    """What to copy where."""

    recipe: str = arg("Name of a built-in recipe.", metavar="RECIPE")
    file: str = arg("The YAML file to write.", metavar="FILE")
    overwrite: bool = opt(False, "Replace the file if it exists.", "--overwrite")
    json: bool = opt(False, JSON_HELP, "--json")


@dataclass(kw_only=True)
class ValidateOptions(ShowOptions):
    """Which recipe to check."""


@dataclass(kw_only=True)
class SchemaOptions:
    """The schema takes no settings."""


@dataclass
class RecipeSummary:
    """A recipe in one row."""

    name: str
    teacher: str | None
    student: str | None
    softmax_layers: int
    stages: list[str]
    tokens: int

    @classmethod
    def of(cls, name: str, recipe: "Recipe") -> "RecipeSummary":
        """The summary of a loaded recipe."""
        student = recipe.student.arch if recipe.student else None
        kinds: list[str] = [stage.kind for stage in recipe.stages]
        kept = len(recipe.student.keep_softmax) if recipe.student else 0
        return cls(name, recipe.teacher, student, kept, kinds, sum(stage.tokens for stage in recipe.stages))

    def cells(self) -> list[str]:
        """The row of a table."""
        student = f"{self.student} + {self.softmax_layers} softmax" if self.softmax_layers else self.student or "-"
        return [self.name, self.teacher or "new", student, " ".join(self.stages), f"{self.tokens / 1e6:,.3g} M"]


COLUMNS = ("recipe", "teacher", "student", "stages", "tokens")


@dataclass
class RecipeList:
    """The built-in recipes."""

    recipes: list[RecipeSummary]

    def blocks(self) -> list[Table | str]:
        """One table."""
        return [Table(COLUMNS, [row.cells() for row in self.recipes], right=("tokens",))]


@dataclass
class ShownRecipe:
    """A recipe with every value filled in."""

    recipe: dict[str, Any]
    yaml: str

    def blocks(self) -> list[Table | str]:
        """The recipe as YAML."""
        return [self.yaml.rstrip("\n")]


@dataclass
class CopiedRecipe:
    """Where the copy lies."""

    file: str

    def blocks(self) -> list[Table | str]:
        """What to do next."""
        return [f"Wrote {self.file}. Run it with `radlads train {self.file}`."]


@dataclass
class ValidRecipe:
    """A recipe that holds no mistake."""

    valid: bool
    recipe: RecipeSummary

    def blocks(self) -> list[Table | str]:
        """One line and the summary."""
        return [f"{self.recipe.name} is valid.", Table(COLUMNS, [self.recipe.cells()], right=("tokens",))]


@dataclass
class Schema:
    """The JSON Schema, as text."""

    text: str

    def blocks(self) -> list[Table | str]:
        """The schema alone, to be written to a file."""
        return [self.text]


def list_recipes(options: ListOptions) -> RecipeList:
    """The recipes of the package."""
    from radlads.recipe import load_recipe, recipe_names

    return RecipeList([RecipeSummary.of(name, load_recipe(name)) for name in recipe_names()])


def show_recipe(options: ShowOptions) -> ShownRecipe:
    """A recipe with its base, defaults and overrides resolved."""
    from radlads.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    return ShownRecipe(recipe.values(), recipe.to_yaml())


def copy_recipe(options: CopyOptions) -> CopiedRecipe:
    """Copy a recipe byte for byte; R401 if the file exists."""
    from pathlib import Path

    from radlads.errors import fail
    from radlads.files import write_file
    from radlads.recipe import find_recipe

    source, target = find_recipe(options.recipe), Path(options.file)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not options.overwrite:
        raise fail("R401", where=target, why="the file exists", fix="Choose another name, or pass --overwrite")
    write_file(target, source.read_bytes())
    return CopiedRecipe(str(target))


def validate_recipe(options: ValidateOptions) -> ValidRecipe:
    """Check a recipe; every mistake is an error of its own."""
    from radlads.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    return ValidRecipe(True, RecipeSummary.of(options.recipe, recipe))


def recipe_schema(options: SchemaOptions) -> Schema:
    """The JSON Schema of recipes."""
    import json

    from radlads.recipe import Recipe

    return Schema(json.dumps(Recipe.model_json_schema(), indent=2))
