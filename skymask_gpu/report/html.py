"""What all HTML pages share: the templates, the footer, and pictures inside the page."""

import base64
import platform
from pathlib import Path
from typing import Any

import jinja2
import torch

__all__ = ["page"]


def page(template: str, title: str, pictures: dict[str, Path], **values: Any) -> str:
    """A page that needs no other file.

    Args:
        template: the name of a template of this folder; it extends ``base.html.j2``.
        title: the heading.
        pictures: PNG files by name, which the template knows as ``pictures.NAME``.
        values: what else the template shows; texts are escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("skymask_gpu", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return environment.get_template(template).render(
        title=title,
        pictures={name: _data_uri(path) for name, path in pictures.items()},
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, {device}",
        **values,
    )


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
