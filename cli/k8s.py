"""`graftserve k8s`: the manifests, listed and rendered."""

import json
from pathlib import Path

import click

from .output import print_result

__all__ = ["command"]


@click.group("k8s")
def command() -> None:
    """Show the Kubernetes manifests, and make your own of them.

    They are Kustomize: overlays for places, components for features.
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def list_command(as_json: bool) -> None:
    """Show overlays and components, with one line for each."""
    from graftserve.k8s.manifests import components, overlays, used_components

    if as_json:
        listed = {
            "overlays": [
                {"name": name, "summary": summary, "components": used_components(name)}
                for name, summary in overlays().items()
            ],
            "components": [{"name": name, "summary": summary} for name, summary in components().items()],
        }
        click.echo(json.dumps(listed, ensure_ascii=False))
        return
    click.echo("overlays")
    for name, summary in overlays().items():
        click.echo(f"  {name:<16} {summary}")
        click.echo(f"  {'':<16} {', '.join(used_components(name))}")
    click.echo("components")
    for name, summary in components().items():
        click.echo(f"  {name:<16} {summary}")


@command.command("render")
@click.argument("overlay", metavar="OVERLAY|DIR")
@click.option("--component", "add", multiple=True, metavar="NAME", help="Add this component; repeatable.")
@click.option("--without", multiple=True, metavar="NAME", help="Leave this component out; repeatable.")
@click.option(
    "-o",
    "--output",
    metavar="NEW_DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Copy the overlay with all it needs to this folder instead, to edit and commit.",
)
def render_command(overlay: str, add: tuple[str, ...], without: tuple[str, ...], output: Path | None) -> None:
    """Print the manifests of an overlay, or of a DIR of your own (./ or / in it), as YAML.

    \b
    Examples: graftserve k8s render laptop | kubectl apply -f -
              graftserve k8s render production --component tls --output deploy
              graftserve k8s render deploy/overlays/production
    """
    from graftserve.k8s.manifests import copy_manifests
    from graftserve.k8s.render import render, render_folder

    is_folder = "/" in overlay or overlay == "."
    if is_folder and (add or without or output):
        raise click.UsageError("A DIR is rendered as it is: edit its kustomization.yaml instead.")
    if output is not None:
        folder = copy_manifests(overlay, output, add=add, leave_out=without)
        print_result(
            {
                "overlay": folder,
                "next": f"edit {folder}/stable.env, then graftserve rollout apply --overlay {folder}",
            },
            as_json=False,
        )
        return
    text = render_folder(Path(overlay)) if is_folder else render(overlay, add=add, leave_out=without)
    click.echo(text, nl=False)
