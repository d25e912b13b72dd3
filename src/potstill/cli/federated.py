"""Commands of federated learning: run, app."""

from pathlib import Path
from typing import Annotated, Any

import typer

from potstill.cli.run import Data, Overwrite, RecipeName, Root, Seed, Settings, SkipBad, Student, Teacher
from potstill.console import Progress, print_next_command, print_section
from potstill.formatting import format_many
from potstill.io import read_checksummed_json

federated_app = typer.Typer(
    help="Federated distillation: train one student on clients that keep their images.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@federated_app.callback()
def _group() -> None:
    """Federated distillation: train one student on clients that keep their images."""


@federated_app.command()
def run(
    recipe: RecipeName,
    clients: Annotated[
        int | None, typer.Option(metavar="N", help="Number of clients.  [default: 5, or the folders of folders:DIR]")
    ] = None,
    partition: Annotated[
        str, typer.Option(metavar="HOW", help="Partition of the images: iid, dirichlet:ALPHA or folders:DIR.")
    ] = "dirichlet:0.3",
    algorithms: Annotated[
        str, typer.Option(metavar="A,B", help="Algorithms to compare: fedavg, feddf, guided.")
    ] = "fedavg,feddf",
    baselines: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="Baselines: alone (each client by itself), central (all images on one machine)."
        ),
    ] = "",
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds of local training and averaging.")] = 5,
    local_epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Epochs of each client in each round.")] = 1,
    public: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=0.9,
            help="Share of the training images that is public; not used with data.unlabeled.",
        ),
    ] = 0.2,
    public_epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Passes over public images per round.")] = 5,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.01, help="Temperature of the clients' averaged logits.")
    ] = 1.0,
    max_share: Annotated[
        float, typer.Option(metavar="SHARE", help="Largest weight of one client in an average, 0.5 to 1.")
    ] = 0.5,
    data: Data = None,
    skip_bad: SkipBad = None,
    teacher: Teacher = None,
    student: Student = None,
    settings: Settings = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the run folder.  [default: RECIPE-federated]")
    ] = None,
    output_dir: Root = Path("runs"),
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue after the last finished round.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Simulate server and clients on this machine; compare algorithms on the same clients."""
    from potstill.config.recipe import load_recipe
    from potstill.contrib.federated import ALGORITHMS, BASELINES, parse_names
    from potstill.contrib.federated.partition import parse_partition

    names, division = parse_names(algorithms, ALGORITHMS, "algorithm"), parse_partition(partition)
    baseline_names = parse_names(baselines, BASELINES, "baseline")
    flags: dict[str, Any] = {"--data": data, "--teacher": teacher or None, "--student": student, "--seed": seed}
    flags["--skip-bad"] = skip_bad
    loaded = load_recipe(recipe, settings or (), flags=flags)

    from potstill.contrib.federated.federation import (
        RESULTS_FILE,
        FederationOptions,
        best_algorithm,
        federate,
        format_table,
    )
    from potstill.contrib.federated.server import Schedule

    options = FederationOptions(
        clients=clients,
        partition=division,
        algorithms=tuple(names),
        baselines=tuple(baseline_names),
        public=public,
        schedule=Schedule(rounds, local_epochs, public_epochs, temperature, max_share=max_share),
    )
    with Progress() as progress:
        folder = federate(
            loaded, options, output_dir=output_dir, name=name, resume=resume, overwrite=overwrite, observer=progress
        )
    found = read_checksummed_json(folder / RESULTS_FILE)
    print_section(
        f"{format_many(len(found['clients']), 'client')}, {partition}: {folder / RESULTS_FILE}", format_table(found)
    )
    print_next_command(["potstill", "predict", str(folder / best_algorithm(found, names)), "IMAGE"])


@federated_app.command(name="app")
def write_app(
    recipe: RecipeName,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the app's two files.")],
) -> None:
    """Write a Flower app, with which `flwr run` trains on several machines."""
    from potstill.contrib.federated.flower import write_app as write

    print_section("written", [str(path) for path in write(folder, recipe)])
