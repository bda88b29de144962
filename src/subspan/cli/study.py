"""``subspan study``: run many runs, and compare them with paired statistics."""

from dataclasses import replace
from typing import Any

from subspan.cli.parser import Namespace, Parser, path_of

_METRICS = ["test_loss", "val_loss", "val_ppl", "accuracy", "f1", "matthews", "pearson", "spearman"]
_ABOUT = {"run": "Run the missing runs of a study.", "table": "Compare the rows of a study over its seeds."}
_EXAMPLES = {
    "run": "subspan study run studies/table1_nano.yaml --jobs 2",
    "table": "subspan study table studies/table1_nano.yaml --json",
}


def add_to(commands: Any, name: str, about: str) -> None:
    study = Parser(description="Run many runs and compare them with paired statistics.", examples=[*_EXAMPLES.values()])
    commands.add_subcommand(name, study, help=about)
    kinds = study.add_subcommands(required=True, dest="what", title="what to do", description=None)
    for what, does in _ABOUT.items():
        parser = Parser(description=does, examples=[_EXAMPLES[what]])
        parser.add_argument("file", type=str, help="Study file, such as studies/table1_nano.yaml.")
        parser.add_argument(
            "--results",
            type=str,
            help="File of results. The default is results/NAME.jsonl beside the folder of the study.",
        )
        parser.add_argument("--rows", type=str, help="Names of the rows, with commas. The default is all.")
        if what == "run":
            parser.add_argument("--jobs", type=int, default=2, help="Number of runs at a time, with one thread each.")
            parser.add_argument(
                "--runs", type=str, default="runs/studies", help="Directory for the directories of the runs."
            )
        else:
            parser.add_argument(
                "--metric",
                choices=_METRICS,
                help="Score to compare. The default is test_loss, or val_loss where there is no test text.",
            )
            form = parser.add_mutually_exclusive_group()
            form.add_argument("--json", action="store_true", help="Print JSON.")
            form.add_argument("--short", action="store_true", help="Print the columns that answer the question.")
            form.add_argument("--latex", action="store_true", help="Print a LaTeX table.")
        kinds.add_subcommand(what, parser, help=does[0].lower() + does[1:-1])


def run(settings: Namespace) -> int:
    from subspan.study.study_file import load_study, with_rows

    what = settings.what
    chosen = settings[what]
    study = load_study(path_of("file", chosen.file))
    if chosen.results is not None:
        study = replace(study, results=path_of("results", chosen.results))
    if chosen.rows is not None:
        study = with_rows(study, [name.strip() for name in chosen.rows.split(",")])
    if what == "run":
        from subspan.study.runner import Runner

        return Runner(study, path_of("runs", chosen.runs), chosen.jobs).run()
    from subspan.study.table import as_json, as_latex, as_text, compare

    found = compare(study, chosen.metric)
    print(as_json(found) if chosen.json else as_latex(found) if chosen.latex else as_text(found, chosen.short))
    return 0
